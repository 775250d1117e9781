"""FID's Inception: the TensorFlow graph of 2015-12-05 as torch-fidelity and pytorch-fid have it, up to pool3.

It is not torchvision's Inception v3: average pools leave the padding out of their mean, the last block pools by
maximum, there are 1008 classes, and pictures are resized as TensorFlow 1 did. Names are those of the published file.
"""

# n pictures of a batch, H W pixels, C channels, s side of a map

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from refine_control.metrics.features.batches import beside, features_of
from refine_control.metrics.features.weights import INCEPTION, load_strictly, read_weights
from refine_control.metrics.image_pairs import Images

SIDE = 299
WIDTH = 2048
CLASSES = 1008


class Step(NamedTuple):
    """A convolution of a block; stride 1 keeps the side, stride 2 shrinks it without padding."""

    name: str
    channels: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1


Pool = Callable[[torch.Tensor], torch.Tensor]
Chain = tuple[Step | Pool | tuple[Step, ...], ...]
"""Steps in sequence; the outputs of a tuple of steps are concatenated."""


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU: (n,C,s,s) -> (n,channels,t,t)."""

    def __init__(
        self, width: int, channels: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | str = 0
    ):
        super().__init__()
        self.conv = nn.Conv2d(width, channels, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.bn(self.conv(maps)))


class Block(nn.Module):
    """Parallel chains on the same input, concatenated: (n,C,s,s) -> (n,sum of widths,t,t)."""

    def __init__(self, width: int, *chains: Chain):
        super().__init__()
        self.chains = chains
        for chain in chains:
            channels = width
            for step in chain:
                if callable(step):
                    continue
                beside = (step,) if isinstance(step, Step) else step
                for one in beside:
                    padding = "same" if one.stride == 1 else 0
                    self.add_module(one.name, Convolution(channels, one.channels, one.kernel, one.stride, padding))
                channels = sum(one.channels for one in beside)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._run(chain, maps) for chain in self.chains], 1)

    def _run(self, chain: Chain, maps: torch.Tensor) -> torch.Tensor:
        for step in chain:
            if callable(step):
                maps = step(maps)
            else:
                beside = (step,) if isinstance(step, Step) else step
                maps = torch.cat([self.get_submodule(one.name)(maps) for one in beside], 1)
        return maps


def mean_around(maps: torch.Tensor) -> torch.Tensor:
    """3 x 3 means; values outside the map do not count."""
    return functional.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=False)


def max_around(maps: torch.Tensor) -> torch.Tensor:
    """3 x 3 maxima, side kept."""
    return functional.max_pool2d(maps, 3, stride=1, padding=1)


def max_halved(maps: torch.Tensor) -> torch.Tensor:
    """3 x 3 maxima with stride 2, no padding."""
    return functional.max_pool2d(maps, 3, stride=2)


def _block_35(width: int, pooled: int) -> Block:
    return Block(
        width,
        (Step("branch1x1", 64),),
        (Step("branch5x5_1", 48), Step("branch5x5_2", 64, 5)),
        (Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, 3), Step("branch3x3dbl_3", 96, 3)),
        (mean_around, Step("branch_pool", pooled)),
    )


def _block_35_to_17(width: int) -> Block:
    return Block(
        width,
        (Step("branch3x3", 384, 3, 2),),
        (Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, 3), Step("branch3x3dbl_3", 96, 3, 2)),
        (max_halved,),
    )


def _block_17(width: int, inner: int) -> Block:
    row, column = (1, 7), (7, 1)
    return Block(
        width,
        (Step("branch1x1", 192),),
        (Step("branch7x7_1", inner), Step("branch7x7_2", inner, row), Step("branch7x7_3", 192, column)),
        (
            Step("branch7x7dbl_1", inner),
            Step("branch7x7dbl_2", inner, column),
            Step("branch7x7dbl_3", inner, row),
            Step("branch7x7dbl_4", inner, column),
            Step("branch7x7dbl_5", 192, row),
        ),
        (mean_around, Step("branch_pool", 192)),
    )


def _block_17_to_8(width: int) -> Block:
    return Block(
        width,
        (Step("branch3x3_1", 192), Step("branch3x3_2", 320, 3, 2)),
        (
            Step("branch7x7x3_1", 192),
            Step("branch7x7x3_2", 192, (1, 7)),
            Step("branch7x7x3_3", 192, (7, 1)),
            Step("branch7x7x3_4", 192, 3, 2),
        ),
        (max_halved,),
    )


def _block_8(width: int, pool: Pool) -> Block:
    row, column = (1, 3), (3, 1)
    return Block(
        width,
        (Step("branch1x1", 320),),
        (Step("branch3x3_1", 384), (Step("branch3x3_2a", 384, row), Step("branch3x3_2b", 384, column))),
        (
            Step("branch3x3dbl_1", 448),
            Step("branch3x3dbl_2", 384, 3),
            (Step("branch3x3dbl_3a", 384, row), Step("branch3x3dbl_3b", 384, column)),
        ),
        (pool, Step("branch_pool", 192)),
    )


class Inception(nn.Module):
    """Pixels (n,3,H,W) uint8, or float in [0,255] -> pool3 (n,2048). `fc` is in the file and is not used here."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = _block_35(192, pooled=32)
        self.Mixed_5c = _block_35(256, pooled=64)
        self.Mixed_5d = _block_35(288, pooled=64)
        self.Mixed_6a = _block_35_to_17(288)
        self.Mixed_6b = _block_17(768, inner=128)
        self.Mixed_6c = _block_17(768, inner=160)
        self.Mixed_6d = _block_17(768, inner=160)
        self.Mixed_6e = _block_17(768, inner=192)
        self.Mixed_7a = _block_17_to_8(768)
        self.Mixed_7b = _block_8(1280, mean_around)
        self.Mixed_7c = _block_8(2048, max_around)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.pool3(resize_as_tensorflow(pixels, SIDE).sub_(128.0).div_(128.0))

    def pool3(self, maps: torch.Tensor) -> torch.Tensor:
        """The bare network: (n,3,299,299) in [-1,1] -> (n,2048)."""
        maps = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(maps)))
        maps = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_halved(maps)))
        maps = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_halved(maps))))
        maps = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(maps)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(maps))).mean((2, 3))


def resize_as_tensorflow(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Bilinear (n,3,H,W) -> (n,3,side,side) fp32 as TensorFlow 1's `resize_bilinear`: no antialias, and pixel i of
    the result is taken at i * H / side (corners, not centres, lie on each other).

    Neighbours are gathered before anything is computed: bytes stay bytes until then, and what a large picture has
    besides is never touched."""

    def between(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale = torch.tensor(size / side, dtype=torch.float32, device=pixels.device)
        place = torch.arange(side, dtype=torch.float32, device=pixels.device) * scale
        first = place.long()
        return first, (first + 1).clamp(max=size - 1), place - first

    top, bottom, down = between(pixels.shape[2])
    left, right, along = between(pixels.shape[3])

    def lines(rows: torch.Tensor) -> torch.Tensor:
        maps = pixels.index_select(2, rows).contiguous()
        start, end = (maps.gather(3, columns.expand(*maps.shape[:3], side)).float() for columns in (left, right))
        return end.sub_(start).mul_(along).add_(start)

    upper, lower = lines(top), lines(bottom)
    return lower.sub_(upper).mul_(down[:, None]).add_(upper)


def load_inception(weights: Path | None = None, device: str | torch.device = "cpu") -> Inception:
    """The published network, fp32. `weights` is its file or a folder that holds it; without, it is looked for.

    Raises MissingError when it is nowhere, DamagedError for a file with another sha256."""
    tensors = read_weights(INCEPTION, weights)
    network = Inception()
    load_strictly(network, tensors, "Inception")
    return placed(network, device)


def placed(network: Inception, device: str | torch.device) -> Inception:
    """Moves `network` to `device`, with channels last on a CPU, where its convolutions are then faster."""
    on_cpu = torch.device(device).type == "cpu"
    layout = torch.channels_last if on_cpu else torch.contiguous_format
    return network.to(device).to(memory_format=layout)  # type: ignore[call-overload]


def inception_features(network: Inception, images: Images, batch_size: int = 32) -> NDArray[np.float32]:
    """(N, H, W, 3) uint8 -> (N, 2048) for `distances.frechet_distance` and `distances.kid`.

    Raises InvalidInputError for images of another form and for batch_size < 1."""
    return features_of(lambda part: network(beside(network, part)), images, batch_size)
