"""The classifier that measures obedience: it reads colour and shape of the inpainted region of a scene.

A small network reads a square crop around the mask, and neither the prompt nor the original. `mini train` trains it on
clean, blurred, noisy and tinted renders, and it ships with the bundle. `mini check` measures it on clean renders and
on noise.
"""

# N scenes, H W pixels; crops are 32 x 32

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from refine_control.errors import MissingError
from refine_control.metrics.image_pairs import Images, Mask
from refine_control.miniature.vocabulary import COLOURS, SHAPES
from refine_control.pixels import from_images

CROP = 32
WEIGHTS = "classifier.safetensors"


class Reading(NamedTuple):
    """Predictions of the classifier: indices into COLOURS and SHAPES, each (N,)."""

    colour: np.ndarray
    shape: np.ndarray


class Obedience(NamedTuple):
    """Whether each region has the colour and the shape of the prompt, each (N,) bool."""

    colour: np.ndarray
    shape: np.ndarray

    @property
    def both(self) -> np.ndarray:
        return self.colour & self.shape


class Classifier(nn.Module):
    """Crops (N,3,32,32) in [-1, 1] -> logits of colours (N,8) and shapes (N,6)."""

    def __init__(self, width: int = 32):
        super().__init__()
        channels = (3, width, 2 * width, 2 * width)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1),
                nn.GroupNorm(8, b),
                nn.SiLU(),
                nn.Conv2d(b, b, 3, stride=2, padding=1),
                nn.GroupNorm(8, b),
                nn.SiLU(),
            )
            for a, b in pairwise(channels)
        )
        self.hidden = nn.Linear(2 * width * 16, 64)
        self.colour, self.shape = nn.Linear(64, len(COLOURS)), nn.Linear(64, len(SHAPES))

    def features(self, crops: torch.Tensor) -> torch.Tensor:
        """The last hidden layer: (N,3,32,32) -> (N,64)."""
        for stage in self.stages:
            crops = stage(crops)
        return functional.silu(self.hidden(crops.flatten(1)))

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.features(crops)
        return self.colour(hidden), self.shape(hidden)


def region_crops(pixels: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The square around each mask, bilinear: pixels (N,3,H,W) in [-1, 1], masks (N,H,W) bool -> (N,3,32,32).

    Outside the image its border is repeated. Raises ValueError for an empty mask."""
    if not masks.flatten(1).any(1).all():
        raise ValueError("an empty mask has no region")
    height, width = masks.shape[1:]
    columns, rows = masks.any(1).float(), masks.any(2).float()
    left, right = columns.argmax(1), width - columns.flip(1).argmax(1)
    top, bottom = rows.argmax(1), height - rows.flip(1).argmax(1)
    half = torch.maximum(right - left, bottom - top).float() / 2
    centre_x, centre_y = (left + right).float() / 2, (top + bottom).float() / 2
    steps = (torch.arange(CROP) + 0.5) / CROP * 2 - 1
    x = (centre_x[:, None] + half[:, None] * steps) / width * 2 - 1
    y = (centre_y[:, None] + half[:, None] * steps) / height * 2 - 1
    grid = torch.stack([x[:, None, :].expand(-1, CROP, -1), y[:, :, None].expand(-1, -1, CROP)], -1)
    return functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def load_classifier(bundle: Path) -> Classifier:
    """Loads the classifier of a bundle. Raises MissingError if the bundle has none."""
    from safetensors.torch import load_file

    path = bundle / WEIGHTS
    if not path.is_file():
        raise MissingError(
            f"the classifier's weights are missing at {path}; train them with `refine-control mini train`"
        )
    classifier = Classifier()
    classifier.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return classifier.eval().requires_grad_(False)


def crop_batches(images: Images, masks: Mask, batch_size: int = 256) -> Iterator[torch.Tensor]:
    """Yields what the classifier reads, (B,3,32,32): images (N,H,W,3) uint8, masks (N,H,W) bool."""
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        yield region_crops(from_images(images[part]), torch.from_numpy(np.ascontiguousarray(masks[part])))


@torch.no_grad()
def read_regions(classifier: Classifier, images: Images, masks: Mask) -> Reading:
    """Reads colour and shape of each region: images (N,H,W,3) uint8, masks (N,H,W) bool."""
    logits = zip(*(classifier(crops) for crops in crop_batches(images, masks)), strict=True)
    return Reading(*(torch.cat(parts).argmax(1).numpy() for parts in logits))


def obedience(classifier: Classifier, images: Images, masks: Mask, colour: np.ndarray, shape: np.ndarray) -> Obedience:
    """Compares the regions with the colours and shapes of the prompts, (N,) indices each."""
    reading = read_regions(classifier, images, masks)
    return Obedience(reading.colour == colour, reading.shape == shape)
