"""LPIPS v0.1 with AlexNet: the distance of two images in the features of five layers, weighted by learned heads.

The trunk is torchvision's AlexNet (its `features`), the heads are the published ones. Pixels are in [-1, 1].
"""

# n pairs of a batch, H W pixels, C channels of a layer

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from refine_control.errors import InvalidInputError
from refine_control.metrics.features.batches import in_full_precision, slices, to_pixels
from refine_control.metrics.features.weights import ALEXNET, LPIPS_HEADS, load_strictly, read_weights
from refine_control.metrics.image_pairs import Images, PerImage, check_images

LAYERS = {0: (64, 11), 3: (192, 5), 6: (384, 3), 8: (256, 3), 10: (256, 3)}
"""Of each convolution by its number in the file: channels and kernel. A ReLU follows each; 3 and 6 pool before."""
POOLED = (3, 6)
CLASSIFIER = {
    f"classifier.{number}.{kind}": shape if kind == "weight" else shape[:1]
    for number, shape in ((1, (4096, 256 * 6 * 6)), (4, (4096, 4096)), (6, (1000, 4096)))
    for kind in ("weight", "bias")
}
"""The file's other weights, which LPIPS does not use: shapes by name."""
SMALLEST = 31
"""Minimum pixels of a side, below which the second pooling has no input."""

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10


class Lpips(nn.Module):
    """Pixels (n,3,H,W) in [-1,1], twice -> (n,). Names are those of the two published files."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self):
        super().__init__()
        widths = [3, *(channels for channels, _ in LAYERS.values())]
        self.features = nn.ModuleDict()
        for (width, channels), (number, (_, kernel)) in zip(pairwise(widths), LAYERS.items(), strict=True):
            first = number == 0
            stride, padding = (4, 2) if first else (1, kernel // 2)
            self.features[str(number)] = nn.Conv2d(width, channels, kernel, stride=stride, padding=padding)
        for layer, (channels, _) in enumerate(LAYERS.values()):
            head = nn.ModuleDict({"1": nn.Conv2d(channels, 1, 1, bias=False)})
            self.add_module(f"lin{layer}", nn.ModuleDict({"model": head}))
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)

    def layers(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """The maps (n,C,h,w) after each ReLU, each position of length 1 over its channels."""
        maps, features = (pixels - self.shift) / self.scale, []
        for number, convolution in self.features.items():
            if int(number) in POOLED:
                maps = functional.max_pool2d(maps, 3, stride=2)
            maps = functional.relu(convolution(maps))
            features.append(maps / (maps.square().sum(1, keepdim=True).sqrt() + EPSILON))
        return features

    def forward(self, reference: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.layers(reference), self.layers(generated), strict=True)
        distances = [
            self.get_submodule(f"lin{layer}.model.1")((a - b).square()).mean((1, 2, 3))
            for layer, (a, b) in enumerate(pairs)
        ]
        return torch.stack(distances).sum(0)


def assemble(trunk: Mapping[str, torch.Tensor], heads: Mapping[str, torch.Tensor]) -> Lpips:
    """LPIPS from the tensors of its two files. Raises InvalidInputError unless they are those two, whole."""
    network = Lpips()
    for name, shape in CLASSIFIER.items():
        if name not in trunk or trunk[name].shape != shape:
            raise InvalidInputError(f"the weights of AlexNet lack {name} with shape {shape}; use the published file")
    load_strictly(network, {**{k: v for k, v in trunk.items() if k not in CLASSIFIER}, **heads}, "LPIPS")
    return network


def load_lpips(trunk: Path | None = None, heads: Path | None = None, device: str | torch.device = "cpu") -> Lpips:
    """The published network, fp32. `trunk` and `heads` are its files or folders; without, they are looked for.

    Raises MissingError when one is nowhere, DamagedError for a file with another sha256."""
    return assemble(read_weights(ALEXNET, trunk), read_weights(LPIPS_HEADS, heads)).to(device)


@in_full_precision()
def lpips(network: Lpips, reference: Images, generated: Images, batch_size: int = 32) -> PerImage:
    """LPIPS of each pair, (N,) float64: 0 for equal pictures, about 0.1 to 0.7 for different ones.

    Raises InvalidInputError as `metrics.psnr` does, for pictures below 31 x 31 and for batch_size < 1."""
    check_images(reference, generated)
    count, height, width, _ = reference.shape
    if min(height, width) < SMALLEST:
        raise InvalidInputError(
            f"LPIPS needs images of at least {SMALLEST} x {SMALLEST} pixels; these are {width} x {height}"
        )
    distances = np.empty(count)
    for part in slices(count, batch_size):
        pixels = (to_pixels(images[part], network) / 127.5 - 1.0 for images in (reference, generated))
        distances[part] = network(*pixels).cpu().numpy()
    return distances
