"""`refine-control reproduce`: the paper's tables on the mini model, with seeds and intervals.

Rows that are finished are read from `results`, the others are trained and evaluated one after the other and written
there; so it may be killed after any of them. The tables are made again from all rows that are there.
"""

# S seeds, N test scenes

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_control.comparison import Budget, Row, read_budget, read_rows
from refine_control.data.workers import workers as worker_processes
from refine_control.errors import InvalidInputError
from refine_control.evaluation.distances import set_difference, set_interval
from refine_control.evaluation.feature_metrics import SET_METRICS
from refine_control.evaluation.pictures import PictureGrid, picture_grid
from refine_control.evaluation.report import ReportData, Table, write_report
from refine_control.evaluation.rows import (
    Bar,
    RowResult,
    prepare_data,
    read_row,
    reads_completions,
    row_mark,
    run_row,
    sampler_of,
    write_row,
)
from refine_control.evaluation.statistics import BOOTSTRAP_SEED, gap_closed, paired_difference, two_level
from refine_control.evaluation.tables import HEADINGS, cell, digits, to_latex, to_markdown
from refine_control.storage import only_writer, write_atomic, write_json

OURS, TEACHER, BASELINE = "ours", "teacher", "fc"
_SHOWN = ("psnr_region", "psnr", "ssim", "lpips", "colour", "shape", "both", "scene_perceptual")


class Reproduced(NamedTuple):
    """The tables as text, all numbers, and where they lie."""

    text: str
    summary: dict[str, Any]
    folder: Path


def rows_of(tables: Sequence[int], named: Sequence[str] = ()) -> dict[str, Row]:
    """The rows of the tables, or those named alone; always with teacher, fc and ours, to hold the others against.

    Raises InvalidInputError for a row that does not exist."""
    rows = read_rows()
    unknown = sorted(set(named) - set(rows))
    if unknown:
        raise InvalidInputError(f"there is no row {unknown[0]}; the rows are {', '.join(rows)}")
    wanted = {OURS, TEACHER, BASELINE, *named}
    return {k: r for k, r in rows.items() if k in wanted or (not named and set(r.tables) & set(tables))}


def _seeds(row: Row, seeds: Sequence[int]) -> Sequence[int]:
    return seeds if row.stages else seeds[:1]


class _Task(NamedTuple):
    """One row and seed to be made, with all that a process needs to know."""

    key: str
    row: Row
    seed: int
    budget: Budget
    out: Path
    path: Path
    threads: int
    weights: Path | None


def _make(task: _Task, bar: Bar | None = None) -> _Task:
    """Trains and evaluates, and writes the result's file."""
    import torch

    if task.threads:
        torch.set_num_threads(task.threads)
    tell = bar or (lambda label: None)
    made = run_row(task.key, task.row, task.budget, task.out, task.seed, tell, weights=task.weights)
    write_row(made, task.path)
    return task


def collect(
    rows: Mapping[str, Row],
    budget: Budget,
    seeds: Sequence[int],
    out: Path,
    results: Path,
    bar: Bar,
    workers: int = 1,
    weights: Path | None = None,
) -> dict[str, list[RowResult]]:
    """Every row for every seed, read from `results` where it lies there, else made and written.

    `workers` rows are made at a time, each in a process of its own with its share of the cores."""
    wanted = [(key, seed) for seed in seeds for key, row in rows.items() if seed in _seeds(row, seeds)]
    paths = {(key, seed): results / f"{key}-{seed}.json" for key, seed in wanted}
    missing = [each for each in wanted if read_row(paths[each], row_mark(rows[each[0]], budget, each[1])) is None]
    if missing:
        prepare_data(budget, out, bar, reads_completions(rows.values(), budget))
        threads = max(1, (os.cpu_count() or 1) // workers) if workers > 1 else 0
        tasks = [_Task(key, rows[key], seed, budget, out, paths[key, seed], threads, weights) for key, seed in missing]
        tell = bar("rows")
        with worker_processes(workers) as in_order:
            # seed by seed: a table with one seed is there early
            for done, task in enumerate(in_order(_make if workers > 1 else partial(_make, bar=bar), tasks), 1):
                if tell:
                    tell(done, len(tasks), f"{task.key}-{task.seed}")
    found: dict[str, list[RowResult]] = {key: [] for key in rows}
    for key, seed in wanted:
        result = read_row(paths[key, seed])  # rounded, as everybody after this reads it
        found[key] += [result] if result else []
    return found


def plan(
    tables: Sequence[int], budget: str, seeds: Sequence[int], rows: Sequence[str], results: Path
) -> dict[str, Any]:
    """What `reproduce` would do: for each row and seed, `finished` or `to do`."""
    numbers = read_budget(budget)
    done = {}
    for key, row in rows_of(tables, rows).items():
        for seed in _seeds(row, seeds):
            had = read_row(results / budget / f"{key}-{seed}.json", row_mark(row, numbers, seed))
            done[f"{key}-{seed}"] = "finished" if had else "to do"
    return {"verb": "reproduce", "budget": numbers.model_dump(mode="json"), "rows": done}


def _stacked(results: Sequence[RowResult], metric: str) -> np.ndarray:
    """(S, N) of one row; (N,) of a row without seeds."""
    values = np.stack([r.scores[metric] for r in results])
    return values[0] if len(values) == 1 else values


def summarise(found: Mapping[str, Sequence[RowResult]]) -> dict[str, Any]:
    """Means, differences to ours, and the share of the gap between fc and the teacher that ours closes."""
    made = [r for results in found.values() for r in results]
    metrics = [m for m in _SHOWN if all(m in r.scores for r in made)]
    of_sets = [m for m in SET_METRICS if all(m in r.sets for r in made)]
    values = {key: {m: _stacked(results, m) for m in metrics} for key, results in found.items()}
    sets = {key: {m: [r.sets[m] for r in results] for m in of_sets} for key, results in found.items()}
    out: dict[str, Any] = {"metrics": [*metrics, *of_sets], "rows": {}, "gap_closed": {}}
    for key, results in found.items():
        row = {
            "seeds": [r.seed for r in results],
            "facts": [r.facts for r in results],
            "mean": {m: two_level(np.atleast_2d(values[key][m]), BOOTSTRAP_SEED).as_json() for m in metrics}
            | {m: set_interval(sets[key][m], BOOTSTRAP_SEED).as_json() for m in of_sets},
        }
        if key != OURS and OURS in found:
            row["minus_ours"] = {
                m: paired_difference(values[key][m], values[OURS][m], BOOTSTRAP_SEED).as_json() for m in metrics
            } | {m: set_difference(sets[key][m], sets[OURS][m], BOOTSTRAP_SEED).as_json() for m in of_sets}
        out["rows"][key] = row
    if {OURS, TEACHER, BASELINE} <= set(found):
        for m in ("psnr_region", "both"):
            parts = [values[k][m] for k in (TEACHER, BASELINE, OURS)]
            if m in metrics and np.mean(parts[0]) != np.mean(parts[1]):
                out["gap_closed"][m] = gap_closed(*parts, seed=BOOTSTRAP_SEED).as_json()
    return out


def quality(summary: Mapping[str, Any], rows: Mapping[str, Row], title: str, notes: Sequence[str]) -> Table:
    """A row for each model, a column for each metric, and the paper's PSNR and SSIM beside ours."""
    metrics = summary["metrics"]
    lines = []
    for key, row in summary["rows"].items():
        paper = rows[key].paper or {}
        beside = [f"{paper[m]:g}" if m in paper else "" for m in ("psnr", "ssim")]
        cells = [cell(row["mean"][m], digits(m)) for m in metrics]
        lines.append([rows[key].title, str(len(row["seeds"])), *cells, *beside])
    columns = ["row", "seeds", *(HEADINGS[m] for m in metrics), "paper's PSNR", "paper's SSIM"]
    return Table(title, columns, lines, notes)


def differences(summary: Mapping[str, Any], rows: Mapping[str, Row]) -> Table:
    """Each row minus ours, paired by scene and seed."""
    metrics = summary["metrics"]
    lines = [
        [rows[key].title, *(cell(row["minus_ours"][m], digits(m)) for m in metrics)]
        for key, row in summary["rows"].items()
        if "minus_ours" in row
    ]
    note = "Paired by scene and seed. An interval with zero inside is no evidence of a difference."
    return Table("Row minus ours", ["row", *(HEADINGS[m] for m in metrics)], lines, [note])


def _sentences(summary: Mapping[str, Any]) -> list[str]:
    names = {"psnr_region": "region PSNR", "both": "obedience (colour and shape)"}
    out = []
    for metric, share in summary["gap_closed"].items():
        if share["low"] is None:
            out.append(f"In {names[metric]} the teacher is not told from Student_fc: there is no gap to close.")
        else:
            out.append(
                f"Ours closes {100 * share['mean']:.0f} % of the gap in {names[metric]} between Student_fc and the "
                f"teacher, 95 % interval [{100 * share['low']:.0f}, {100 * share['high']:.0f}]; "
                "the paper: 76.5 % of PSNR."
            )
    return out


def _pictures(found: Mapping[str, Sequence[RowResult]], out: Path) -> PictureGrid | None:
    """Figure 3: the first test scenes beside what each row made of them, of the rows that ran in `out`."""
    from refine_control.evaluation.evaluate import read_test

    painted = {key: out / f"{key}-{results[0].seed}" / "images.npy" for key, results in found.items()}
    painted = {k: np.load(p) for k, p in painted.items() if p.is_file()}
    if not painted or not (out / "scenes" / "test").is_dir():
        return None
    photos = read_test(out / "scenes" / "test")[: min(12, *(len(v) for v in painted.values()))]
    lines = [
        [p.image, np.where(p.mask[..., None], 0, p.image).astype(np.uint8), *(v[i] for v in painted.values())]
        for i, p in enumerate(photos)
    ]
    return PictureGrid(["original", "masked", *painted], lines, [p.prompt for p in photos], [p.mask for p in photos])


def reproduce(
    tables: Sequence[int],
    *,
    budget: str = "long",
    seeds: Sequence[int] | None = None,
    rows: Sequence[str] = (),
    out: Path,
    results: Path,
    bar: Bar,
    workers: int = 1,
    weights: Path | None = None,
) -> Reproduced:
    """Makes what is missing of the rows, then `tables.md`, `tables.tex`, `tables.json` and `report.html` in `out`.

    `seeds` are the budget's own by default. Raises what the verbs raise."""
    numbers = read_budget(budget)
    chosen = rows_of(tables, rows)
    with only_writer(out):
        found = collect(chosen, numbers, seeds or numbers.train_seeds, out, results / budget, bar, workers, weights)
        summary = summarise(found)
        sampler = sampler_of(numbers)
        notes = [
            f"{numbers.test} test scenes; {numbers.steps} steps of {numbers.batch_size} samples for every student; "
            f"|D_sl| {numbers.labeled}, |D_ssl| {numbers.unlabeled}; Euler, {sampler.num_inference_steps} steps, "
            f"guidance {sampler.guidance_scale:g}, {sampler.precision}. Mean and 95 % two-level bootstrap interval "
            "(seeds, then scenes); PSNR and SSIM on 8-bit RGB, raw pipeline output unless composited; region: inside "
            "the mask. The paper's numbers are of SD3 on photographs and stand beside ours, not against them."
        ]
        verb = f"table{tables[0]}" if len(tables) == 1 else "all"
        names = " and ".join(f"Table {t}" for t in tables)
        made = [quality(summary, chosen, f"{names}, mini model", notes), differences(summary, chosen)]
        sentences = _sentences(summary)
        text = "\n\n".join([*map(to_markdown, made), *sentences])
        write_atomic(out / "tables.md", text + "\n")
        write_atomic(out / "tables.tex", "\n\n".join(map(to_latex, made)) + "\n")
        write_json(out / "tables.json", {"budget": numbers.model_dump(mode="json"), **summary})
        grid = _pictures(found, out)
        if grid:
            write_atomic(out / "figure3.png", picture_grid(grid))
        facts = {
            "budget": budget,
            "results": str(results / budget),
            "command": f"refine-control reproduce {verb} --budget {budget}",
        }
        write_report(out / "report.html", ReportData(f"{names} on the mini model", sentences, facts, made, grid))
    return Reproduced(text, summary, out)
