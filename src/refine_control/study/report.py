"""The report: one HTML file that holds everything, opens offline and reads on a phone.

Plain data in, bytes out: equal data give equal bytes. Pictures are PNG inside the file, curves are inline
SVG, nothing is fetched and no script runs (the page's policy forbids both). `picture_grid` draws the
same pictures as one labelled PNG for a README or a paper.
"""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from refine_control import __version__
from refine_control.errors import InvalidInputError
from refine_control.picture_grid import PictureGrid, picture_cells, picture_grid, png_bytes
from refine_control.storage import write_atomic
from refine_control.study.curves import Curve, plot
from refine_control.study.tables import Table, write_tables

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ReportData:
    """Everything on the page, in its order. `facts` are N, steps, sampler, guidance, seeds, machine and command
    lines; `pictures` are grids by file name; `signatures` name the recipe, code version and hashes of inputs."""

    title: str
    summary: Sequence[str]
    facts: Mapping[str, str] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    pictures: Mapping[str, PictureGrid] = field(default_factory=dict)
    curves: Sequence[Curve] = ()
    signatures: Sequence[str] = ()


def command_line(words: Sequence[str], options: Mapping[str, object]) -> str:
    """A `refine-control` command that a shell reads as these words and options (name -> value); None is left out, a
    list or a tuple gives an option for each value."""
    lists = {name: value if isinstance(value, list | tuple) else [value] for name, value in options.items()}
    given = [
        word
        for name, each in lists.items()
        for value in each
        if value is not None
        for word in (f"--{name}", str(value))
    ]
    return shlex.join(["refine-control", *words, *given])


def publish(out: Path, data: ReportData, sentences: Sequence[str] = ()) -> str:
    """Writes tables.md (with further `sentences`), tables.tex, the picture grids and report.html; returns the first."""
    text = write_tables(out, data.tables, sentences)
    for name, grid in data.pictures.items():
        write_atomic(out / name, picture_grid(grid))
    signatures = [f"refine-control {__version__}", *data.signatures]
    write_report(out / "report.html", replace(data, signatures=signatures))
    return text


def write_report(path: Path, data: ReportData) -> None:
    """Publishes `data` as one self-contained HTML file at `path`, whole or not at all.

    Raises InvalidInputError for tables, pictures or curves that do not fit together, StorageError
    when the disk refuses."""
    write_atomic(path, render_report(data))


def render_report(data: ReportData) -> str:
    """The HTML of `write_report`; every text is escaped."""
    import jinja2

    for table in data.tables:
        for number, row in enumerate(table.rows):
            if len(row) != len(table.columns):
                cells = f"{len(row)} cells for {len(table.columns)} columns"
                raise InvalidInputError(f"row {number} of table {table.caption!r} has {cells}")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("refine_control.study", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["interval"] = _split_interval
    return environment.get_template("report.html.j2").render(
        data=data,
        tables=[(table, _numeric_columns(table), _longest_intervals(table)) for table in data.tables],
        grids=[_embedded(grid) for grid in data.pictures.values()],
        plots=[plot(curve) for curve in data.curves],
    )


def _split_interval(cell: str) -> tuple[str, str]:
    """`19.25 [19.10, 19.41]` -> (`19.25`, `[19.10, 19.41]`); any other text -> (text, "")."""
    match = re.fullmatch(r"(.*\S)\s+(\[[^\[\]]*\])", cell)
    return (match[1], match[2]) if match else (cell, "")


def _numeric_columns(table: Table) -> list[bool]:
    """True for the columns to align right: a number, perhaps with a unit, in at least half of the cells."""
    number = re.compile(r"[-+\u2212]?([.\d][\d.,]*|inf|nan)\s?\S{0,4}")
    counts = [sum(bool(number.fullmatch(_split_interval(cell)[0])) for cell in column) for column in _columns(table)]
    return [index > 0 and 2 * count >= len(table.rows) for index, count in enumerate(counts)]


def _longest_intervals(table: Table) -> list[str]:
    """For each column its longest `[low, high]`, or "": cells without one leave this much room, so that
    the numbers of a column stand under each other."""
    return [max((_split_interval(cell)[1] for cell in column), key=len, default="") for column in _columns(table)]


def _columns(table: Table) -> list[list[str]]:
    return [[row[index] for row in table.rows] for index in range(len(table.columns))]


class EmbeddedPicture(NamedTuple):
    """A picture of the page: a data URI, and its size in pixels."""

    uri: str
    size: tuple[int, int]


class EmbeddedGrid(NamedTuple):
    """A picture grid for the template; `outlined` is the name of the column with masks, if any."""

    title: str
    columns: Sequence[str]
    rows: list[tuple[list[EmbeddedPicture], str]]
    outlined: str


def _embedded(grid: PictureGrid) -> EmbeddedGrid:
    def picture(cell: Image) -> EmbeddedPicture:
        return EmbeddedPicture("data:image/png;base64," + base64.b64encode(png_bytes(cell)).decode(), cell.size)

    rows = [[picture(cell) for cell in row] for row in picture_cells(grid)]
    outlined = grid.columns[grid.outlined_column] if any(mask is not None for mask in grid.masks) else ""
    return EmbeddedGrid(grid.title, grid.columns, list(zip(rows, grid.captions, strict=True)), outlined)
