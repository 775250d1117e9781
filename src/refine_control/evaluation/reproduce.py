"""`refine-control reproduce`: the paper's tables on the mini model, with seeds and intervals.

Rows that are finished are read from `results`, the others are trained and evaluated one after the other and written
there; so it may be killed after any of them. The tables are made again from all rows that are there.
"""

# S seeds, N test scenes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_control.comparison import Budget, Row, read_rows, row_recipes
from refine_control.data.scene_shards import scene_photos
from refine_control.errors import InvalidInputError
from refine_control.evaluation.alignment import Alignment, alignment_curves, alignment_table, teacher_alignment
from refine_control.evaluation.alike import (
    MARK,
    PROMPTS,
    alike_grid,
    alike_table,
    run_alike,
    summarise_alike,
)
from refine_control.evaluation.collect import collect, seeds_of
from refine_control.evaluation.curves import Curve
from refine_control.evaluation.evaluate import read_test
from refine_control.evaluation.pictures import PictureGrid, picture_grid
from refine_control.evaluation.report import ReportData, Table, write_report
from refine_control.evaluation.row_tables import (
    BASELINE,
    REFERENCE,
    TEACHER,
    cost_curves,
    findings,
    summarise,
    tables_of,
)
from refine_control.evaluation.rows import SHARDS, TABLES, Bar, Comparison, RowResult, read_row, row_mark
from refine_control.evaluation.signatures import prompt_signature
from refine_control.evaluation.tables import to_latex, to_markdown
from refine_control.models.loading import load_backbone
from refine_control.randomness import derive_seed
from refine_control.storage import only_writer, write_atomic, write_json


class Target(NamedTuple):
    """What one call of `reproduce` makes."""

    title: str
    tables: tuple[int, ...] = ()
    studies: tuple[str, ...] = ()
    alike: bool = False
    """Figure 2."""


TARGETS = {
    "table1": Target("Table 1", tables=(1,)),
    "table2": Target("Table 2", tables=(2,)),
    "table3": Target("Table 3", tables=(3,)),
    "figure2": Target("Figure 2", alike=True),
    "layers": Target("Students of 2 to 23 layers", studies=("layers",)),
    "split": Target("Steps of stage 1 against stage 2", studies=("split",)),
    "init": Target("Where the student starts", studies=("init",)),
    "losses": Target("Weights of the terms, and what stage 2 noises", studies=("losses",)),
    "all": Target("Tables 1 and 3, Figure 2", tables=(1, 3), alike=True),
}
"""By the word of the command line."""


class Reproduced(NamedTuple):
    """The tables as text, all numbers, and where they lie."""

    text: str
    summary: dict[str, Any]
    folder: Path


def rows_of(target: Target, named: Sequence[str] = (), against: str = REFERENCE) -> dict[str, Row]:
    """The rows of a target, or those named alone; always with teacher, fc and the row to hold them `against`.

    Raises InvalidInputError for a row that does not exist."""
    rows = read_rows()
    unknown = sorted({*named, against} - set(rows))
    if unknown:
        raise InvalidInputError(f"there is no row {unknown[0]}; the rows are {', '.join(rows)}")
    wanted = {TEACHER, BASELINE, against, *named}
    return {k: r for k, r in rows.items() if k in wanted or (not named and _belongs(r, target))}


def _belongs(row: Row, target: Target) -> bool:
    return bool(set(row.tables) & set(target.tables) or set(row.studies) & set(target.studies))


def plan(
    target: str, comparison: Comparison, seeds: Sequence[int], rows: Sequence[str], results: Path
) -> dict[str, Any]:
    """What `reproduce` would do: for each row and seed, `finished` or `to do`. `results` are those of the budget."""
    done = {}
    for measured in (TABLES, MARK):
        folder = _results(results, measured)
        for key, row in _rows_measured(measured, target, rows).items():
            for seed in seeds_of(row, seeds):
                path = folder / f"{key}-{seed}.json"
                had = read_row(path, row_mark(row, comparison, seed, measured))
                done[str(path.relative_to(results).with_suffix(""))] = "finished" if had else "to do"
    return {"verb": "reproduce", "budget": comparison.budget.model_dump(mode="json"), "rows": done}


def _results(results: Path, measured: str) -> Path:
    return results if measured == TABLES else results / measured


def _rows_measured(measured: str, target: str, named: Sequence[str], against: str = REFERENCE) -> dict[str, Row]:
    """The rows that a target measures for its tables, or for Figure 2."""
    made = TARGETS[target]
    if measured == TABLES:
        return rows_of(made, named, against) if made.tables or made.studies else {}
    shown = rows_of(Target(made.title, studies=("figure2",)), named, against) if made.alike else {}
    return {key: row for key, row in shown.items() if not row.baseline}


def _absent(rows: Mapping[str, Row], comparison: Comparison, seeds: Sequence[int], folder: Path) -> dict[str, str]:
    """By key: why a baseline's row can neither be read nor made."""
    out = {}
    for key, row in rows.items():
        if row.baseline and read_row(folder / f"{key}-{seeds[0]}.json", row_mark(row, comparison, seeds[0])) is None:
            from refine_control.models.baselines import cannot_be_had

            if why := cannot_be_had(row.baseline):
                out[key] = f"{row.title} is left out: {why}."
    return out


def _pictures(found: Mapping[str, Sequence[RowResult]], out: Path) -> PictureGrid | None:
    """Figure 3: the first test scenes beside what each row made of them, of the rows that ran in `out`."""
    painted = {key: out / f"{key}-{results[0].seed}" / "images.npy" for key, results in found.items()}
    painted = {k: np.load(p) for k, p in painted.items() if p.is_file()}
    if not painted or not (out / SHARDS / "test").is_dir():
        return None
    photos = read_test(out / SHARDS / "test")[: min(12, *(len(v) for v in painted.values()))]
    lines = [
        [p.image, np.where(p.mask[..., None], 0, p.image).astype(np.uint8), *(v[i] for v in painted.values())]
        for i, p in enumerate(photos)
    ]
    masks = [p.mask for p in photos]
    columns, captions = ["original", "masked", *painted], [p.prompt for p in photos]
    return PictureGrid(columns, lines, captions, masks, title="Figure 3, mini model")


_ALIGNMENT_SCENES = 256


def _alignment(comparison: Comparison, rows: Mapping[str, Row]) -> Alignment:
    """Of the teacher in fp32, for every count of layers that the rows have; on scenes, or on test photographs."""
    backbone, budget = load_backbone(comparison.model), comparison.budget
    recipes = [next(iter(row_recipes(row, budget, {}, 0).values())) for row in rows.values() if row.stages]
    layers = sorted({recipe.student.num_layers for recipe in recipes}, reverse=True)
    seed = derive_seed(budget.data_seed, "alignment")
    photos = list(scene_photos(seed, 0, _ALIGNMENT_SCENES))
    if comparison.photos:
        photos = read_test(comparison.out / SHARDS / "test")[:_ALIGNMENT_SCENES]
    return teacher_alignment(backbone, backbone.pipeline.controlnet, photos, layers)


def _alike_grid(budget: Budget, out: Path) -> PictureGrid | None:
    """Figure 2's pictures, of the rows that ran in `out`."""
    painted = {}
    for key in (TEACHER, REFERENCE, "ours", BASELINE):
        paths = {kind: out / f"{key}-0" / f"alike_{kind}.npy" for kind in PROMPTS}
        if all(path.is_file() for path in paths.values()):
            painted[key] = {kind: np.load(path) for kind, path in paths.items()}
    return alike_grid(budget, painted) if painted else None


def reproduce(
    target: str,
    comparison: Comparison,
    *,
    seeds: Sequence[int] | None = None,
    rows: Sequence[str] = (),
    against: str = REFERENCE,
    results: Path,
    bar: Bar,
    workers: int = 1,
) -> Reproduced:
    """Makes what is missing of a target's rows, then `tables.md`, `tables.tex`, `tables.json`, `report.html`.

    `target` is one of TARGETS; `seeds` are the budget's own by default; differences are to the row `against`; finished
    rows are files under `results`. Raises InvalidInputError for a target that photographs cannot have, and what the
    verbs raise."""
    numbers, out = comparison.budget, comparison.out
    chosen = seeds or numbers.train_seeds
    if comparison.photos and TARGETS[target].alike:
        raise InvalidInputError(
            "Figure 2 needs the oracle, which reads rendered scenes alone; name a table or ablation"
        )
    summary: dict[str, Any] = {"budget": numbers.model_dump(mode="json")}
    made: list[Table] = []
    told: list[str] = []
    absent: dict[str, str] = {}
    grids: dict[str, PictureGrid | None] = {}
    curves: list[Curve] = []
    with only_writer(out):
        if table_rows := _rows_measured(TABLES, target, rows, against):
            absent = _absent(table_rows, comparison, chosen, _results(results, TABLES))
            table_rows = {key: row for key, row in table_rows.items() if key not in absent}
            told += absent.values()
            found = collect(table_rows, comparison, chosen, _results(results, TABLES), bar, workers=workers)
            summary |= summarise(found, against)
            made += tables_of(summary, table_rows, numbers, TARGETS[target].title)
            told += findings(summary, table_rows)
            curves += cost_curves(summary, table_rows)
            grids["figure3.png"] = _pictures(found, out)
        if alike_rows := _rows_measured(MARK, target, rows, against):
            how: dict[str, Any] = {"workers": workers, "measure": run_alike, "measured": MARK}
            found = collect(alike_rows, comparison, chosen, _results(results, MARK), bar, **how)
            summary["figure2"] = summarise_alike(found)
            made.append(alike_table(summary["figure2"], alike_rows, numbers))
            for key, row in summary["figure2"]["rows"].items():
                told += prompt_signature(alike_rows[key].title, row["global_minus_local"])
            grids["figure2.png"] = _alike_grid(numbers, out)
        if "layers" in TARGETS[target].studies:
            aligned = _alignment(comparison, table_rows)
            summary["alignment"] = {
                "power": aligned.power.tolist(),
                "cosine": aligned.cosine.tolist(),
                "errors": aligned.errors,
            }
            made.append(alignment_table(aligned, _ALIGNMENT_SCENES))
            curves += alignment_curves(aligned)
        text = "\n\n".join([*map(to_markdown, made), *absent.values()])
        write_atomic(out / "tables.md", text + "\n")
        write_atomic(out / "tables.tex", "\n\n".join(map(to_latex, made)) + "\n")
        write_json(out / "tables.json", summary)
        drawn = {name: grid for name, grid in grids.items() if grid}
        for name, grid in drawn.items():
            write_atomic(out / name, picture_grid(grid))
        command = f"refine-control reproduce {target} --budget {results.name} --seeds {len(chosen)}"
        command += "".join(f" --row {row}" for row in rows) + (f" --against {against}" if against != REFERENCE else "")
        facts = {"budget": results.name, "results": str(results), "command": command}
        title = TARGETS[target].title + (" on small photographs" if comparison.photos else " on the mini model")
        write_report(out / "report.html", ReportData(title, told, facts, made, list(drawn.values()), curves))
    return Reproduced(text, summary, out)
