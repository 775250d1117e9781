"""The runs of a study: each row and seed is trained, evaluated and written once, in any number of processes.

A finished row is a JSON file with a hash (its mark) of recipes, budget, model and format. It is used again only if the
hash is the same, on whatever machine; so nobody who repeats a table has to train the rows in `results/`.
"""

# S seeds, N test scenes

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from refine_control.config import Recipe, SamplerConfig, fingerprint
from refine_control.models.backbone import Backbone
from refine_control.models.controlnet import ControlNet
from refine_control.models.cpu_kernels import in_precision
from refine_control.models.devices import device_name
from refine_control.models.loading import load_student, resolve, weights_mark
from refine_control.pipeline.picture_cost import picture_cost
from refine_control.progress import Progress
from refine_control.records import Photo
from refine_control.study.compare import Result, compare
from refine_control.study.feature_metrics import NETWORK_METRICS, FeatureNetworks, not_computed, scene_networks
from refine_control.study.materials import Bar, Comparison, cache_path, prepare_data, row_caches
from refine_control.study.model_cost import counted_cost
from refine_control.study.plan import TABLES, Budget, Row, row_recipes, row_seeds, trained_key
from refine_control.study.row_results import NUMERICS, RowFacts, RowResult, read_row, save_pictures, write_row
from refine_control.threads import torch_threads, usable_cpus
from refine_control.training.run import train
from refine_control.workers import workers as worker_processes

FORMAT = 2
"""Raised when equal recipes give numbers that differ by more than rounding: finished rows are then made again. Smaller
changes raise `row_results.NUMERICS`."""


def make_sampler(budget: Budget, row: Row | None = None) -> SamplerConfig:
    """The sampler of every row of a comparison; the row sets the injection and, in a study of steps, the sampling."""
    sampler = SamplerConfig(
        num_inference_steps=budget.num_inference_steps,
        guidance_scale=budget.guidance_scale,
        conditioning_scale=budget.conditioning_scale,
        precision=budget.precision,
        injection=row.injection if row else "exact",
    )
    return sampler if row is None or row.sampling is None else row.sampling.apply(sampler)


def row_mark(row: Row, comparison: Comparison, seed: int, measured: str = TABLES) -> str:
    """The hash of everything a result depends on: recipes, budget, model, data, format, and what is measured."""
    budget = comparison.budget
    recipes = [fingerprint(recipe) for recipe in row_recipes(row, budget, seed).values()]
    shared = budget.model_dump(mode="json", exclude={"train_seeds"}, exclude_defaults=True)
    model, *material = comparison.mark()
    parts = [FORMAT, recipes, row.injection, seed if row.stages else 0, shared, model, measured, *material]
    parts += [row.baseline] if row.baseline else []
    changed = row.data.model_dump(exclude_defaults=True)
    parts += [changed] if changed else []
    parts += [str(row.sampling)] if row.sampling else []
    parts += [weights_mark(row.controlnet)] if row.controlnet else []
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def finished(path: Path, row: Row, comparison: Comparison, seed: int, measured: str = TABLES) -> RowResult | None:
    """The result in a file, if it has the row's mark and every metric of the networks in `comparison.weights`."""
    result = read_row(path, row_mark(row, comparison, seed, measured))
    if result is None or comparison.weights is None or measured != TABLES:
        return result
    if row.baseline:
        from refine_control.baselines.models import cannot_be_had

        if cannot_be_had(row.baseline):
            return result
    absent = not_computed(comparison.weights)
    return result if all(m in {*result.scores, *result.sets} for m in NETWORK_METRICS if m not in absent) else None


class TrainedRow(NamedTuple):
    """The student of a row and the run folders of its stages."""

    student: Path | None
    """None for the teacher."""
    stages: dict[str, Path]
    seconds: float
    """Of training in this process."""


def train_row(key: str, row: Row, comparison: Comparison, seed: int, bar: Bar) -> TrainedRow:
    """Trains the stages of a row one after the other under `out/KEY-SEED`.

    A stage that any row finished by the same recipe is reused: rows that differ in stage 2 alone share stage 1."""
    out = comparison.out
    model, teacher = comparison.names
    stages: dict[str, Path] = {}
    if row.controlnet:
        return TrainedRow(resolve(row.controlnet), stages, 0.0)
    student, seconds, read = None, 0.0, row_caches(comparison, row)
    for name, recipe in row_recipes(row, comparison.budget, seed).items():
        stage = name.rpartition("/")[2]
        run_dir = out / f"{trained_key(key)}-{seed}" / stage
        caches = {role: str(cache_path(comparison, cache)) for role, cache in read[name].items()}
        changed: dict[str, object] = {"model": model, "teacher": teacher, "data": recipe.data.model_dump() | caches}
        changed |= {"init_from": str(student)} if student else {}
        recipe = Recipe.model_validate({**recipe.model_dump(), **changed})
        others = sorted(out.glob(f"*-{seed}/{stage}"))
        trained = train(recipe, run_dir, bar(f"train {key}: {stage}"), others)
        student, seconds = trained.student, seconds + trained.seconds
        stages[stage] = student.parent
    return TrainedRow(student, stages, seconds)


def row_model(trained: TrainedRow, comparison: Comparison) -> tuple[Backbone, ControlNet]:
    """The row's ControlNet (the teacher if nothing is trained) and the backbone it paints with, in the budget's
    precision."""
    backbone = comparison.backbone()
    controlnet = backbone.pipeline.controlnet
    if trained.student:
        backbone, controlnet = load_student(backbone, trained.student)
    in_precision(comparison.budget.precision, backbone, controlnet)
    return backbone, controlnet


def _machine() -> str:
    return f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def row_facts(
    trained: TrainedRow,
    backbone: Backbone,
    controlnet: ControlNet,
    seconds_per_image: float | None = None,
    sampler: SamplerConfig | None = None,
) -> RowFacts:
    """Cost of a row's ControlNet, with a sampler also of a picture, seconds and machine."""
    whole = picture_cost(backbone, controlnet, sampler)._asdict() if sampler else {}
    return RowFacts(
        **counted_cost(backbone, controlnet)._asdict(),
        **whole,
        training_seconds=round(trained.seconds, 1),
        seconds_per_image=None if seconds_per_image is None else round(seconds_per_image, 4),
        machine=f"{_machine()}, {device_name(backbone.device)}",
    )


def run_row(key: str, row: Row, comparison: Comparison, seed: int, bar: Bar) -> RowResult:
    """Trains and evaluates one row; its first pictures go to `out/KEY-SEED/images.npy`."""
    photos, mark = comparison.test_photos(), row_mark(row, comparison, seed)
    sampler, folder = make_sampler(comparison.budget, row), comparison.out / f"{key}-{seed}"
    networks = scene_networks(comparison.tested, photos, comparison.weights)
    if row.baseline:
        return run_baseline(key, row.baseline, mark, seed, photos, sampler, networks, folder, bar(f"evaluate {key}"))
    trained = train_row(key, row, comparison, seed, bar)
    backbone, controlnet = row_model(trained, comparison)
    result = compare(backbone, {key: controlnet}, photos, sampler, networks, bar(f"evaluate {key}"))
    facts = row_facts(trained, backbone, controlnet, result.seconds[key], sampler)
    return _row_result(key, seed, mark, result, facts, folder, comparison.budget.steps if row.stages else 0)


def _row_result(
    key: str, seed: int, mark: str, result: Result, facts: RowFacts, folder: Path, steps: int = 0
) -> RowResult:
    """A row's result; its first pictures are saved in `folder`."""
    save_pictures(folder, result.images[key], mark)
    return RowResult(key, seed, mark, result.scores[key], result.sets[key], facts, steps, NUMERICS)


def run_baseline(
    key: str,
    source: str,
    mark: str,
    seed: int,
    photos: Sequence[Photo],
    sampler: SamplerConfig,
    networks: FeatureNetworks,
    folder: Path,
    progress: Progress | None = None,
) -> RowResult:
    """Evaluates a baseline, which is not trained, as `run_row` does a student.

    `source` is what `load_baseline` takes; the first pictures go to `folder/images.npy`."""
    from refine_control.study.compare_baselines import add_baselines

    result = Result({}, {}, {}, {})
    row = add_baselines(result, {key: source}, photos, sampler, networks, progress)[key]
    cost = row.cost.model
    facts = RowFacts(
        cost.num_layers or None,
        cost.num_params or None,
        cost.gflops_controlnet,
        cost.gflops_step,
        row.cost.denoiser_params,
        row.facts,
        seconds_per_image=round(result.seconds[key], 4),
        machine=_machine(),
    )
    return _row_result(key, seed, mark, result, facts, folder)


Measure = Callable[[str, Row, Comparison, int, Bar], RowResult]
"""`run_row`, `alike.run_alike` or another that can be pickled."""


class Task(NamedTuple):
    """One row and seed, with everything a worker process needs."""

    key: str
    row: Row
    seed: int
    comparison: Comparison
    path: Path
    threads: int
    measure: Measure


def _run(tasks: Sequence[Task], bar: Bar | None = None) -> Sequence[Task]:
    """Trains, evaluates and writes results one after the other: rows of one training, or a single one."""
    for task in tasks:
        with torch_threads(task.threads):
            result = task.measure(task.key, task.row, task.comparison, task.seed, bar or (lambda label: None))
        write_row(result, task.path)
    return tasks


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
    """The results of every row and seed: read from `results` if finished, else made and written there.

    `workers` rows run at a time, each in its own process with its share of the cores."""
    threads = max(1, usable_cpus() // workers) if workers > 1 else 0
    tasks = [  # seed by seed: a table with one seed is complete early
        Task(key, row, seed, comparison, results / f"{key}-{seed}.json", threads, measure)
        for seed in seeds
        for key, row in rows.items()
        if seed in row_seeds(row, seeds)
    ]
    missing = [task for task in tasks if not finished(task.path, task.row, comparison, task.seed, measured)]
    if missing:
        prepare_data(comparison, [task.row for task in missing], bar)
        progress: Any = bar("rows")
        groups: dict[tuple[str, int], list[Task]] = {}
        for task in missing:
            groups.setdefault((trained_key(task.key), task.seed), []).append(task)
        done = 0
        with worker_processes(workers) as in_order:
            for group in in_order(_run if workers > 1 else partial(_run, bar=bar), list(groups.values())):
                done += len(group)
                if progress:
                    progress(done, len(missing), f"{group[-1].key}-{group[-1].seed}")
    results_by_key: dict[str, list[RowResult]] = {key: [] for key in rows}
    for task in tasks:
        result = read_row(task.path)  # rounded, as every later reader gets it
        assert result is not None
        results_by_key[task.key].append(result)
    return results_by_key
