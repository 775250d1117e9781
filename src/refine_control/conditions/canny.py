"""Edges of a photograph by Canny's detector."""

# H W pixels

from __future__ import annotations

import numpy as np

from refine_control.conditions.condition import Condition
from refine_control.errors import MissingError

SIGMA, LOW, HIGH = 1.0, 0.1, 0.2
"""Standard deviation of the blur in pixels; thresholds of the gradient's length, for grey values in [0, 1]."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Rec. 601."""


def edges(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 -> (H,W) bool, by scikit-image. Raises MissingError where it is not installed."""
    try:
        from skimage import feature
    except ImportError:
        raise MissingError(
            "the condition canny needs scikit-image; install it with `pip install 'refine-control[data]'`, or give the "
            "condition pictures"
        ) from None
    return feature.canny(image.astype(np.float32) @ _LUMA / 255, SIGMA, LOW, HIGH)


def prepare(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 -> white edges on black, (H,W,3) uint8."""
    return np.repeat(edges(image)[..., None] * np.uint8(255), 3, axis=2)


CONDITION = Condition("canny", "white edges on black, by Canny's detector", prepare=prepare, grey=True)
