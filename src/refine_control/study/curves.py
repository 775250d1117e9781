"""Loss curves: a training log read back, and the geometry of its plot for the report's inline SVG.

# series: name -> (steps, values), both (n,); on the page x and y run from 0 to 1000, y downwards
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refine_control.errors import DamagedError, InvalidInputError

Series = tuple[NDArray[np.int64], NDArray[np.float64]]

EXTENT = 1000.0
_PALETTE = 8  # --c0 .. --c7 in report.html.j2; more lines than these get one ramp of hues
_SMOOTHED_FROM, _SMOOTHED_SERIES = 150, 4  # a bold mean for noisy lines from so many points, among so few lines
_DRAWN_POINTS = 800
_DOTTED_TO = 12


@dataclass(frozen=True)
class Curve:
    """Lines over training steps, or over what `x_label` says.

    Values that are not finite, or not positive under `log_y`, are left out; a note says how many."""

    title: str
    series: Mapping[str, tuple[Any, Any]]
    log_y: bool = False
    x_label: str = "step"


class Line(NamedTuple):
    """One line on the page: SVG points of the values and, for a long one, of their running mean ("" otherwise); the
    path of its dots, for one of a few measured points."""

    name: str
    color: str
    points: str
    mean_points: str
    last: str
    dots: str = ""


class Tick(NamedTuple):
    """A grid line `at` per cent from the left or from the bottom."""

    at: float
    label: str


class Plot(NamedTuple):
    """What the template draws."""

    title: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    notes: list[str]
    x_label: str = "step"


def read_metrics_jsonl(path: Path) -> dict[str, Series]:
    """A training log, one JSON object with "step" a line, as name -> (steps int64, values float64), steps rising.

    A step that a resumed run wrote again counts once, with its later values; a last line cut short by a kill
    is left out; NaN and infinity are kept. Raises InvalidInputError without a file, DamagedError with the
    line number for any other line that is not an object with an integer step."""
    if not path.is_file():
        raise InvalidInputError(f"there is no training log at {path}; name the metrics.jsonl of a run")
    found: dict[str, dict[int, float]] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = record.pop("step")
            if type(step) is not int:
                raise TypeError(step)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise DamagedError(
                f"line {number} of {path} is not a JSON object with an integer step; "
                "remove the line, or make the log again by the run's own command"
            ) from error
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, {})[step] = float(value)
    return {
        name: (np.array(sorted(points), dtype=np.int64), np.array([points[step] for step in sorted(points)]))
        for name, points in found.items()
    }


def plot(curve: Curve) -> Plot:
    """The geometry of one plot. Raises InvalidInputError for steps and values that are not (n,) of one length."""
    series, dropped = {}, 0
    for name, (raw_steps, raw_values) in curve.series.items():
        steps, values = np.asarray(raw_steps, dtype=np.float64), np.asarray(raw_values, dtype=np.float64)
        if steps.ndim != 1 or steps.shape != values.shape:
            raise InvalidInputError(
                f"series {name!r} of curve {curve.title!r} has steps {steps.shape} and values {values.shape}; "
                "give two lists of one length"
            )
        kept = np.isfinite(values) & np.isfinite(steps) & ((values > 0) | (not curve.log_y))
        dropped += int((~kept).sum())
        if kept.any():
            series[name] = (steps[kept], values[kept])
    notes = [f"{dropped} values that cannot be drawn are left out."] if dropped else []
    if not series:
        return Plot(curve.title, [], [], [], [*notes, "There is nothing to draw yet."], curve.x_label)
    x_low, x_high = _widened(*_range([steps for steps, _ in series.values()]))
    y_low, y_high, y_ticks = _y_axis(*_range([values for _, values in series.values()]), curve.log_y)
    smoothed = {name for name, (_, values) in series.items() if len(series) <= _SMOOTHED_SERIES and _is_noisy(values)}
    if smoothed:
        notes.append("Thin: every logged value. Bold: the mean over 2 % of the run.")

    def points(steps: NDArray[np.float64], values: NDArray[np.float64]) -> str:
        heights = np.log10(values) if curve.log_y else values
        x = (steps - x_low) / (x_high - x_low) * EXTENT
        y = (y_high - heights) / (y_high - y_low) * EXTENT
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))

    lines = []
    for index, (name, (steps, values)) in enumerate(series.items()):
        means = _running_mean(values) if name in smoothed else None
        lines.append(
            Line(
                name,
                _color(index, len(series)),
                points(*_thinned(steps, values)),
                "" if means is None else points(*_thinned(steps, means)),
                f"{(values if means is None else means)[-1]:.4g}",
                _dots(points(steps, values)) if len(values) <= _DOTTED_TO else "",
            )
        )
    x_ticks = [Tick(100 * (x - x_low) / (x_high - x_low), _label(x)) for x in _round_steps(x_low, x_high, 5)]
    return Plot(curve.title, lines, x_ticks, y_ticks, notes, curve.x_label)


def _dots(points: str) -> str:
    """Strokes of no length, which the page draws as round dots however wide the plot is."""
    return " ".join(f"M {point.replace(',', ' ')} h 0" for point in points.split())


def _color(index: int, count: int) -> str:
    if count <= _PALETTE:
        return f"var(--c{index})"
    return f"oklch(0.64 0.16 {20 + 260 * index / (count - 1):.0f})"


def _range(arrays: list[NDArray[np.float64]]) -> tuple[float, float]:
    return min(float(array.min()) for array in arrays), max(float(array.max()) for array in arrays)


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range of one value gets some room on both sides."""
    room = 0.0 if high > low else abs(low) * 0.1 or 1.0
    return low - room, high + room


def _y_axis(low: float, high: float, log_y: bool) -> tuple[float, float, list[Tick]]:
    """(bottom, top, ticks); bottom and top are powers of ten's exponents under `log_y`."""
    if log_y:
        bottom, top = _widened(math.log10(low), math.log10(high))
        bottom, top = bottom - 0.04 * (top - bottom), top + 0.04 * (top - bottom)
        values = _log_steps(bottom, top)
        return bottom, top, [Tick(100 * (math.log10(v) - bottom) / (top - bottom), _label(v)) for v in values]
    bottom, top = _widened(low, high)
    room = 0.04 * (top - bottom)
    bottom, top = (0.0 if 0.0 <= low < 0.3 * high else bottom - room), top + room
    return bottom, top, [Tick(100 * (v - bottom) / (top - bottom), _label(v)) for v in _round_steps(bottom, top, 5)]


def _round_steps(low: float, high: float, wanted: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about `wanted` of them."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_steps(bottom: float, top: float) -> list[float]:
    """Powers of ten; with their 2 and 5 where those are fewer than three; round numbers within one decade."""
    exponents = range(math.floor(bottom), math.ceil(top) + 1)
    for multiples in ((1,), (1, 2, 5)):
        found = [m * 10.0**e for e in exponents for m in multiples if bottom <= math.log10(m * 10.0**e) <= top]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 7)]
    return [value for value in _round_steps(10.0**bottom, 10.0**top, 4) if value > 0]


def _label(value: float) -> str:
    if value == 0:
        return "0"
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and value % size == 0):
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def _is_noisy(values: NDArray[np.float64]) -> bool:
    """Long, and turning at more than a tenth of its points; a learning rate is not."""
    slopes = np.diff(values)
    return len(values) >= _SMOOTHED_FROM and float((slopes[1:] * slopes[:-1] < 0).mean()) > 0.1


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of a centred window of 2 % of the points; shorter at both ends."""
    half = max(1, len(values) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _thinned(
    steps: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most _DRAWN_POINTS + 2 points: both ends, and of each stretch the lowest and the highest, so that no
    spike is lost."""
    if len(values) <= _DRAWN_POINTS:
        return steps, values
    edges = np.linspace(0, len(values), _DRAWN_POINTS // 2 + 1).astype(int)
    kept = {0, len(values) - 1}
    for start, end in itertools.pairwise(edges):
        kept |= {start + int(values[start:end].argmin()), start + int(values[start:end].argmax())}
    chosen = sorted(kept)
    return steps[chosen], values[chosen]
