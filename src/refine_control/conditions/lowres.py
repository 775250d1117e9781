"""Super-resolution: a photograph at a quarter of its resolution."""

# H W pixels

from __future__ import annotations

import numpy as np
from PIL import Image

from refine_control.conditions.condition import Condition

FACTOR = 4


def shrink(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 -> (ceil(H/4),ceil(W/4),3) uint8: each pixel is the mean of an area of 4 x 4."""
    return np.asarray(Image.fromarray(image).reduce(FACTOR))


def prepare(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 -> the shrunk picture, enlarged by bicubic interpolation to (H,W,3) uint8."""
    size = image.shape[1], image.shape[0]
    return np.asarray(Image.fromarray(shrink(image)).resize(size, Image.Resampling.BICUBIC))


TITLE = "the picture at a quarter of its resolution, enlarged"
CONDITION = Condition("lowres", TITLE, prepare=prepare, photographic=True)
