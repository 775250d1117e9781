"""`refine-control demo`: the main job from rendered scenes to a report, with the functions behind the verbs.

scenes -> shards -> caches -> Student_fc and the two stages of ours (same initialisation, batch size and steps; both
start from the teacher's layers, which docs/results.md compares with the paper's start) -> evaluation of both beside
the teacher -> report. Only the mini bundle is precomputed.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refine_control.metrics.cost import ModelCost
from refine_control.miniature.obedience import load_classifier
from refine_control.models.card import BUNDLE
from refine_control.models.devices import best_device
from refine_control.storage import only_writer
from refine_control.study.compare import compare
from refine_control.study.curves import layer_curves, term_curves
from refine_control.study.evaluate import Written, sampler_facts, summarise_models, write_results
from refine_control.study.feature_metrics import FeatureNetworks
from refine_control.study.materials import Comparison, prepare_data
from refine_control.study.model_cost import load_models, model_costs
from refine_control.study.plan import TEACHER, Budget, read_budget, read_rows, row_recipes
from refine_control.study.report import command_line
from refine_control.study.runs import make_sampler, train_row
from refine_control.study.signatures import signatures
from refine_control.study.summary import Summary
from refine_control.training.run import fast_precision

SHOWN = {"fc": "fc_inherit", "ours": "balanced"}
"""The students by the names they are shown under, and their rows of rows.yaml."""
TITLE = "A 23-layer ControlNet distilled into 12 layers"


def _sentences(summary: Summary, costs: Mapping[str, ModelCost], budget: Budget) -> list[str]:
    """The results in words, whatever they are."""
    teacher, ours = costs[TEACHER], costs["ours"]
    out = [
        f"A ControlNet of {teacher.num_layers} layers was distilled into {ours.num_layers}: "
        f"{teacher.num_params / ours.num_params:.2f} times fewer parameters, "
        f"{teacher.gflops_step / ours.gflops_step:.2f} times fewer operations in a denoising step.",
        f"Both students saw {budget.steps} steps of {budget.batch_size} samples from the same initialisation, twelve "
        f"of the teacher's layers; fc was trained on {budget.labeled} labelled scenes, ours on the same and on "
        f"{budget.unlabeled} without pixels in their holes.",
    ]
    pair = summary.differences["ours", "fc"]
    for metric, unit in (("psnr_region", "dB of region PSNR"), ("both", "points of obedience (colour and shape)")):
        verdict = "excludes" if pair[metric].excludes_zero else "does not exclude"
        mean, interval = f"{pair[metric]:+.2f}".split(" ", 1)
        out.append(f"Ours against fc: {mean} {unit}, 95 % interval {interval}, which {verdict} zero.")
    for name, key in SHOWN.items():
        recipes = list(row_recipes(read_rows()[key], budget, 0).values())
        out += signatures(name, summary.differences[TEACHER, name], recipes)
    return out


def run_demo(out: Path, *, seed: int = 0, budget: str = "demo", steps: int | None = None, bar: Any = None) -> Written:
    """Runs the comparison of `budget` (a row of recipes/mini/budgets.yaml) with one training seed in `out`.

    `bar(label)` gives a progress callback for each part. The same call continues what was interrupted.
    Raises what the verbs raise."""
    precision = fast_precision(best_device())
    numbers = read_budget(budget, steps).model_copy(update={"precision": precision})
    rows = {name: read_rows()[key] for name, key in SHOWN.items()}
    progress = bar or (lambda label: None)
    with only_writer(out):
        comparison = Comparison(numbers, out)
        prepare_data(comparison, rows.values(), progress)
        trained = {name: train_row(name, row, comparison, seed, progress) for name, row in rows.items()}
        photos, sampler = comparison.test_photos(), make_sampler(numbers)
        students = {name: folder for name in ("ours", "fc") if (folder := trained[name].student)}
        backbone, controlnets, own_backbones = load_models("mini", None, students)
        costs = model_costs(backbone, controlnets, "mini", students, sampler.precision, own_backbones=own_backbones)
        networks = FeatureNetworks(load_classifier(BUNDLE))
        result = compare(backbone, controlnets, photos, sampler, networks, progress("evaluate"), own_backbones)
        summary = summarise_models(result)
        facts = {
            **sampler_facts(sampler, len(photos)),
            "labelled scenes": str(numbers.labeled),
            "unlabelled scenes": str(numbers.unlabeled),
            "training": f"{numbers.steps} steps of {numbers.batch_size} samples for each student, seed {seed}",
            "training seconds": ", ".join(f"{name} {each.seconds:.0f}" for name, each in trained.items()),
            "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
            "command": command_line(["demo"], {"budget": budget, "steps": numbers.steps, "seed": seed, "out": out}),
        }
        stages = {name: folder for each in trained.values() for name, folder in each.stages.items()}
        curves = [*term_curves(stages), *layer_curves(*next(iter(trained["ours"].stages.items())))]
        more: dict[str, Any] = {"sentences": _sentences(summary, costs, numbers), "curves": curves}
        return write_results(out, TITLE, photos, result, summary, costs, facts, **more)
