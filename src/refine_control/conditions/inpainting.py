"""The inpainting condition: a photograph with a hole, as the 17 channels that the ControlNet reads."""

# B batch, H W pixels, h w latents

from __future__ import annotations

import torch
from torch import nn


def masked_pixels(pixel_values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Pixels (B,3,H,W) in [-1, 1] with the hole set to -1; mask (B,1,H,W), 1 = inpaint."""
    return torch.where(mask > 0.5, -1.0, pixel_values)


def control_cond(masked_latents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B,16,h,w) and mask (B,1,H,W) or (B,1,h,w), 1 = inpaint -> (B,17,h,w) = cat(masked_latents, 1 - mask).

    The one place where the mask is inverted: the 17th channel is 1 where the picture is kept. The mask
    is resized to the latents by nearest neighbour, as the pipeline does."""
    small = mask_at_latents(mask, masked_latents)
    return torch.cat([masked_latents, 1 - small], dim=1)


def mask_at_latents(mask: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Mask (B,1,H,W) -> (B,1,h,w) in the type of `latents`, nearest neighbour, 1 = inpaint."""
    return nn.functional.interpolate(mask.to(latents.dtype), size=latents.shape[-2:])
