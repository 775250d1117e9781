"""Depth: near is bright. The picture is given, or made by transformers' Depth-Anything (`data build --preparer`)."""

# H W pixels, h w input of the network

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

from refine_control.conditions.condition import Condition
from refine_control.conditions.networks import load_preparer

SIDE, MULTIPLE = 518, 14
"""Of Depth-Anything: a side of what it reads, and of what both sides are multiples."""
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def network_input(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """(H,W,3) uint8 -> (3,h,w) float32, as transformers' processor makes it.

    One side becomes `side`, the one that needs the smaller change; bicubic, both multiples of 14, normalised."""
    scale = min((side / length for length in image.shape[:2]), key=lambda scale: abs(1 - scale))
    h, w = (max(MULTIPLE, round(length * scale / MULTIPLE) * MULTIPLE) for length in image.shape[:2])
    resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC), np.float32)
    return ((resized / 255 - MEAN) / STD).transpose(2, 0, 1)


def picture(nearness: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h,w) of any unit -> (H,W,3) uint8: bicubic, the farthest black, the nearest white; a plane is black."""
    size = (width, height)
    whole = np.asarray(Image.fromarray(nearness.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
    span = float(np.ptp(whole)) or 1.0
    return np.repeat(np.rint((whole - whole.min()) / span * 255).astype(np.uint8)[..., None], 3, axis=2)


@cache
def depth_network(model: str) -> Callable[[np.ndarray], np.ndarray]:
    """A Depth-Anything by hub id or folder, on the GPU if there is one: (H,W,3) uint8 -> depth map (H,W,3) uint8.

    Relative models give an inverse depth; of metric ones the inverse is taken. Raises what `load_preparer` raises."""
    import torch
    from transformers import DepthAnythingForDepthEstimation

    example = "depth-anything/Depth-Anything-V2-Small-hf"
    network = load_preparer(model, DepthAnythingForDepthEstimation, "Depth-Anything", example)
    metric = network.config.depth_estimation_type == "metric"

    @torch.inference_mode()
    def prepare(image: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(network_input(image))[None].to(network.device)
        depth = network(pixel_values=pixels).predicted_depth[0].float().cpu().numpy()
        return picture(1 / np.maximum(depth, 1e-3) if metric else depth, *image.shape[:2])

    return prepare


CONDITION = Condition("depth", "a depth map, near is bright", network=depth_network, grey=True)
