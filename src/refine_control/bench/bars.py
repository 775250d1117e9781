"""Times of a benchmark as bars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from refine_control.metrics.cost import Spread


def draw_bars(file: Path, title: str, bars: Mapping[str, Spread]) -> None:
    """Writes medians with their 5th and 95th percentiles, one bar a name, in the format of the file's ending."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.34 * len(bars)), layout="constrained")
    axes, names = figure.add_subplot(), list(bars)
    medians = [bars[name].median for name in names]
    errors = [[max(0.0, s.median - s.low) for s in bars.values()], [max(0.0, s.high - s.median) for s in bars.values()]]
    drawn = axes.barh(names, medians, xerr=errors, color="#4c78a8", ecolor="#888888", capsize=2)
    axes.bar_label(drawn, [f"{median:.3g}" for median in medians], padding=4)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title)
    figure.savefig(file)
