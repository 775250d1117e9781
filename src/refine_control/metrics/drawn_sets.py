"""Distances of many sets drawn from one pair of sets, faster than one by one.

# N images on each side, in pairs; D width of a feature
# R samples of N images each, about 0.63 N of them different; rows (R, N) are the indices of their images

Each equals `distances.one_by_one` with the distance of its name, up to rounding: a picture that was drawn k times has
weight k instead of k rows. The kernel of two pictures is the same in every drawn set, so it is computed once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refine_control.metrics.distances import CMMD_SCALE, CMMD_SIGMA, Rows, kid, kid_blocks, one_by_one, weighted_frechet
from refine_control.metrics.kernels import Features, cubic_kernel, cubic_of_itself, gaussian_kernel, kernel_sums

_COUNT_VALUES = 1 << 24  # numbers of times that pictures were drawn, held at a time: 128 MB


def frechet_of_draws(left: Features, right: Features, rows: Rows) -> NDArray[np.float64]:
    """`frechet_distance` of each drawn pair of sets, (R,): a picture drawn k times is one row of weight k, so that
    singular values are those of a U x U matrix (D x D at most)."""
    different = (np.unique(drawn, return_counts=True) for drawn in rows)
    return np.array([weighted_frechet(left[seen], counts, right[seen], counts) for seen, counts in different])


def kid_of_draws(
    left: Features, right: Features, rows: Rows, block_size: int = 1000, seed: int = 0
) -> NDArray[np.float64]:
    """The mean of `kid` of each sample, (R,).

    The kernel is computed once for all samples while the counts of images in blocks, 2 R N^2 / block_size numbers, fit
    in memory. Beyond that each sample is computed separately, linear in N."""
    blocks = kid_blocks(len(left), len(right), block_size, seed)
    if 2 * len(blocks) * rows.size > _COUNT_VALUES:
        return one_by_one(lambda a, b: kid(a, b, block_size, seed).mean, left, right, rows)

    kernel = cubic_kernel(left.shape[1])
    counts_l, counts_r = (
        np.concatenate([_counts(rows[:, places], len(left)) for places in side]) for side in zip(*blocks, strict=True)
    )

    def within(features: Features, counts: Features) -> NDArray[np.float64]:
        sizes = counts.sum(1)
        itself = counts @ cubic_of_itself(features)
        return (kernel_sums(features, counts, features, counts, kernel) - itself) / (sizes * (sizes - 1))

    across = kernel_sums(left, counts_l, right, counts_r, kernel) / (counts_l.sum(1) * counts_r.sum(1))
    values = within(left, counts_l) + within(right, counts_r) - 2.0 * across
    return values.reshape(len(blocks), len(rows)).mean(0)


def cmmd_of_draws(left: Features, right: Features, rows: Rows) -> NDArray[np.float64]:
    """`cmmd` of each drawn pair of sets, (R,)."""
    return CMMD_SCALE * gaussian_mmd_of_draws(left, right, rows, sigma=CMMD_SIGMA)


def gaussian_mmd_of_draws(left: Features, right: Features, rows: Rows, *, sigma: float) -> NDArray[np.float64]:
    """`gaussian_mmd` of each drawn pair of sets, (R,): the kernel of every two pictures is taken once for all sets."""
    kernel, counts = gaussian_kernel(sigma), _counts(rows, len(left))
    sums = [kernel_sums(a, counts, b, counts, kernel) for a, b in ((left, left), (right, right), (left, right))]
    return np.maximum(0.0, (sums[0] + sums[1] - 2.0 * sums[2]) / rows.shape[1] ** 2)


def _counts(rows: Rows, pictures: int) -> Features:
    """How often each image was drawn: (R, N) rows -> (R, pictures)."""
    return np.stack([np.bincount(drawn, minlength=pictures) for drawn in rows]).astype(np.float64)
