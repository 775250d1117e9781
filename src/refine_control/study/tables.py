"""Numbers as tables: for the report, the terminal, and whoever reads them elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refine_control.metrics.cost import ModelCost
from refine_control.metrics.image_pairs import CONVENTIONS
from refine_control.storage import write_atomic
from refine_control.study.report import Table

HEADINGS = {
    "psnr": "PSNR dB",
    "psnr_region": "PSNR region dB",
    "psnr_kept": "PSNR kept dB",
    "psnr_composited": "PSNR composited dB",
    "ssim": "SSIM",
    "ssim_region": "SSIM region",
    "ssim_composited": "SSIM composited",
    "colour": "colour obeyed %",
    "shape": "shape obeyed %",
    "both": "both obeyed %",
    "interference": "another object's %",
    "clip_local": "CLIP local",
    "clip_global": "CLIP global",
    "clip_other": "CLIP other (less)",
    "lpips": "LPIPS (less)",
    "lpips_kept": "LPIPS kept (less)",
    "fid": "FID (less)",
    "kid": "KID x 1000 (less)",
    "cmmd": "CMMD (less)",
    "scene_perceptual": "scene perceptual (less)",
    "scene_frechet": "scene Fréchet (less)",
    "scene_mmd": "scene MMD (less)",
}
"""Every metric a table can show, in the order of its columns; `(less)`: less is better."""
OBEYED = ("colour", "shape", "both")
PAPER = {"psnr": "PSNR", "ssim": "SSIM", "fid": "FID", "lpips": "LPIPS", "cmmd": "CMMD"}
"""The metrics of the paper's tables, as it calls them."""
PAPER_NOTE = "The paper's numbers are of its own test photographs and stand beside ours, not against them."
PERCENT = (*OBEYED, "interference")


def cell(values: Mapping[str, float], places: int) -> str:
    """`19.25 [19.10, 19.41]`"""
    return f"{values['mean']:.{places}f} [{values['low']:.{places}f}, {values['high']:.{places}f}]"


def digits(metric: str) -> int:
    """Decimal places that a metric is shown with."""
    return 4 if metric.startswith(("ssim", "lpips", "scene_perceptual")) else 1 if metric in PERCENT else 2


def quality_table(summary: Mapping[str, Any], notes: Sequence[str] = ()) -> Table:
    """A row for each model, a column for each metric; `notes` stand under the table after its own."""
    models = summary["models"]
    known = list(next(iter(models.values())))
    rows = [[name, *(cell(values[m], digits(m)) for m in known)] for name, values in models.items()]
    shown = [
        f"Mean and 95 % bootstrap interval over {summary['samples']} pictures. {CONVENTIONS}",
        *notes,
    ]
    return Table("Quality", ["model", *(HEADINGS[m] for m in known)], rows, shown)


def difference_table(summary: Mapping[str, Any]) -> Table:
    """A row for each pair of models."""
    pairs = summary["paired_differences"]
    known = list(next(iter(pairs.values())))
    rows = [[pair, *(cell(v[m], digits(m)) for m in known)] for pair, v in pairs.items()]
    return Table(
        "Paired differences",
        ["pair", *(HEADINGS[m] for m in known)],
        rows,
        ["On the same pictures and noise. An interval with zero inside is no evidence of a difference."],
    )


def cost_table(costs: Mapping[str, ModelCost], seconds: Mapping[str, float]) -> Table:
    """A row for each model."""
    rows = [
        [
            name,
            str(c.num_layers),
            f"{c.num_params:,}",
            f"{c.gflops_controlnet:.3f}",
            f"{c.gflops_step:.3f}",
            f"{1000 * c.step_seconds:.1f}",
            f"{1000 * seconds[name]:.0f}" if name in seconds else "",
            f"{c.peak_memory / 2**20:.0f}" if c.peak_memory else "",
        ]
        for name, c in costs.items()
    ]
    columns = ["model", "layers", "ControlNet parameters", "GFLOP ControlNet", "GFLOP a denoising step"]
    columns += ["ms a denoising step", "ms an image, sampled in batches", "peak memory MiB"]
    notes = [
        "1 multiply-add = 2 FLOP, one picture, no guidance, in the arithmetic that pictures are sampled in. Steps are "
        "timed alternately in one run (medians), those of other baselines alone; peak memory is of a fresh process "
        "that samples with this model."
    ]
    return Table("Cost", columns, rows, notes)


class BaselineWay(NamedTuple):
    """How a model of another kind painted, in words, what its denoiser weighs, and the paper's numbers of it."""

    facts: Mapping[str, str]
    denoiser_params: int
    paper: Mapping[str, float] = {}


def baseline_table(ways: Mapping[str, BaselineWay]) -> Table:
    """A row for each baseline."""
    told = [m for m in PAPER if any(m in way.paper for way in ways.values())]
    lines = [
        [
            name,
            *(way.facts[fact] for fact in ("model", "resolution", "sampler", "license")),
            f"{way.denoiser_params:,}",
            *(f"{way.paper[m]:g}" if m in way.paper else "" for m in told),
        ]
        for name, way in ways.items()
    ]
    columns = ["baseline", "model", "resolution", "sampler", "license", "denoiser parameters"]
    notes = ["The same test samples, masks and prompts as the other rows; each model is sampled in its own way."]
    notes += [PAPER_NOTE] if told else []
    return Table("Baselines", [*columns, *(f"paper's {PAPER[m]}" for m in told)], lines, notes)


_SHORT = ("model", "pair", "PSNR region dB", "PSNR dB", "SSIM", "colour obeyed %", "shape obeyed %", "both obeyed %")


def short(table: Table) -> Table:
    """Of a quality or difference table the columns that fit a terminal."""
    kept = [i for i, column in enumerate(table.columns) if column in _SHORT]
    rows = [[row[i] for i in kept] for row in table.rows]
    return Table(table.caption, [table.columns[i] for i in kept], rows, table.notes)


def text_table(table: Table) -> str:
    """The table for a terminal."""
    rows = [list(table.columns), *(list(r) for r in table.rows)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(table.columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def to_markdown(table: Table) -> str:
    """The table as GitHub reads it."""
    head = [f"### {table.caption}", "", f"| {' | '.join(table.columns)} |", "|" + "---|" * len(table.columns)]
    rows = [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join([*head, *rows, *(f"\n{note}" for note in table.notes)])


def write_tables(out: Path, tables: Sequence[Table], told: Sequence[str] = ()) -> str:
    """`tables.md`, with what else is `told`, and `tables.tex` in `out`; returns the first."""
    text = "\n\n".join([*map(to_markdown, tables), *told])
    write_atomic(out / "tables.md", text + "\n")
    write_atomic(out / "tables.tex", "\n\n".join(map(to_latex, tables)) + "\n")
    return text


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "%&_#${}"}
    | {"|": r"$|$", "<": "$<$", ">": "$>$", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    | {"\\": r"\textbackslash{}"}
)


def to_latex(table: Table) -> str:
    """The table for a paper that loads booktabs."""
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{table.caption.translate(_LATEX)}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}", r"\toprule"]
    for number, row in enumerate([table.columns, *table.rows]):
        lines.append(" & ".join(text.translate(_LATEX) for text in row) + r" \\")
        if number == 0:
            lines.append(r"\midrule")
    notes = [rf"\par\footnotesize {note.translate(_LATEX)}" for note in table.notes]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *notes, r"\end{table}"])
