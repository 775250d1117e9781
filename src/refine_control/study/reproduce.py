"""`refine-control reproduce`: the paper's tables and figures, with seeds and intervals.

Rows that are finished are read from `results`, the others are trained and evaluated one after the other and written
there; so it may be killed after any of them. The tables are made again from all rows that are there.
"""

# S seeds, N test scenes

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_control import __version__
from refine_control.baselines.bounds import bounds_note, psnr_bounds
from refine_control.errors import InvalidInputError
from refine_control.metrics.image_pairs import Images
from refine_control.miniature.scene_shards import scene_photos
from refine_control.picture_grid import PictureGrid, picture_grid
from refine_control.randomness import derive_seed
from refine_control.records import TEST
from refine_control.storage import only_writer, write_atomic, write_json
from refine_control.study.alignment import Alignment, alignment_curves, alignment_table, teacher_alignment
from refine_control.study.alike import MARK, alike_grid, alike_table, run_alike, summarise_alike
from refine_control.study.collect import collect, seeds_of
from refine_control.study.compare import compare
from refine_control.study.comparison import Row, row_recipes
from refine_control.study.curves import Curve
from refine_control.study.loss_curves import layer_curves, seed_curves, term_curves
from refine_control.study.materials import Bar, Comparison, prepare_data
from refine_control.study.report import ReportData, Table, write_report
from refine_control.study.row_results import read_pictures, read_row, save_pictures
from refine_control.study.row_tables import cost_curves, findings, summarise, tables_of
from refine_control.study.rows import TABLES, finished, row_mark, row_model, sampler_of, train_row
from refine_control.study.signatures import prompt_signature
from refine_control.study.tables import write_tables
from refine_control.study.targets import FIGURE2, FIGURE3, TARGETS, held_against, measured_rows


class Reproduced(NamedTuple):
    """The tables as text, all numbers, and where they lie."""

    text: str
    summary: dict[str, Any]
    folder: Path


def plan(
    target: str,
    comparison: Comparison,
    seeds: Sequence[int],
    rows: Sequence[str],
    results: Path,
    against: str | None = None,
) -> dict[str, Any]:
    """What `reproduce` would do: for each row and seed, `finished` or `to do`. `results` are those of the budget."""
    done = {}
    for measured in (TABLES, MARK):
        folder = _results(results, measured)
        for key, row in measured_rows(measured, TARGETS[target], rows, against, comparison.scale).items():
            for seed in seeds_of(row, seeds):
                path = folder / f"{key}-{seed}.json"
                had = finished(path, row, comparison, seed, measured)
                done[str(path.relative_to(results).with_suffix(""))] = "finished" if had else "to do"
    for key, row in measured_rows(FIGURE3, TARGETS[target], rows, against, comparison.scale).items():
        had = _pictures(comparison, key, row, seeds[0])
        done[f"{FIGURE3}/{key}-{seeds[0]}"] = "to do" if had is None else "finished"
    return {"verb": "reproduce", "budget": comparison.budget.model_dump(mode="json"), "rows": done}


def _results(results: Path, measured: str) -> Path:
    return results if measured == TABLES else results / measured


def _absent(rows: Mapping[str, Row], comparison: Comparison, seeds: Sequence[int], folder: Path) -> dict[str, str]:
    """By key: why a baseline's row can neither be read nor made."""
    out = {}
    for key, row in rows.items():
        if row.baseline and read_row(folder / f"{key}-{seeds[0]}.json", row_mark(row, comparison, seeds[0])) is None:
            from refine_control.baselines.models import cannot_be_had

            if why := cannot_be_had(row.baseline):
                out[key] = f"{row.title} is left out: {why}."
    return out


def _pictures(comparison: Comparison, key: str, row: Row, seed: int) -> Images | None:
    """The first pictures of a row, where they were painted in `out` by what it says today."""
    return read_pictures(comparison.out / f"{key}-{seed}", row_mark(row, comparison, seed))


def _paint(rows: Mapping[str, Row], comparison: Comparison, seed: int, bar: Bar) -> None:
    """Trains what is missing of these rows, and paints the first test pictures of each into `images.npy`."""
    missing = {key: row for key, row in rows.items() if _pictures(comparison, key, row, seed) is None}
    if not missing:
        return
    prepare_data(comparison, missing.values(), bar)
    photos = comparison.test_photos()[:_SHOWN]
    for key, row in missing.items():
        trained = train_row(key, row, comparison, seed, bar)
        backbone, controlnet = row_model(trained, comparison)
        result = compare(backbone, {key: controlnet}, photos, sampler_of(comparison.budget, row), None, bar(key))
        mark = row_mark(row, comparison, seed)
        save_pictures(comparison.out / f"{key}-{seed}", result.images[key], mark)


def _figure3(rows: Mapping[str, Row], comparison: Comparison, seed: int) -> PictureGrid | None:
    """The first test pictures beside what each row made of them, of the rows that ran in `out`."""
    found = {key: _pictures(comparison, key, row, seed) for key, row in rows.items()}
    painted = {key: images for key, images in found.items() if images is not None}
    if not painted or not (comparison.shards / TEST).is_dir():
        return None
    photos = comparison.test_photos()[: min(_SHOWN, *(len(v) for v in painted.values()))]
    lines = [
        [p.image, np.where(p.mask[..., None], 0, p.image).astype(np.uint8), *(v[i] for v in painted.values())]
        for i, p in enumerate(photos)
    ]
    masks = [p.mask for p in photos]
    columns, captions = ["original", "masked", *painted], [p.prompt for p in photos]
    return PictureGrid(columns, lines, captions, masks, title=f"Figure 3, {comparison.world}")


_SHOWN = 12
_ALIGNMENT_SCENES = 256


def _alignment(comparison: Comparison, rows: Mapping[str, Row]) -> Alignment:
    """Of the teacher in fp32, for every count of layers that the rows have; on scenes, or on test photographs."""
    backbone, budget = comparison.backbone(), comparison.budget
    recipes = [next(iter(row_recipes(row, budget, 0).values())) for row in rows.values() if row.stages]
    layers = sorted({recipe.student.num_layers for recipe in recipes}, reverse=True)
    if comparison.rendered:
        photos = list(scene_photos(derive_seed(budget.data_seed or 0, "alignment"), 0, _ALIGNMENT_SCENES))
    else:
        photos = comparison.test_photos()[:_ALIGNMENT_SCENES]
    return teacher_alignment(backbone, backbone.pipeline.controlnet, photos, layers)


@dataclass
class _Made:
    """The parts of a report, as they come."""

    summary: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    grids: dict[str, PictureGrid] = field(default_factory=dict)
    marks: list[str] = field(default_factory=list)
    """What made each number: row, seed, the hash of everything it depends on, machine."""

    def draw(self, name: str, grid: PictureGrid | None) -> None:
        """Keeps a grid where there is one."""
        self.grids |= {name: grid} if grid else {}


def _bounds(comparison: Comparison) -> list[str]:
    """Between what PSNR can lie on test pictures that are no scenes, once for each `out`."""
    if comparison.rendered or not (comparison.shards / TEST).is_dir():
        return []
    path, mark = comparison.out / "bounds.json", [*comparison.mark(), comparison.budget.test]
    had = json.loads(path.read_text()) if path.is_file() else {}
    if had.get("mark") != mark:
        had = {"mark": mark, "bounds": psnr_bounds(comparison.backbone(), comparison.test_photos())}
        write_json(path, had)
    return [bounds_note(had["bounds"])]


def _make_tables(
    made: _Made, title: str, rows: Mapping[str, Row], against: str, comparison: Comparison, how: Mapping[str, Any]
) -> None:
    absent = _absent(rows, comparison, how["seeds"], how["results"])
    if against in absent:
        raise InvalidInputError(f"{absent[against]} Name another row with --against")
    rows = {key: row for key, row in rows.items() if key not in absent}
    found = collect(rows, comparison, **how)
    made.summary |= summarise(found, against)
    made.tables += tables_of(made.summary, rows, comparison, title, _bounds(comparison))
    made.marks += [f"{key}, seed {r.seed}: {r.mark[:16]}, {r.facts['machine']}" for key in found for r in found[key]]
    made.absent += absent.values()
    made.told += [*absent.values(), *findings(made.summary, rows, comparison.budget)]
    made.curves += [*cost_curves(made.summary, rows), *_loss_curves(rows, against, comparison, how["seeds"])]
    made.draw("figure3.png", _figure3(rows, comparison, how["seeds"][0]))


def _loss_curves(rows: Mapping[str, Row], against: str, comparison: Comparison, seeds: Sequence[int]) -> list[Curve]:
    """Of the rows that were trained in `out`: every term, and of the row `against` layers and seeds."""

    def run(key: str, stage: str, seed: int) -> Path:
        return comparison.out / f"{key}-{seed}" / stage.rpartition("/")[2]

    shown = {
        f"{key} {stage.rpartition('/')[2]}": run(key, stage, seeds[0]) for key in rows for stage in rows[key].stages
    }
    out = term_curves(shown)
    for stage in rows[against].stages:
        name = f"{against} {stage.rpartition('/')[2]}"
        out += layer_curves(name, run(against, stage, seeds[0]))
        out += seed_curves(f"Loss of {name} by seed", {f"seed {n}": run(against, stage, n) for n in seeds})
    return out


def _make_figure2(made: _Made, rows: Mapping[str, Row], comparison: Comparison, how: Mapping[str, Any]) -> None:
    found = collect(rows, comparison, measure=run_alike, measured=MARK, **how)
    made.summary["figure2"] = summarise_alike(found)
    made.tables.append(alike_table(made.summary["figure2"], rows, comparison.budget))
    for key, row in made.summary["figure2"]["rows"].items():
        made.told += prompt_signature(rows[key].title, row["global_minus_local"])
    made.draw("figure2.png", alike_grid(rows, comparison, how["seeds"][0]))


def _make_alignment(made: _Made, rows: Mapping[str, Row], comparison: Comparison) -> None:
    aligned = _alignment(comparison, rows)
    told = {"power": aligned.power.tolist(), "cosine": aligned.cosine.tolist()}
    told |= {"errors": aligned.errors, "outputs": aligned.outputs}
    made.summary["alignment"] = told
    made.tables.append(alignment_table(aligned))
    made.curves += alignment_curves(aligned)


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
    """Makes what is missing of a target's rows, then `tables.md`, `tables.tex`, `tables.json`, `report.html`.

    `target` is one of TARGETS; `seeds` are the budget's own by default; differences are to the row `against`, by
    default the reference of the scale; finished rows are files under `results`. Raises InvalidInputError for a target
    that photographs or the scale cannot have, and what the verbs raise."""
    chosen, wanted, scale = seeds or comparison.budget.train_seeds, TARGETS[target], comparison.scale
    if wanted.figure == FIGURE2 and not comparison.rendered:
        raise InvalidInputError(
            "Figure 2 needs the oracle, which reads rendered scenes alone; name a table or ablation"
        )
    made = _Made({"budget": comparison.budget.model_dump(mode="json")})
    how: dict[str, Any] = {"seeds": chosen, "bar": bar, "workers": workers}
    reference = held_against(wanted, rows, against, scale)
    with only_writer(comparison.out):
        if table_rows := measured_rows(TABLES, wanted, rows, against, scale):
            found_in = how | {"results": _results(results, TABLES)}
            _make_tables(made, wanted.title, table_rows, reference, comparison, found_in)
        if alike_rows := measured_rows(MARK, wanted, rows, against, scale):
            _make_figure2(made, alike_rows, comparison, how | {"results": _results(results, MARK)})
        if shown := measured_rows(FIGURE3, wanted, rows, against, scale):
            _paint(shown, comparison, chosen[0], bar)
            made.draw("figure3.png", _figure3(shown, comparison, chosen[0]))
        if "layers" in wanted.studies:
            _make_alignment(made, table_rows, comparison)
        command = f"refine-control reproduce {target} --scale {scale} --budget {results.name} --seeds {len(chosen)}"
        command += "".join(f" --row {row}" for row in rows) + (f" --against {against}" if against else "")
        parts = {"model": comparison.model, "teacher": comparison.teacher, "photos": comparison.photos}
        parts |= {"data": comparison.data, "weights": comparison.weights}
        command += "".join(f" --{name} {value}" for name, value in parts.items() if value)
        command += f" --out {comparison.out} --results {results.parent}"
        facts = {"budget": results.name, "results": str(results), "command": command}
        return _write(made, f"{wanted.title} on {comparison.world}", comparison.out, facts)


def _write(made: _Made, title: str, out: Path, facts: Mapping[str, str]) -> Reproduced:
    pictures = [f"{name}: {out / name}" for name in made.grids] if not made.tables else []
    text = write_tables(out, made.tables, [*made.absent, *pictures])
    write_json(out / "tables.json", made.summary)
    for name, grid in made.grids.items():
        write_atomic(out / name, picture_grid(grid))
    signed = [f"refine-control {__version__}", *made.marks]
    data = ReportData(title, made.told, facts, made.tables, list(made.grids.values()), made.curves, signed)
    write_report(out / "report.html", data)
    return Reproduced(text, made.summary, out)
