"""One row of a table for one seed: data, training, evaluation, and its numbers as a small file.

A finished row is a JSON file that names everything it came from by one hash: recipes, budget, model and format. It is
used again only where the hash is the same, on whatever machine; so the files in `results/` of the repository save
whoever repeats a table from training it all.
"""

# N test scenes

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

from refine_control.config import Recipe, SamplerConfig, fingerprint
from refine_control.miniature.obedience import load_classifier
from refine_control.models.backbone import Backbone
from refine_control.models.card import BUNDLE
from refine_control.models.controlnet import ControlNet
from refine_control.models.cpu_kernels import in_precision
from refine_control.models.devices import device_name
from refine_control.models.loading import load_controlnet
from refine_control.records import UNLABELED
from refine_control.study.compare import compare
from refine_control.study.comparison import Budget, Row, row_recipes
from refine_control.study.feature_metrics import NETWORK_METRICS, load_networks, not_computed
from refine_control.study.materials import Bar, Comparison, cache_folder
from refine_control.study.model_cost import counted_cost
from refine_control.study.row_results import RowResult, read_row, save_pictures
from refine_control.training.run import train

FORMAT = 2
"""Raised when equal recipes give numbers that differ by more than rounding."""


TABLES = "tables"
"""What a row is measured for: the tables, or `alike.MARK`."""


def sampler_of(budget: Budget, row: Row | None = None) -> SamplerConfig:
    """How every row of a comparison is sampled."""
    return SamplerConfig(
        num_inference_steps=budget.num_inference_steps,
        guidance_scale=budget.guidance_scale,
        conditioning_scale=budget.conditioning_scale,
        precision=budget.precision,
        injection=row.injection if row else "exact",
    )


def row_mark(row: Row, comparison: Comparison, seed: int, measured: str = TABLES) -> str:
    """The hash that tells whether two results are of the same row: recipes, budget, model, format, what is measured."""
    budget = comparison.budget
    recipes = [fingerprint(recipe) for recipe in row_recipes(row, budget, seed).values()]
    shared = budget.model_dump(mode="json", exclude={"train_seeds"}, exclude_defaults=True)
    model, *material = comparison.mark()
    told = [FORMAT, recipes, row.injection, seed if row.stages else 0, shared, model, measured, *material]
    told += [row.baseline] if row.baseline else []
    changed = row.data.model_dump(exclude_defaults=True)
    told += [changed] if changed else []
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def finished(path: Path, row: Row, comparison: Comparison, seed: int, measured: str = TABLES) -> RowResult | None:
    """The result in a file, if it is this row's and holds what the networks in `comparison.weights` can measure."""
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
    """The student of a row, and where each stage ran."""

    student: Path | None
    """None for the teacher."""
    stages: dict[str, Path]
    seconds: float
    """Of this sitting."""


def train_row(key: str, row: Row, comparison: Comparison, seed: int, bar: Bar) -> TrainedRow:
    """Trains the stages of a row one after the other under `out/KEY-SEED`.

    A stage that this row or another finished by the same recipe is taken as it is: rows that differ in stage 2 alone
    share stage 1."""
    out = comparison.out
    model, teacher = comparison.names
    stages: dict[str, Path] = {}
    student, seconds = None, 0.0
    for name, recipe in row_recipes(row, comparison.budget, seed).items():
        stage = name.rpartition("/")[2]
        run_dir = out / f"{key}-{seed}" / stage
        completed = recipe.objective.x0_source == "teacher"
        caches = {
            role: str(cache_folder(comparison, row, role, completed and role == UNLABELED))
            for role in recipe.objective.roles
        }
        changed: dict[str, Any] = {"model": model, "teacher": teacher, "data": recipe.data.model_dump() | caches}
        changed |= {"init_from": str(student)} if student else {}
        recipe = Recipe.model_validate({**recipe.model_dump(), **changed})
        others = sorted(out.glob(f"*-{seed}/{stage}"))
        trained = train(recipe, run_dir, bar(f"train {key}: {stage}"), others)
        student, seconds = trained.student, seconds + trained.seconds
        stages[stage] = student.parent
    return TrainedRow(student, stages, seconds)


def row_model(trained: TrainedRow, comparison: Comparison) -> tuple[Backbone, ControlNet]:
    """The backbone and the row's ControlNet (the teacher where it trains none), in the budget's precision."""
    backbone = comparison.backbone()
    controlnet = load_controlnet(trained.student) if trained.student else backbone.pipeline.controlnet
    in_precision(comparison.budget.precision, backbone, controlnet)
    return backbone, controlnet


def facts_of(
    row: Row, budget: Budget, trained: TrainedRow, backbone: Backbone, controlnet: ControlNet
) -> dict[str, Any]:
    """Steps, seconds and machine of a row, and what its ControlNet costs."""
    import torch

    return {
        **counted_cost(backbone, controlnet)._asdict(),
        "steps": budget.steps if row.stages else 0,
        "training_seconds": round(trained.seconds, 1),
        "machine": f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{device_name(backbone.device)}",
    }


def run_row(key: str, row: Row, comparison: Comparison, seed: int, bar: Bar) -> RowResult:
    """Trains and evaluates one row; its first pictures go to `out/KEY-SEED/images.npy`."""
    budget, out = comparison.budget, comparison.out
    photos, mark = comparison.test_photos(), row_mark(row, comparison, seed)
    sampler = sampler_of(budget, row)
    networks = load_networks(comparison.weights, load_classifier(BUNDLE) if comparison.rendered else None)
    if row.baseline:
        from refine_control.study.baseline_rows import run_baseline

        folder, tell = out / f"{key}-{seed}", bar(f"evaluate {key}")
        return run_baseline(key, row.baseline, mark, seed, photos, sampler, networks, folder, tell)
    trained = train_row(key, row, comparison, seed, bar)
    backbone, controlnet = row_model(trained, comparison)
    result = compare(backbone, {key: controlnet}, photos, sampler, networks, bar(f"evaluate {key}"))
    save_pictures(out / f"{key}-{seed}", result.images[key], mark)
    facts = facts_of(row, budget, trained, backbone, controlnet) | {"seconds_per_image": round(result.seconds[key], 4)}
    return RowResult(key, seed, mark, result.scores[key], result.sets[key], facts)
