"""Training logs read back, their curves, and curves drawn by matplotlib as SVG for the report.

# series: name -> (steps, values), both (n,)
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refine_control.errors import DamagedError, InvalidInputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[NDArray[np.int64], NDArray[np.float64]]
Points = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]

PALETTE = ("#2f6fde", "#d9600f", "#16906a", "#b5379f", "#8a6a00", "#0f8aa8", "#c3303c", "#6a55d6")
"""Colours of up to eight lines: --c0 to --c7 of report.html.j2, which has others for a dark page."""
SOFT, LINE = "#5b6372", "#e3e4e8"
"""Labels and grid: --soft and --line of report.html.j2."""
_SMOOTHED_FROM, _SMOOTHED_SERIES = 150, 4  # a mean is drawn for noisy lines from so many points, among so few lines
_DOTTED_TO = 12
LOG = "metrics.jsonl"
TERMS = {
    "task_loss": "Task loss, Eq. 3",
    "output_loss": "Output loss, Eq. 4",
    "feature_loss": "Feature loss, Eq. 5",
    "data_loss": "Data loss, few steps",
    "consistency_loss": "Consistency loss, few steps",
}


@dataclass(frozen=True)
class Curve:
    """Lines over training steps, or over what `x_label` says.

    Values that are not finite, or not positive under `log_y`, are left out; a note says how many."""

    title: str
    series: Mapping[str, tuple[Any, Any]]
    log_y: bool = False
    x_label: str = "step"


class Line(NamedTuple):
    """An entry of the legend."""

    name: str
    color: str
    last: str
    """The last value, of the running mean if there is one."""


class Plot(NamedTuple):
    """What the page shows of a curve. Titles and names are in the page's HTML; the SVG holds axes and lines alone."""

    title: str
    svg: str
    """Inline SVG with the page's colours; empty without values."""
    lines: list[Line]
    notes: list[str]
    x_label: str = "step"


def read_metrics_jsonl(path: Path) -> dict[str, Series]:
    """A training log, one JSON object with "step" a line, as name -> (steps int64, values float64), steps rising.

    A step that a resumed run wrote again counts once, with its later values; a last line cut short by a kill
    is left out; NaN and infinity are kept. Raises InvalidInputError without a file, DamagedError with the
    line number for any other line that is not an object with an integer step."""
    if not path.is_file():
        raise InvalidInputError(f"there is no training log at {path}; name the metrics.jsonl of a run")
    by_name: dict[str, dict[int, float]] = {}
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
                "remove the line, or write the log again with the run's command"
            ) from error
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                by_name.setdefault(name, {})[step] = float(value)
    return {
        name: (np.array(sorted(points), dtype=np.int64), np.array([points[step] for step in sorted(points)]))
        for name, points in by_name.items()
    }


def _logs(runs: Mapping[str, Path]) -> dict[str, dict[str, Series]]:
    return {name: read_metrics_jsonl(folder / LOG) for name, folder in runs.items() if (folder / LOG).is_file()}


def term_curves(runs: Mapping[str, Path]) -> list[Curve]:
    """A plot for each term with a line for each run (a folder by its name) that has it.

    Runs without a log are left out."""
    logs = _logs(runs)
    out = []
    for term, title in TERMS.items():
        lines = {name: log[term] for name, log in logs.items() if term in log and log[term][1].any()}
        out += [Curve(title, lines, log_y=True)] if lines else []
    return out


def layer_curves(name: str, run: Path) -> list[Curve]:
    """The feature term of each student layer of one run, where it has one."""
    log = _logs({name: run}).get(name, {}).items()
    layers = {key.split("/")[1]: line for key, line in log if key.startswith("feature_losses/")}
    return [Curve(f"Feature loss by student layer, {name}", layers, log_y=True)] if layers else []


def seed_curves(title: str, runs: Mapping[str, Path]) -> list[Curve]:
    """The whole loss of the same stage for each seed, where there are several: how stable training is."""
    logs = {name: log["loss"] for name, log in _logs(runs).items() if "loss" in log}
    return [Curve(title, logs, log_y=True)] if len(logs) > 1 else []


def plot(curve: Curve) -> Plot:
    """One plot for the page; equal curves give equal text.

    Raises InvalidInputError for steps and values that are not (n,) of one length."""
    series, dropped = _drawable(curve)
    notes = [f"{dropped} values that cannot be drawn are left out."] if dropped else []
    if not series:
        return Plot(curve.title, "", [], [*notes, "There is nothing to draw yet."], curve.x_label)
    means = _means(series)
    notes += ["Thin: every logged value. Bold: the mean over 2 % of the run."] if means else []
    lines = [
        Line(name, _themed(color), f"{means.get(name, values)[-1]:.4g}")
        for (name, (_, values)), color in zip(series.items(), _colors(len(series)), strict=True)
    ]
    return Plot(curve.title, _inline_svg(draw(curve)), lines, notes, curve.x_label)


def draw(curve: Curve) -> Figure:
    """The lines of a curve that can be drawn, each with its running mean or its dots, on axes that hold them all."""
    from matplotlib.figure import Figure

    series, _ = _drawable(curve)
    means, count = _means(series), len(series)
    figure = Figure(figsize=(4.2, 2.5))
    axes = figure.add_axes((0.105, 0.09, 0.875, 0.87))
    for (name, (steps, values)), color in zip(series.items(), _colors(count), strict=True):
        noisy = name in means
        dots = "o" if len(values) <= _DOTTED_TO else None
        axes.plot(steps, values, color=color, lw=0.6 if noisy else 1, alpha=0.35 if noisy else 1, marker=dots, ms=3)
        if noisy:
            axes.plot(steps, means[name], color=color, lw=1.2)
    _style(axes, curve.log_y)
    return figure


def _drawable(curve: Curve) -> tuple[Points, int]:
    """The points of each line that can be drawn, without empty lines, and how many cannot."""
    series, dropped = {}, 0
    for name, (raw_steps, raw_values) in curve.series.items():
        steps, values = np.asarray(raw_steps, dtype=np.float64), np.asarray(raw_values, dtype=np.float64)
        if steps.ndim != 1 or steps.shape != values.shape:
            shapes = f"steps {steps.shape} and values {values.shape}; give two lists of one length"
            raise InvalidInputError(f"series {name!r} of curve {curve.title!r} has {shapes}")
        kept = np.isfinite(values) & np.isfinite(steps) & ((values > 0) | (not curve.log_y))
        dropped += int((~kept).sum())
        if kept.any():
            series[name] = (steps[kept], values[kept])
    return series, dropped


def _colors(count: int) -> list[str]:
    """The palette, or a ramp for more lines than it has colours."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["rainbow"](index / (count - 1))) for index in range(count)]


def _style(axes: Axes, log_y: bool) -> None:
    """Limits, ticks and a light grid without a frame."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        decades = np.log10(high / low)
        subs = (1,) if decades >= 3 else (1, 2, 5)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8) if decades >= 1 else MaxNLocator(4))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        low, high = axes.dataLim.intervaly
        axes.set_ylim(bottom=0 if 0 <= low < 0.3 * high else None)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _label(value)))
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=7.5, labelcolor=SOFT)
    axes.spines[:].set_visible(False)
    for line in axes.lines:
        line.set_clip_on(False)


def _inline_svg(figure: Figure) -> str:
    """SVG for an HTML page: text as text, the page's colours, nothing that names another document."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "refine-control", "path.simplify_threshold": 0.4}
    with rc_context(settings):
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r' clip-path="[^"]*"|<clipPath.*?</clipPath>|font-family: [^;]*; ', "", svg, flags=re.DOTALL)
    svg = re.sub(r"(?<=\d\.\d\d)\d+(?= )", "", svg)  # hundredths of a pixel are enough for a path
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| id="(figure|axes|patch|matplotlib|line2d|text|x?y?tick)[^"]*"', "", svg)
    return _themed(svg[svg.index("<svg") :])


def _themed(text: str) -> str:
    """Colours of this module as variables of the page."""
    for color, name in [*((color, f"c{index}") for index, color in enumerate(PALETTE)), (SOFT, "soft"), (LINE, "line")]:
        text = text.replace(color, f"var(--{name})")
    return text


def _label(value: float) -> str:
    value = float(f"{value:.6g}")
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and value % size == 0):
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def _means(series: Points) -> dict[str, NDArray[np.float64]]:
    """Running means of the noisy lines, if there are few lines."""
    few = len(series) <= _SMOOTHED_SERIES
    return {name: _running_mean(values) for name, (_, values) in series.items() if few and _is_noisy(values)}


def _is_noisy(values: NDArray[np.float64]) -> bool:
    """Long, and turning at more than a tenth of its points; a learning rate is not."""
    slopes = np.diff(values)
    return len(values) >= _SMOOTHED_FROM and float((slopes[1:] * slopes[:-1] < 0).mean()) > 0.1


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of a centred window of 2 % of the points; shorter at both ends."""
    window = np.ones(2 * max(1, len(values) // 100) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
