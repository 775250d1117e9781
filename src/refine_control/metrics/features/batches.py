"""Runs a network over images in batches."""

# N pictures, H W pixels, n pictures of a batch

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from refine_control.errors import InvalidInputError
from refine_control.metrics.image_pairs import Images, check_set


def slices(count: int, batch_size: int) -> Iterator[slice]:
    """0 to `count` in steps. Raises InvalidInputError for batch_size < 1."""
    if batch_size < 1:
        raise InvalidInputError(f"batch_size is {batch_size}; give at least 1")
    return (slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size))


def beside(network: nn.Module, images: Images) -> torch.Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) uint8 on the network's device; the channels stay last in memory."""
    device = next(network.parameters()).device
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)


def to_pixels(images: Images, network: nn.Module) -> torch.Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) float32 in [0, 255], on the network's device."""
    return beside(network, images).float()


@contextmanager
def in_full_precision() -> Iterator[None]:
    """No gradients, and fp32 convolutions on a GPU too: cuDNN would round its inputs to the ten bits of TF32."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@in_full_precision()
def features_of(compute: Callable[[Images], torch.Tensor], images: Images, batch_size: int) -> NDArray[np.float32]:
    """`compute` of each batch, (n, D), in one array (N, D). Raises InvalidInputError as `check_set` does."""
    check_set(images, "the")
    parts = [compute(images[part]).float().cpu().numpy() for part in slices(len(images), batch_size)]
    return np.concatenate(parts)
