"""95 % bootstrap intervals of means, paired differences and ratios.

# S training seeds, N scenes (test images); values (N,) or (S, N): row s is one training run, column n one scene

All methods and seeds are evaluated on the same N scenes (crossed, not nested), so a resample draws scenes once for all
of them. All intervals are percentile intervals. With S seeds the bootstrap underestimates the spread between seeds by a
factor of sqrt((S - 1) / S) (0.82 at S = 3): intervals of few seeds are too narrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_control.errors import InvalidInputError

BOOTSTRAP_SEED = 20250922
"""Seed of every interval that a verb writes: equal numbers have equal intervals."""
_REMEMBERED_VALUES = 1 << 24  # 32 MB of counts
_CHUNK_VALUES = 1 << 21  # drawn indices held at a time; a fixed number, since the draws depend on it


class Interval(NamedTuple):
    """A mean with the ends of its confidence interval, low <= high, in the unit of the values."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True if zero lies outside [low, high]: statistically distinguishable from zero at the interval's level."""
        return self.low > 0.0 or self.high < 0.0

    @property
    def bounded(self) -> bool:
        """False for a share of a gap that is not statistically distinguishable from zero (`gap_closed`)."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    def scaled(self, factor: float) -> Interval:
        """The interval in another unit; factor > 0."""
        return Interval(*(factor * value for value in self))

    def as_json(self) -> dict[str, float | bool | None]:
        """mean, low, high and excludes_zero; an end that is infinite is None."""
        ends = {name: end if np.isfinite(end) else None for name, end in (("low", self.low), ("high", self.high))}
        return {"mean": self.mean, **ends, "excludes_zero": self.excludes_zero}

    def __format__(self, spec: str) -> str:
        """`f"{interval:.4f}"` -> `0.7505 [0.7491, 0.7519]`; the specification is each number's, `.2f` by default."""
        mean, low, high = (format(value, spec or ".2f") for value in self)
        return f"{mean} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self, "")


def two_level(values: ArrayLike, seed: int, resamples: int = 10_000, level: float = 0.95) -> Interval:
    """The mean of (S, N) values and its bootstrap interval over seeds, then scenes.

    Each resample draws S seeds, then N scenes which all of them share. With S = 1 the interval is without the spread
    between training runs. Raises InvalidInputError for values that are not (S, N), finite and of at least two scenes,
    for seed < 0, resamples < 1 and a level outside (0, 1)."""
    return _interval_of_mean(_checked("values", values, {2: "(S, N)"}), seed, resamples, level)


def paired_difference(a: ArrayLike, b: ArrayLike, seed: int, resamples: int = 10_000, level: float = 0.95) -> Interval:
    """The mean of a - b and its paired interval: both methods are resampled by the same scenes (and seeds).

    a and b are (N,) or (S, N); an (N,) one is a method without training seeds and is paired with each seed
    of the other. Raises InvalidInputError as `two_level` does, and for a different N or S."""
    left, right = _aligned({"a": a, "b": b})
    return _interval_of_mean(left - right, seed, resamples, level)


def gap_closed(
    teacher: ArrayLike,
    baseline: ArrayLike,
    ours: ArrayLike,
    seed: int,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """(ours - baseline) / (teacher - baseline) of the means: 0 at the baseline, 1 at the teacher.

    The paper's 76.5 % of PSNR is this number. All three, (N,) or (S, N), are resampled together; lower may be better.
    If the gap teacher - baseline is not statistically distinguishable from zero at this level, the ends are -inf and
    inf. Raises InvalidInputError as `paired_difference` does, and for a gap of exactly zero."""
    top, bottom, middle = _aligned({"teacher": teacher, "baseline": baseline, "ours": ours})
    gap, gain = top - bottom, middle - bottom
    if gap.mean() == 0.0:
        raise InvalidInputError("teacher and baseline have the same mean, so there is no gap to close")
    share = float(gain.mean() / gap.mean())
    gains, gaps = _resampled_means(np.stack([gain, gap]), seed, resamples)
    if not percentile_interval(float(gap.mean()), gaps, level).excludes_zero:
        return Interval(share, -np.inf, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = gains / gaps
    return percentile_interval(share, shares[np.isfinite(shares)], level)


def mean_ratio(a: ArrayLike, b: ArrayLike, seed: int, resamples: int = 10_000, level: float = 0.95) -> Interval:
    """mean(a) / mean(b), both resampled together, for values with a zero such as `image_pairs.high_pass_energy`.

    The ends are infinite where b's mean is not statistically distinguishable from zero. Raises InvalidInputError as
    `gap_closed` does, of which it is the case with the baseline 0."""
    return gap_closed(b, np.zeros(np.shape(b)[-1:]), a, seed, resamples, level)


def _checked(name: str, values: ArrayLike, shapes: dict[int, str]) -> NDArray[np.float64]:
    """As float64. `shapes`: by number of dimensions, how the error calls them."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in shapes:
        raise InvalidInputError(f"{name}: the shape is {array.shape}; give {' or '.join(shapes.values())}")
    if array.shape[-1] < 2 or array.size == 0:
        raise InvalidInputError(f"{name}: the shape is {array.shape}; an interval needs at least two scenes")
    if not np.isfinite(array).all():
        raise InvalidInputError(f"{name}: {int((~np.isfinite(array)).sum())} of {array.size} numbers are not finite")
    return array


def _aligned(named: dict[str, ArrayLike]) -> list[NDArray[np.float64]]:
    """Each as (S, N) with one S and one N; (N,) is repeated for each seed of the others."""
    arrays = {name: np.atleast_2d(_checked(name, values, {1: "(N,)", 2: "(S, N)"})) for name, values in named.items()}
    seeds = max(array.shape[0] for array in arrays.values())
    without_seeds = {name for name, values in named.items() if np.ndim(values) == 1}
    shapes = {array.shape[1:] if name in without_seeds else array.shape for name, array in arrays.items()}
    if len({shape[-1] for shape in shapes}) > 1 or len({shape for shape in shapes if len(shape) == 2}) > 1:
        described = ", ".join(f"{name} {np.shape(values)}" for name, values in named.items())
        raise InvalidInputError(f"paired values need the same scenes and seeds, in one order; got {described}")
    return [np.broadcast_to(array, (seeds, array.shape[1])) for array in arrays.values()]


def _resampled_means(values: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    """(K, S, N) -> (K, resamples) means, each over S drawn seeds and N drawn scenes, the same for all K."""
    check_seed(seed)
    if resamples < 1:
        raise InvalidInputError(f"resamples is {resamples}; give at least 1, and some thousands to trust the ends")
    quantities, seeds, scenes = values.shape
    draw = _remembered_draws if resamples * scenes <= _REMEMBERED_VALUES else _draws
    parts = [
        ((counts @ values.transpose(0, 2, 1)) * drawn_seeds).sum(-1) / scenes
        for drawn_seeds, counts in draw(seed, seeds, scenes, resamples, max(1, _CHUNK_VALUES // (quantities * scenes)))
    ]
    return np.concatenate(parts, axis=1)


def _draws(
    seed: int, seeds: int, scenes: int, resamples: int, step: int
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.uint16]]]:
    """At most `step` resamples at a time: the weight of each seed (r, S), and how often each scene is drawn (r, N)."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn_seeds = generator.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=size) / seeds
        drawn_scenes = generator.integers(scenes, size=(size, scenes)) + scenes * np.arange(size)[:, None]
        counts = np.bincount(drawn_scenes.ravel(), minlength=size * scenes)
        yield drawn_seeds, counts.reshape(size, scenes).astype(np.uint16)


@lru_cache(maxsize=8)
def _remembered_draws(*asked: int) -> tuple[tuple[NDArray[np.float64], NDArray[np.uint16]], ...]:
    """`_draws`, kept for all metrics of a table."""
    return tuple(_draws(*asked))


def check_seed(seed: int) -> None:
    """Raises InvalidInputError for seed < 0."""
    if seed < 0:
        raise InvalidInputError(f"seed is {seed}; give 0 or more")


def percentile_interval(mean: float, drawn: NDArray[np.float64], level: float, shift: float = 0.0) -> Interval:
    """`mean` with the ends that hold the share `level` of the `drawn` values, both moved by `shift`.

    Raises InvalidInputError for a level outside (0, 1)."""
    if not 0.0 < level < 1.0:
        raise InvalidInputError(f"level is {level}; give a share between 0 and 1, such as 0.95")
    low, high = np.quantile(drawn, [(1.0 - level) / 2.0, (1.0 + level) / 2.0]) + shift
    return Interval(mean, float(low), float(high))


def _interval_of_mean(values: NDArray[np.float64], seed: int, resamples: int, level: float) -> Interval:
    return _remembered_interval(values.tobytes(), values.shape, seed, resamples, level)


@lru_cache(maxsize=1024)
def _remembered_interval(data: bytes, shape: tuple[int, ...], seed: int, resamples: int, level: float) -> Interval:
    """Of (S, N) values; tables of one study share many of their rows."""
    values = np.frombuffer(data).reshape(shape)
    return percentile_interval(float(values.mean()), _resampled_means(values[None], seed, resamples)[0], level)
