"""`refine-control reproduce`: the paper's tables and figures, with seeds and intervals.

Finished rows are read from `results`; the others are trained, evaluated and written there one after the other, so the
verb may be stopped after any of them. The tables are computed again from all rows.
"""

# S seeds, N test scenes

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from refine_control.baselines.bounds import bounds_note, psnr_bounds
from refine_control.errors import InvalidInputError
from refine_control.metrics.image_pairs import Images
from refine_control.miniature.scene_shards import scene_photos
from refine_control.picture_grid import PictureGrid, repaint_grid
from refine_control.randomness import derive_seed
from refine_control.records import INPAINT, TEST
from refine_control.storage import only_writer, write_json
from refine_control.study.alignment import alignment_curves, alignment_table, teacher_alignment
from refine_control.study.alike import alike_grid, alike_table, run_alike, summarise_alike
from refine_control.study.compare import compare
from refine_control.study.curves import Curve, layer_curves, seed_curves, term_curves
from refine_control.study.materials import Bar, Comparison, prepare_data
from refine_control.study.plan import (
    ALIKE,
    FIGURE2,
    FIGURE3,
    TABLES,
    TARGETS,
    Row,
    anchor_row,
    measured_rows,
    row_recipes,
    row_seeds,
    trained_key,
)
from refine_control.study.report import ReportData, command_line, publish
from refine_control.study.row_results import RowResult, read_pictures, read_row, save_pictures
from refine_control.study.row_tables import cost_curves, findings, row_tables
from refine_control.study.runs import collect, finished, make_sampler, row_mark, row_model, train_row
from refine_control.study.signatures import prompt_signature
from refine_control.study.step_tables import step_curves, step_tables
from refine_control.study.summary import rows_json, summarise_rows
from refine_control.study.tables import Table


class Reproduced(NamedTuple):
    """The tables as text, all numbers as tables.json holds them, and the folder."""

    text: str
    summary: dict[str, object]
    folder: Path


class Plan(TypedDict):
    """What `reproduce --dry-run` shows."""

    verb: str
    budget: dict[str, object]
    rows: dict[str, str]


class _Request(NamedTuple):
    """What one call asks `collect` for, beside the rows."""

    comparison: Comparison
    seeds: Sequence[int]
    results: Path
    """Finished rows of the budget."""
    bar: Bar
    workers: int

    def collect(self, rows: Mapping[str, Row], measured: str = TABLES) -> dict[str, list[RowResult]]:
        """The rows' results."""
        measure = {"measure": run_alike} if measured == ALIKE else {}
        folder = _results(self.results, measured)
        return collect(
            rows, self.comparison, self.seeds, folder, self.bar, workers=self.workers, measured=measured, **measure
        )


def plan(
    target: str,
    comparison: Comparison,
    seeds: Sequence[int],
    rows: Sequence[str],
    results: Path,
    against: str | None = None,
) -> Plan:
    """What `reproduce` would do: for each row and seed, `finished` or `to do`. `results` are those of the budget."""
    done = {}
    for measured in (TABLES, ALIKE):
        folder = _results(results, measured)
        for key, row in measured_rows(measured, TARGETS[target], rows, against, comparison.scale).items():
            for seed in row_seeds(row, seeds):
                path = folder / f"{key}-{seed}.json"
                result = finished(path, row, comparison, seed, measured)
                done[str(path.relative_to(results).with_suffix(""))] = "finished" if result else "to do"
    for key, row in measured_rows(FIGURE3, TARGETS[target], rows, against, comparison.scale).items():
        pictures = _pictures(comparison, key, row, seeds[0])
        done[f"{FIGURE3}/{key}-{seeds[0]}"] = "to do" if pictures is None else "finished"
    return {"verb": "reproduce", "budget": comparison.budget.model_dump(mode="json"), "rows": done}


def _results(results: Path, measured: str) -> Path:
    return results if measured == TABLES else results / measured


def _absent(rows: Mapping[str, Row], comparison: Comparison, seeds: Sequence[int], folder: Path) -> dict[str, str]:
    """By key: why a baseline's row can be neither read nor run."""
    out = {}
    for key, row in rows.items():
        if row.baseline and read_row(folder / f"{key}-{seeds[0]}.json", row_mark(row, comparison, seeds[0])) is None:
            from refine_control.baselines.models import cannot_be_had

            if why := cannot_be_had(row.baseline):
                out[key] = f"{row.title} is left out: {why}."
    return out


def _pictures(comparison: Comparison, key: str, row: Row, seed: int) -> Images | None:
    """The first pictures of a row in `out`, if they have its present mark."""
    return read_pictures(comparison.out / f"{key}-{seed}", row_mark(row, comparison, seed))


def _paint(rows: Mapping[str, Row], comparison: Comparison, seed: int, bar: Bar) -> None:
    """Trains what is missing of these rows, and paints the first test pictures of each into `images.npy`."""
    missing = {key: row for key, row in rows.items() if _pictures(comparison, key, row, seed) is None}
    if not missing:
        return
    prepare_data(comparison, missing.values(), bar)
    for key, row in missing.items():
        backbone, controlnet = row_model(train_row(key, row, comparison, seed, bar), comparison)
        photos, sampler = comparison.test_photos()[:_SHOWN], make_sampler(comparison.budget, row)
        result = compare(backbone, {key: controlnet}, photos, sampler, None, bar(key))
        save_pictures(comparison.out / f"{key}-{seed}", result.images[key], row_mark(row, comparison, seed))


def _figure3(rows: Mapping[str, Row], comparison: Comparison, seed: int) -> dict[str, PictureGrid]:
    """The first test pictures beside the output of each row that ran in `out`, by its file; empty if there are none."""
    saved = {key: _pictures(comparison, key, row, seed) for key, row in rows.items()}
    painted = {key: images for key, images in saved.items() if images is not None}
    if not painted or not (comparison.shards / TEST).is_dir():
        return {}
    photos = comparison.test_photos()[: min(_SHOWN, *(len(v) for v in painted.values()))]
    return {"figure3.png": repaint_grid(photos, painted, f"Figure 3, {comparison.world}")}


_SHOWN = 12
_ALIGNMENT_SCENES = 256


@dataclass
class _Contents:
    """The parts of a report, in the order in which they are computed."""

    summary: dict[str, object]
    tables: list[Table] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    grids: dict[str, PictureGrid] = field(default_factory=dict)
    marks: list[str] = field(default_factory=list)
    """Row, seed, mark and machine of each number."""


def _bounds(comparison: Comparison) -> list[str]:
    """Lower and upper bounds of PSNR on test photographs, computed once for each `out`."""
    if comparison.rendered or not (comparison.shards / TEST).is_dir():
        return []
    path, mark = comparison.out / "bounds.json", [*comparison.mark(), comparison.budget.test]
    stored: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if stored.get("mark") != mark:
        stored = {"mark": mark, "bounds": psnr_bounds(comparison.backbone(), comparison.test_photos())}
        write_json(path, stored)
    return [bounds_note(stored["bounds"])]


def _add_tables(contents: _Contents, title: str, rows: Mapping[str, Row], against: str, request: _Request) -> None:
    comparison, seeds = request.comparison, request.seeds
    absent = _absent(rows, comparison, seeds, request.results)
    if against in absent:
        raise InvalidInputError(f"{absent[against]} Name another row with --against")
    rows = {key: row for key, row in rows.items() if key not in absent}
    results = request.collect(rows)
    summary = summarise_rows(results, against)
    contents.summary |= rows_json(summary, against)
    contents.tables += step_tables(summary, rows, comparison.budget)
    contents.tables += row_tables(summary, rows, against, comparison, title, _bounds(comparison))
    contents.marks += [
        f"{key}, seed {r.seed}: {r.mark[:16]}, {r.facts.machine}" for key, each in results.items() for r in each
    ]
    contents.absent += absent.values()
    contents.sentences += [*absent.values(), *findings(summary, rows, against, comparison.budget)]
    contents.curves += [*step_curves(summary, rows, comparison.budget), *cost_curves(summary, rows)]
    contents.curves += _loss_curves(rows, against, comparison, seeds)
    contents.grids |= _figure3(rows, comparison, seeds[0])


def _loss_curves(rows: Mapping[str, Row], against: str, comparison: Comparison, seeds: Sequence[int]) -> list[Curve]:
    """Of the rows that were trained in `out`: every term, and of the row `against` layers and seeds."""

    def runs(key: str, seed: int) -> dict[str, Path]:
        stages, trained = [name.rpartition("/")[2] for name in rows[key].stages], trained_key(key)
        return {f"{trained} {stage}": comparison.out / f"{trained}-{seed}" / stage for stage in stages}

    out = term_curves({name: run for key in rows for name, run in runs(key, seeds[0]).items()})
    for name, run in runs(against, seeds[0]).items():
        by_seed = {f"seed {seed}": runs(against, seed)[name] for seed in seeds}
        out += [*layer_curves(name, run), *seed_curves(f"Loss of {name} by seed", by_seed)]
    return out


def _add_figure2(contents: _Contents, rows: Mapping[str, Row], request: _Request) -> None:
    summary = summarise_alike(request.collect(rows, ALIKE))
    contents.summary["figure2"] = {"rows": {key: row.as_json() for key, row in summary.items()}}
    contents.tables.append(alike_table(summary, rows, request.comparison.budget))
    for key, row in summary.items():
        contents.sentences += prompt_signature(rows[key].title, row.global_minus_local)
    contents.grids |= alike_grid(rows, request.comparison, request.seeds[0])


def _add_alignment(contents: _Contents, rows: Mapping[str, Row], comparison: Comparison) -> None:
    """Of the teacher in fp32, for every count of layers that the rows have; on scenes, or on test photographs."""
    backbone, budget = comparison.backbone(), comparison.budget
    recipes = [next(iter(row_recipes(row, budget, 0).values())) for row in rows.values() if row.stages]
    layers = sorted({recipe.student.num_layers for recipe in recipes}, reverse=True)
    if comparison.rendered:
        photos = list(scene_photos(derive_seed(budget.data_seed or 0, "alignment"), 0, _ALIGNMENT_SCENES))
    else:
        photos = comparison.test_photos()[:_ALIGNMENT_SCENES]
    aligned = teacher_alignment(backbone, backbone.pipeline.controlnet, photos, layers)
    numbers = {"power": aligned.power.tolist(), "cosine": aligned.cosine.tolist()}
    contents.summary["alignment"] = numbers | {"errors": aligned.errors, "outputs": aligned.outputs}
    contents.tables.append(alignment_table(aligned))
    contents.curves += alignment_curves(aligned)


def _command(target: str, request: _Request, rows: Sequence[str], against: str | None) -> str:
    """The command line of this call."""
    comparison, results = request.comparison, request.results
    options: dict[str, object] = {"scale": comparison.scale, "budget": results.name, "seeds": len(request.seeds)}
    options |= {"row": list(rows), "against": against}
    options |= {name: getattr(comparison, name) for name in ("model", "teacher", "photos", "data", "weights", "out")}
    if comparison.condition != INPAINT:
        options |= {"condition": comparison.condition, "budget": results.parent.name}
        results = results.parent
    return command_line(["reproduce", target], {**options, "results": results.parent})


def reproduce(
    target: str,
    comparison: Comparison,
    *,
    seeds: Sequence[int] | None = None,
    rows: Sequence[str] = (),
    against: str | None = None,
    results: Path,
    bar: Bar,
    workers: int = 1,
) -> Reproduced:
    """Runs the missing rows of a target, then writes `tables.md`, `tables.tex`, `tables.json` and `report.html`.

    `target` is one of TARGETS; `seeds` are the budget's by default; differences are to the row `against`, by default
    the anchor row of target or scale; finished rows are files under `results`. Raises InvalidInputError for a target
    that the data or the scale cannot have, and what the verbs raise."""
    chosen, wished, scale = seeds or comparison.budget.train_seeds, TARGETS[target], comparison.scale
    if wished.figure == FIGURE2 and not comparison.rendered:
        raise InvalidInputError(
            "Figure 2 needs the oracle, which reads rendered scenes alone; name a table or ablation"
        )
    contents = _Contents({"budget": comparison.budget.model_dump(mode="json")})
    request = _Request(comparison, chosen, results, bar, workers)
    with only_writer(comparison.out):
        if table_rows := measured_rows(TABLES, wished, rows, against, scale):
            anchor = anchor_row(wished, rows, against, scale)
            _add_tables(contents, wished.title, table_rows, anchor, request)
        if alike_rows := measured_rows(ALIKE, wished, rows, against, scale):
            _add_figure2(contents, alike_rows, request)
        if shown := measured_rows(FIGURE3, wished, rows, against, scale):
            _paint(shown, comparison, chosen[0], bar)
            contents.grids |= _figure3(shown, comparison, chosen[0])
        if "layers" in wished.studies:
            _add_alignment(contents, table_rows, comparison)
        facts = {"budget": results.name, "results": str(results)}
        facts["command"] = _command(target, request, rows, against)
        return _write(contents, f"{wished.title} on {comparison.world}", comparison.out, facts)


def _write(contents: _Contents, title: str, out: Path, facts: Mapping[str, str]) -> Reproduced:
    pictures = [f"{name}: {out / name}" for name in contents.grids] if not contents.tables else []
    shown = (contents.tables, contents.grids, contents.curves, contents.marks)
    text = publish(out, ReportData(title, contents.sentences, facts, *shown), [*contents.absent, *pictures])
    write_json(out / "tables.json", contents.summary)
    return Reproduced(text, contents.summary, out)
