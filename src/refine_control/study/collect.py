"""Rows and seeds in any number of processes: what is finished is read, the rest made and written."""

# S seeds, N test scenes

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from refine_control.study.comparison import Row
from refine_control.study.materials import Bar, Comparison, prepare_data
from refine_control.study.row_results import RowResult, read_row, write_row
from refine_control.study.rows import TABLES, finished, run_row
from refine_control.threads import torch_threads, usable_cpus
from refine_control.workers import workers as worker_processes

Measure = Callable[[str, Row, Comparison, int, Bar], RowResult]
"""`rows.run_row`, `alike.run_alike` or another that can be pickled."""


class Task(NamedTuple):
    """One row and seed, with all that a process needs to make it."""

    key: str
    row: Row
    seed: int
    comparison: Comparison
    path: Path
    threads: int
    measure: Measure


def _make(task: Task, bar: Bar | None = None) -> Task:
    """Trains and evaluates, and writes the result's file."""
    with torch_threads(task.threads):
        made = task.measure(task.key, task.row, task.comparison, task.seed, bar or (lambda label: None))
    write_row(made, task.path)
    return task


def seeds_of(row: Row, seeds: Sequence[int]) -> Sequence[int]:
    """The training seeds that a row is made for: at most its own number; one where nothing is trained."""
    return seeds[: row.seeds] if row.stages else seeds[:1]


def collect(
    rows: Mapping[str, Row],
    comparison: Comparison,
    seeds: Sequence[int],
    results: Path,
    bar: Bar,
    *,
    workers: int = 1,
    measure: Measure = run_row,
    measured: str = TABLES,
) -> dict[str, list[RowResult]]:
    """Every row for every seed, read from `results` where it lies there, else made and written.

    `workers` rows are made at a time, each in a process of its own with its share of the cores."""
    wanted = [(key, seed) for seed in seeds for key, row in rows.items() if seed in seeds_of(row, seeds)]
    paths = {(key, seed): results / f"{key}-{seed}.json" for key, seed in wanted}
    missing = [
        (key, seed) for key, seed in wanted if not finished(paths[key, seed], rows[key], comparison, seed, measured)
    ]
    if missing:
        prepare_data(comparison, [rows[key] for key, _ in missing], bar)
        threads = max(1, usable_cpus() // workers) if workers > 1 else 0
        tasks = [Task(key, rows[key], seed, comparison, paths[key, seed], threads, measure) for key, seed in missing]
        tell = bar("rows")
        with worker_processes(workers) as in_order:
            # seed by seed: a table with one seed is there early
            for done, task in enumerate(in_order(_make if workers > 1 else partial(_make, bar=bar), tasks), 1):
                if tell:
                    tell(done, len(tasks), f"{task.key}-{task.seed}")
    found: dict[str, list[RowResult]] = {key: [] for key in rows}
    for key, seed in wanted:
        result = read_row(paths[key, seed])  # rounded, as everybody after this reads it
        assert result is not None
        found[key].append(result)
    return found
