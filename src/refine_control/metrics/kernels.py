"""Sums of kernels over pairs of images, computed by blocks of rows so that the matrix is never in memory as a whole.

# N pictures on one side, M on the other, D width of a feature, R drawn sets; a kernel is (N, D), (M, D) -> (N, M)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from refine_control.errors import InvalidInputError

Features = NDArray[np.float64]
Kernel = Callable[[Features, Features], Features]

_CHUNK_VALUES = 1 << 21  # kernel values held at a time: 16 MB


def gaussian_kernel(sigma: float) -> Kernel:
    """exp(-|x - y|^2 / (2 sigma^2)) - 1. The 1 cancels in an MMD; without it no small difference of numbers near 1 is
    formed. Raises InvalidInputError for sigma <= 0."""
    if not sigma > 0:
        raise InvalidInputError(f"sigma is {sigma}; give a width above 0")

    def kernel(rows: Features, columns: Features) -> Features:
        squares = np.square(rows).sum(1)[:, None] + np.square(columns).sum(1) - 2.0 * rows @ columns.T
        return np.expm1(np.maximum(squares, 0.0) / (-2.0 * sigma**2))

    return kernel


def cubic_kernel(width: int) -> Kernel:
    """(x . y / D + 1)^3."""

    def kernel(rows: Features, columns: Features) -> Features:
        values = rows @ columns.T / width + 1.0
        return values * values * values  # ten times as fast as ** 3

    return kernel


def cubic_of_itself(features: Features) -> NDArray[np.float64]:
    """The cubic kernel of each image with itself, (N,)."""
    return (np.square(features).sum(1) / features.shape[1] + 1.0) ** 3


def _kernel_chunks(rows: Features, columns: Features, kernel: Kernel) -> Iterator[tuple[slice, Features]]:
    """Blocks of rows of the kernel matrix."""
    step = max(1, _CHUNK_VALUES // len(columns))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        yield part, kernel(rows[part], columns)


def kernel_sum(rows: Features, columns: Features, kernel: Kernel) -> float:
    """The sum over all pairs of a row and a column."""
    return float(sum(values.sum() for _, values in _kernel_chunks(rows, columns, kernel)))


def kernel_sums(
    rows: Features, row_counts: Features, columns: Features, column_counts: Features, kernel: Kernel
) -> NDArray[np.float64]:
    """The same for each bootstrap sample, (R,): sum over i, j of row_counts[r, i] kernel[i, j] column_counts[r, j]."""
    out = np.zeros(len(row_counts))
    for part, values in _kernel_chunks(rows, columns, kernel):
        out += np.einsum("ri,ri->r", row_counts[:, part], column_counts @ values.T)
    return out
