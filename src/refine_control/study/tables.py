"""A table as a record, and its text for a terminal, markdown and LaTeX; `report` renders the HTML.

Written here and not by tabulate, which pads every cell to the width of its column (these tables would change in every
line when one number does) and leaves %, & and _ of captions and notes to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refine_control.storage import write_atomic


@dataclass(frozen=True)
class Table:
    """`rows` have as many cells as `columns`; the first cell names the row. A cell like `19.25 [19.10, 19.41]` is a
    mean with its interval. `notes` are sentences under the table."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


_SHORT = ("model", "pair", "PSNR region dB", "PSNR dB", "SSIM", "colour obeyed %", "shape obeyed %", "both obeyed %")


def short(table: Table) -> Table:
    """The columns of a quality or difference table that fit a terminal."""
    kept = [i for i, column in enumerate(table.columns) if column in _SHORT]
    rows = [[row[i] for i in kept] for row in table.rows]
    return Table(table.caption, [table.columns[i] for i in kept], rows, table.notes)


def text_table(table: Table) -> str:
    """The table for a terminal."""
    rows = [list(table.columns), *(list(r) for r in table.rows)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(table.columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def markdown_rows(table: Table) -> str:
    """Head and rows of the table in GitHub's markdown, without caption and notes."""
    lines = [f"| {' | '.join(table.columns)} |", "|" + "---|" * len(table.columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in table.rows)])


def to_markdown(table: Table) -> str:
    """The table in GitHub's markdown with its caption and notes."""
    return "\n".join([f"### {table.caption}", "", markdown_rows(table), *(f"\n{note}" for note in table.notes)])


def write_tables(out: Path, tables: Sequence[Table], sentences: Sequence[str] = ()) -> str:
    """Writes `tables.md`, with further `sentences`, and `tables.tex` in `out`; returns the first."""
    text = "\n\n".join([*map(to_markdown, tables), *sentences])
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
