"""What one call of `reproduce` makes: the tables and figures of the paper and the ablations, by the rows of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from refine_control.errors import InvalidInputError
from refine_control.study.alike import MARK
from refine_control.study.comparison import Row, Scale, read_rows, reference_of
from refine_control.study.row_tables import BASELINE, TEACHER
from refine_control.study.rows import TABLES

FIGURE2, FIGURE3 = "figure2", "figure3"


class Target(NamedTuple):
    """Which rows a target measures for its tables (those of `tables` and `studies`), and which figure it draws."""

    title: str
    tables: tuple[int, ...] = ()
    studies: tuple[str, ...] = ()
    figure: str = ""
    """FIGURE2 or FIGURE3, whose rows are those of the study of this name."""
    against: str = ""
    """The row that its tables hold the others against; the scale's reference where nothing is said."""


TARGETS = {
    "table1": Target("Table 1", tables=(1,)),
    "table2": Target("Table 2", tables=(2,)),
    "table3": Target("Table 3", tables=(3,)),
    FIGURE2: Target("Figure 2", figure=FIGURE2),
    FIGURE3: Target("Figure 3", figure=FIGURE3),
    "layers": Target("Students of 2 to 23 layers", studies=("layers",)),
    "split": Target("Steps of stage 1 against stage 2", studies=("split",)),
    "init": Target("Where the student starts", studies=("init",)),
    "losses": Target("Weights of the terms", studies=("losses",)),
    "data": Target("How much of the data, and how good", studies=("data",)),
    "prompts": Target("Prompts of stage 2", studies=("prompts",)),
    "scarce": Target("Table 3 with ten labelled scenes", studies=("scarce",), against="labeled_1"),
    "parts": Target("Table 3 of the balanced recipe", studies=("parts",), against="balanced"),
    "all": Target("Tables 1 and 3, Figure 2", tables=(1, 3), figure=FIGURE2),
}
"""By the word of the command line."""


def held_against(target: Target, named: Sequence[str] = (), against: str | None = None, scale: Scale = "mini") -> str:
    """The key of the row that a target's tables hold the others against: the one asked for, its own, the scale's.

    The teacher where all rows `named` are of models that nobody trains here."""
    if against:
        return against
    rows = read_rows(scale)
    return TEACHER if _untrained(named, rows) else target.against or reference_of(rows)


def _untrained(named: Sequence[str], rows: Mapping[str, Row]) -> bool:
    return bool(named) and not any(rows[key].stages for key in named if key in rows)


def rows_of(
    target: Target, named: Sequence[str] = (), against: str | None = None, scale: Scale = "mini"
) -> dict[str, Row]:
    """The rows of a target's tables, or those named alone, with the teacher and the row to hold them `against`; with
    fc too, unless no row named is trained.

    Raises InvalidInputError for a row that does not exist, and for a target that the scale has no rows of."""
    rows = read_rows(scale)
    for study in target.studies:
        if not any(study in row.studies for row in rows.values()):
            raise InvalidInputError(f"there are no rows of {study} at the scale {scale}; write them into its rows.yaml")
    against = held_against(target, named, against, scale)
    unknown = sorted({*named, against} - set(rows))
    if unknown:
        raise InvalidInputError(f"there is no row {unknown[0]}; the rows are {', '.join(rows)}")
    wanted = {TEACHER, against, *named} | (set() if _untrained(named, rows) else {BASELINE})
    return {k: r for k, r in rows.items() if k in wanted or (not named and _belongs(r, target))}


def _belongs(row: Row, target: Target) -> bool:
    return bool(set(row.tables) & set(target.tables) or set(row.studies) & set(target.studies))


def measured_rows(
    measured: str, target: Target, named: Sequence[str] = (), against: str | None = None, scale: Scale = "mini"
) -> Mapping[str, Row]:
    """The rows that a target measures for its tables (TABLES) or for Figure 2 (MARK), and those of Figure 3."""
    if measured == TABLES:
        return rows_of(target, named, against, scale) if target.tables or target.studies else {}
    if target.figure != {MARK: FIGURE2, FIGURE3: FIGURE3}[measured]:
        return {}
    shown = rows_of(Target(target.title, studies=(target.figure,)), named, against, scale)
    return {key: row for key, row in shown.items() if not row.baseline}
