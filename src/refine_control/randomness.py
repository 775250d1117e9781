"""Randomness as a pure function of (seed, what it is for, step, slot): no global generator, no saved state.

Two forms: counter-based uniforms for vectorised worlds, and one `torch.Generator` for each slot of a batch.
The same integers give the same numbers in any process, so one integer resumes a run and 1, 2 or 4
processes draw the same batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any integers and words: `derive_seed(seed, "stage_1", "noise", step, slot)`."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on an array of uint64 counters."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniforms(seed: int, indices: np.ndarray, count: int) -> np.ndarray:
    """(N,) integer indices -> (N, count) float32 in [0, 1); row i depends on (seed, indices[i]) alone."""
    with np.errstate(over="ignore"):
        keys = _mix(np.asarray(indices, np.uint64) * _GOLDEN + np.uint64(seed & (2**64 - 1)))
        counters = keys[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        return (_mix(counters) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


def permutation(seed: int, count: int) -> np.ndarray:
    """(count,) a shuffled 0..count-1, a pure function of the seed."""
    return np.random.Generator(np.random.Philox(key=seed)).permutation(count)


def slot_normals(shape: Sequence[int], slots: Sequence[int], *parts: int | str) -> torch.Tensor:
    """Standard normals (len(slots), *shape): each slot has its own CPU generator seeded by (*parts, slot)."""
    import torch

    generator = torch.Generator()
    return torch.stack(
        [torch.randn(tuple(shape), generator=generator.manual_seed(derive_seed(*parts, slot))) for slot in slots]
    )


def slot_uniforms(slots: Sequence[int], *parts: int | str) -> torch.Tensor:
    """Uniforms (len(slots),) in [0, 1), one for each slot, a function of (*parts, slot)."""
    import torch

    values = uniforms(derive_seed(*parts), np.asarray(slots), 1)[:, 0]
    return torch.from_numpy(values.copy())
