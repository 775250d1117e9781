"""torch's `randn` in numpy, so that an exported pipeline starts from the same noise as PyTorch.

Follows the CPU generator of torch (mt19937) and `normal_fill` of aten/src/ATen/native/cpu/DistributionTemplates.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from refine_control.randomness import derive_seed

_BLOCK = 16
"""From so many values on torch transforms them in blocks: 8 radii, then 8 angles."""


def slot_normals(shape: Sequence[int], slots: Sequence[int], *parts: int | str) -> np.ndarray:
    """Standard normals (len(slots), *shape) float32: those of `randomness.slot_normals` up to torch's rounding of the
    logarithm, sine and cosine, which depends on the processor (about 1e-6)."""
    return np.stack([_normals(math.prod(shape), derive_seed(*parts, slot)).reshape(shape) for slot in slots])


def _normals(count: int, seed: int) -> np.ndarray:
    """`torch.randn(count)` from a CPU generator of this seed."""
    generator = np.random.RandomState(seed & 0xFFFFFFFF)  # torch seeds its mt19937 by the low 32 bits
    if count < _BLOCK:
        return _few_normals(count, generator)
    values = _uniforms(generator, count)
    whole = count - count % _BLOCK
    values[:whole] = _box_muller(values[:whole])
    if whole < count:  # torch draws the last block again, over the end of the one before
        values[-_BLOCK:] = _box_muller(_uniforms(generator, _BLOCK))
    return values


def _raw(generator: np.random.RandomState, count: int) -> np.ndarray:
    return generator.randint(0, 1 << 32, size=count, dtype=np.uint32)


def _uniforms(generator: np.random.RandomState, count: int) -> np.ndarray:
    """(count,) float32 in [0, 1), 24 bits each."""
    return (_raw(generator, count) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """Blocks of 16 uniforms (16 n,) -> normals (16 n,): r cos(theta) in the first half of a block, r sin(theta) in the
    other. The angle is rounded to float32, as in torch; the functions are computed in float64."""
    radii, turns = np.moveaxis(uniforms.reshape(-1, 2, _BLOCK // 2), 1, 0)
    radius = np.sqrt(-2 * np.log((np.float32(1) - radii).astype(np.float64)))
    theta = (np.float32(2 * math.pi) * turns).astype(np.float64)
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], 1).astype(np.float32).ravel()


def _few_normals(count: int, generator: np.random.RandomState) -> np.ndarray:
    """Fewer than 16 values: pairs in float64 of 53 bits from two draws, the high half first."""
    high, low = _raw(generator, 4 * -(-count // 2)).astype(np.uint64).reshape(-1, 2).T
    turns, radii = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)).reshape(-1, 2).T * 2.0**-53
    radius, theta = np.sqrt(-2 * np.log1p(-radii)), 2 * math.pi * turns
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], 1).astype(np.float32).ravel()[:count]
