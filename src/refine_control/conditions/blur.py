"""Deblurring: a photograph out of focus, as tile ControlNets are shown it."""

# H W pixels

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from refine_control.conditions.condition import Condition

RADIUS = 2.0
"""Standard deviation of the blur in 64ths of the shorter side."""


def prepare(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 -> the picture after a Gaussian blur, (H,W,3) uint8."""
    radius = RADIUS * min(image.shape[:2]) / 64
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


CONDITION = Condition("blur", "the picture out of focus", prepare=prepare, photographic=True)
