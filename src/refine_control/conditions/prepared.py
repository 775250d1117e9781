"""What preparations of condition pictures share."""

# H W pixels

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from refine_control.errors import MissingError

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Rec. 601."""


def grey(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 -> luminance (H,W) float32 in [0, 1]."""
    return image.astype(np.float32) @ _LUMA / 255


def library(module: str, package: str, condition: str) -> Any:
    """An optional library. Raises MissingError that names what to install."""
    try:
        return import_module(module)
    except ImportError:
        raise MissingError(
            f"the condition {condition} is prepared by {package}, which is not installed; install "
            "refine-control[data], or give the condition pictures"
        ) from None
