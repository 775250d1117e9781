"""Fréchet distance, KID and CMMD between two sets of images; pure functions of features, reference before generated.

# N reference images, M generated ones, D width of a feature; features (N, D) and (M, D), any float type
# R bootstrap samples of N images each; rows (R, N) are the indices of their images

All sums are float64. A distance of sets has no value for each picture, so `statistics` has no interval for it;
`drawn_distance` and `set_interval` resample pictures, the same ones for every model.

The time of the Fréchet distance is linear in N from D images on, and that of KID from two blocks on. CMMD, as
published, is a mean over all pairs of images. `drawn_sets` has the same distances for many bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_control.errors import InvalidInputError
from refine_control.metrics.kernels import Features, cubic_kernel, cubic_of_itself, gaussian_kernel, kernel_sum
from refine_control.metrics.statistics import Interval, check_seed, percentile_interval

Rows = NDArray[np.integer]
Distance = Callable[[Features, Features], float]
OfDraws = Callable[[Features, Features, Rows], NDArray[np.float64]]
"""A distance of each pair of sets (R,) that `rows` (R, N) draw from both sides."""

INCEPTION_WIDTH = 2048
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0

_QR_ROWS = 4096


class BlockEstimate(NamedTuple):
    """The mean over disjoint blocks of images, and its standard error."""

    mean: float
    standard_error: float | None
    """Of the mean, from the spread between blocks; None for one block, whose error is unknown."""
    blocks: int


class SetScore(NamedTuple):
    """A distance between the reference and one model's images."""

    value: float
    drawn: NDArray[np.float64]
    """(R,) the same for R bootstrap samples of N images."""


def frechet_distance(reference: ArrayLike, generated: ArrayLike) -> float:
    """|m_r - m_g|^2 + tr C_r + tr C_g - 2 tr (C_r C_g)^(1/2), of means and covariances (over N - 1).

    FID when the features are Inception's. With C = R^T R the last trace is the sum of the singular values of
    R_r R_g^T; R are the centred features, or for N > D their QR. No covariance is formed, so that N < D, where C is
    singular, loses no digits. Raises InvalidInputError for features that are not (N, D), differ in D, hold fewer than
    two pictures or are not finite."""
    left, right = check_features(reference, generated, minimum=2)
    return weighted_frechet(left, np.ones(len(left)), right, np.ones(len(right)))


def kid(reference: ArrayLike, generated: ArrayLike, block_size: int = 1000, seed: int = 0) -> BlockEstimate:
    """The unbiased squared MMD with the kernel (x . y / D + 1)^3, mean over disjoint blocks.

    Both sets are shuffled separately and cut into as many blocks as the smaller fills with `block_size` pictures (or
    one block of all); none is left out. For equal independent sets its expectation is zero at every N; sets in pairs
    lower it by about 1/N. Raises InvalidInputError as `frechet_distance` does, and for block_size < 2 or seed < 0."""
    left, right = check_features(reference, generated, minimum=2)
    blocks = kid_blocks(len(left), len(right), block_size, seed)
    values = np.array([_unbiased_mmd(left[a], right[b]) for a, b in blocks])
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return BlockEstimate(float(values.mean()), error, len(values))


def cmmd(reference: ArrayLike, generated: ArrayLike) -> float:
    """1000 times the squared MMD with a Gaussian kernel of sigma 10, of L2-normalised CLIP features.

    The biased estimator, as published. On features of length 1 the kernel is almost linear: with d the difference of
    the means, the value lies between 9.90 d^2 and 9.90 d^2 + 0.1, where 9.90 = 10 exp(-1/100).
    Raises InvalidInputError for features that are not (N, D), differ in D, are none or are not finite."""
    return CMMD_SCALE * gaussian_mmd(reference, generated, CMMD_SIGMA)


def gaussian_mmd(reference: ArrayLike, generated: ArrayLike, sigma: float) -> float:
    """The squared MMD with the kernel exp(-|x - y|^2 / (2 sigma^2)), biased estimator: 0 for equal sets, else above.

    Raises InvalidInputError as `cmmd` does, and for sigma <= 0."""
    left, right = check_features(reference, generated, minimum=1)
    kernel = gaussian_kernel(sigma)
    within = kernel_sum(left, left, kernel) / len(left) ** 2 + kernel_sum(right, right, kernel) / len(right) ** 2
    return max(0.0, within - 2.0 * kernel_sum(left, right, kernel) / (len(left) * len(right)))


def drawn_distance(
    distance: Distance,
    reference: ArrayLike,
    generated: ArrayLike,
    seed: int,
    resamples: int = 200,
    of_draws: OfDraws | None = None,
) -> SetScore:
    """A distance of two paired sets, and the same for `resamples` bootstrap samples of them.

    Row i of both arrays belongs to picture i. The draws are a pure function of N and `seed`, so models measured in
    different runs or on different machines have the same drawn pictures and can be paired. `of_draws` computes the
    distances of all drawn sets faster than one by one (`drawn_sets`).
    Raises InvalidInputError as `distance` does, for another number of pictures than the reference's, seed < 0 and
    resamples < 2."""
    if resamples < 2:
        raise InvalidInputError(f"resamples is {resamples}; give at least 2, and hundreds to trust the ends")
    check_seed(seed)
    draws = np.random.default_rng(seed)
    left, right = check_features(reference, generated, minimum=2)
    if len(left) != len(right):
        raise InvalidInputError(
            f"{len(right)} pictures are compared with a reference of {len(left)}; pictures are drawn in pairs, so "
            "give as many of each, in one order"
        )
    rows = np.stack([draws.integers(len(left), size=len(left)) for _ in range(resamples)])
    drawn = of_draws(left, right, rows) if of_draws else one_by_one(distance, left, right, rows)
    return SetScore(distance(left, right), drawn)


def set_interval(scores: Sequence[SetScore], seed: int, level: float = 0.95) -> Interval:
    """The mean over training seeds of a distance, with its two-level interval: seeds, then pictures.

    Drawn sets repeat pictures, so their distances are larger than that of the sets themselves: the interval is that of
    the drawn values shifted by (value - their mean). It is the spread at this N. The bias of a distance at this N
    (`bias_note`) remains in it, and mostly cancels in a difference.
    Raises InvalidInputError for no scores, for other numbers of draws, and for a level outside (0, 1)."""
    counts = {len(score.drawn) for score in scores}
    if len(counts) != 1:
        raise InvalidInputError(f"scores of {sorted(counts)} draws; give at least one, all of one number of draws")
    check_seed(seed)
    values, drawn = np.array([s.value for s in scores]), np.stack([s.drawn for s in scores])
    shares = np.random.default_rng(seed).multinomial(
        len(scores), np.full(len(scores), 1 / len(scores)), size=drawn.shape[1]
    )
    means = (shares / len(scores) * drawn.T).sum(1)
    return percentile_interval(float(values.mean()), means - means.mean(), level, shift=values.mean())


def set_difference(a: Sequence[SetScore], b: Sequence[SetScore], seed: int, level: float = 0.95) -> Interval:
    """`set_interval` of a - b, paired by picture and training seed; a single score is paired with every seed.

    Raises InvalidInputError as `set_interval` does, and for numbers of seeds that do not pair."""
    count = max(len(a), len(b))
    if {len(a), len(b)} - {1, count}:
        raise InvalidInputError(f"{len(a)} and {len(b)} training seeds cannot be paired; give equally many, or one")
    pairs = zip(list(a) * (count // len(a)), list(b) * (count // len(b)), strict=True)
    return set_interval([SetScore(x.value - y.value, x.drawn - y.drawn) for x, y in pairs], seed, level)


def bias_note(n: int, width: int = INCEPTION_WIDTH) -> str:
    """The note under a table with a Frechet distance over `n` pictures in `width` features."""
    if n < width:
        return (
            f"Frechet distance over {n} pictures in {width} features: with fewer pictures than features it is biased "
            "upward by much, and comparable only between models at this same number of pictures."
        )
    return f"Frechet distance over {n} pictures: biased upward in the order of 1/N; compare at equal N only."


def check_features(reference: ArrayLike, generated: ArrayLike, minimum: int = 1) -> tuple[Features, Features]:
    """Both as float64.

    Raises InvalidInputError unless they are (N, D) and (M, D), finite, and of `minimum` pictures each."""
    arrays = []
    for name, values in (("reference", reference), ("generated", generated)):
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 2 or array.shape[1] == 0:
            raise InvalidInputError(f"{name} features have shape {array.shape}; give (pictures, features)")
        if len(array) < minimum:
            raise InvalidInputError(
                f"{name} features: this distance needs at least {minimum} pictures, not {len(array)}"
            )
        bad = int((~np.isfinite(array)).sum())
        if bad:
            raise InvalidInputError(f"{name} features: {bad} of {array.size} numbers are not finite")
        arrays.append(array)
    left, right = arrays
    if left.shape[1] != right.shape[1]:
        raise InvalidInputError(
            f"reference features have width {left.shape[1]} and generated ones {right.shape[1]}; take both from one "
            "network"
        )
    return left, right


def one_by_one(distance: Distance, left: Features, right: Features, rows: Rows) -> NDArray[np.float64]:
    """`distance` of each drawn pair of sets, (R,)."""
    return np.array([distance(left[drawn], right[drawn]) for drawn in rows])


def weighted_frechet(left: Features, left_counts: NDArray, right: Features, right_counts: NDArray) -> float:
    """`frechet_distance` of sets in which row i occurs `counts[i]` times, at the cost of one row."""
    mean_l, root_l = _mean_and_root(left, left_counts)
    mean_r, root_r = _mean_and_root(right, right_counts)
    cross = np.linalg.svd(root_l @ root_r.T, compute_uv=False).sum()
    traces = np.square(root_l).sum() + np.square(root_r).sum()
    return max(0.0, float(np.square(mean_l - mean_r).sum() + traces - 2.0 * cross))


def _mean_and_root(features: Features, counts: NDArray) -> tuple[Features, Features]:
    """The mean (D,) and R (at most D rows) with R^T R the covariance, of a set in which row i occurs `counts[i]` times.

    More than D rows are processed in chunks."""
    pictures, width = counts.sum(), features.shape[1]
    mean = counts @ features / pictures
    weights, scale = np.sqrt(counts)[:, None], np.sqrt(pictures - 1)
    if len(features) <= width:
        return mean, (features - mean) * weights / scale
    root = np.empty((0, width))
    for start in range(0, len(features), _QR_ROWS):
        part = slice(start, start + _QR_ROWS)
        root = np.linalg.qr(np.concatenate([root, (features[part] - mean) * weights[part]]), mode="r")
    return mean, root / scale


def kid_blocks(left: int, right: int, block_size: int, seed: int) -> list[tuple[Rows, Rows]]:
    """Indices of the images of each block on both sides, disjoint and shuffled independently; none is omitted."""
    if block_size < 2:
        raise InvalidInputError(f"block_size is {block_size}; give at least 2")
    check_seed(seed)
    shuffle = np.random.default_rng(seed)
    blocks = max(1, min(left, right) // block_size)
    sides = [np.array_split(shuffle.permutation(count), blocks) for count in (left, right)]
    return list(zip(*sides, strict=True))


def _unbiased_mmd(left: Features, right: Features) -> float:
    kernel = cubic_kernel(left.shape[1])

    def within(features: Features) -> float:
        itself = cubic_of_itself(features).sum()
        return (kernel_sum(features, features, kernel) - itself) / (len(features) * (len(features) - 1))

    across = kernel_sum(left, right, kernel) / (len(left) * len(right))
    return float(within(left) + within(right) - 2.0 * across)
