"""Pictures as people keep them, and as SD3's autoencoder takes and gives them."""

# B pictures, H W pixels

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray


def from_images(images: NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    if isinstance(images, np.ndarray):  # copied where nobody may write it: torch takes no such array
        images = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> NDArray[np.uint8]:
    """(B, 3, H, W) of any float type and device, in [-1, 1] or clipped to it -> (B, H, W, 3) uint8, rounded."""
    unit = (pixels.detach().float().cpu() / 2 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
