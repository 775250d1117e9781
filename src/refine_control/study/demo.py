"""`refine-control demo`: the main job from rendered scenes to a report, with the verbs everybody uses.

scenes -> shards -> caches -> Student_fc and the two stages of ours (same initialisation, samples a step and
steps; both begin from the teacher's layers, which docs/results.md holds against the paper's start) -> evaluation of
both beside the teacher -> report. Nothing is precomputed but the mini bundle.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from refine_control.miniature.obedience import load_classifier
from refine_control.models.card import BUNDLE
from refine_control.models.devices import best_device
from refine_control.models.loading import load_backbone, load_controlnet
from refine_control.storage import only_writer
from refine_control.study.compare import compare
from refine_control.study.comparison import Budget, read_budget, read_rows, row_recipes
from refine_control.study.evaluate import TEACHER, Written, sampler_facts, summarise, write_results
from refine_control.study.feature_metrics import FeatureNetworks
from refine_control.study.loss_curves import layer_curves, term_curves
from refine_control.study.materials import Comparison, prepare_data
from refine_control.study.model_cost import model_costs
from refine_control.study.rows import sampler_of, train_row
from refine_control.study.signatures import signatures
from refine_control.training.run import fast_precision

SHOWN = {"fc": "fc_inherit", "ours": "balanced"}
"""The students by the names they are shown under, and their rows of rows.yaml."""


def _sentences(summary: dict[str, Any], costs: dict[str, Any], budget: Budget) -> list[str]:
    """What came out, whatever it is."""
    teacher, ours = costs[TEACHER], costs["ours"]
    out = [
        f"A ControlNet of {teacher.num_layers} layers was distilled into {ours.num_layers}: "
        f"{teacher.num_params / ours.num_params:.2f} times fewer parameters, "
        f"{teacher.gflops_step / ours.gflops_step:.2f} times fewer operations in a denoising step.",
        f"Both students saw {budget.steps} steps of {budget.batch_size} samples from the same initialisation, twelve "
        f"of the teacher's own layers; fc learned from {budget.labeled} labelled scenes, ours from the same and from "
        f"{budget.unlabeled} without pixels in their holes.",
    ]
    differences = summary["paired_differences"]
    pair = differences["ours - fc"]
    for metric, unit in (("psnr_region", "dB of region PSNR"), ("both", "points of obedience (colour and shape)")):
        d = pair[metric]
        verdict = "excludes zero" if d["excludes_zero"] else "does not exclude zero"
        out.append(
            f"Ours against fc: {d['mean']:+.2f} {unit}, 95 % interval [{d['low']:+.2f}, {d['high']:+.2f}], "
            f"which {verdict}."
        )
    for name, key in SHOWN.items():
        recipes = list(row_recipes(read_rows()[key], budget, 0).values())
        out += signatures(name, differences[f"{TEACHER} - {name}"], recipes)
    return out


def run_demo(out: Path, *, seed: int = 0, budget: str = "demo", steps: int | None = None, bar: Any = None) -> Written:
    """Runs the comparison of `budget` (a row of recipes/mini/budgets.yaml) with one training seed in `out`.

    `bar(label)` gives a progress callback for each part. The same call continues what was interrupted.
    Raises what the verbs raise."""
    precision = fast_precision(best_device())
    numbers = read_budget(budget, steps).model_copy(update={"precision": precision})
    rows = {name: read_rows()[key] for name, key in SHOWN.items()}
    tell = bar or (lambda label: None)
    with only_writer(out):
        comparison = Comparison(numbers, out)
        prepare_data(comparison, rows.values(), tell)
        trained = {name: train_row(name, row, comparison, seed, tell) for name, row in rows.items()}
        seconds = {key: each.seconds for key, each in trained.items()}
        photos = comparison.test_photos()
        sampler = sampler_of(numbers)
        students = {key: trained[key].student for key in ("ours", "fc")}
        backbone = load_backbone("mini", device=best_device())
        controlnets = {
            TEACHER: backbone.pipeline.controlnet,
            **{n: load_controlnet(str(f)) for n, f in students.items()},
        }
        sources = {TEACHER: None, **{n: str(f) for n, f in students.items()}}
        costs = model_costs(backbone, controlnets, "mini", sources, sampler.precision)
        networks = FeatureNetworks(load_classifier(BUNDLE))
        result = compare(backbone, controlnets, photos, sampler, networks, tell("evaluate"))
        summary = summarise(result, "ours", "fc")
        facts = {
            **sampler_facts(sampler, len(photos)),
            "labelled scenes": str(numbers.labeled),
            "unlabelled scenes": str(numbers.unlabeled),
            "training": f"{numbers.steps} steps of {numbers.batch_size} samples for each student, seed {seed}",
            "training seconds": ", ".join(f"{n} {s:.0f}" for n, s in seconds.items()),
            "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
            "command": f"refine-control demo --budget {budget} --steps {numbers.steps} --seed {seed} --out {out}",
        }
        sentences = _sentences(summary, costs, numbers)
        stages = {name: folder for each in trained.values() for name, folder in each.stages.items()}
        title = "A 23-layer ControlNet distilled into 12 layers"
        return write_results(
            out,
            title,
            photos,
            result,
            summary,
            costs,
            facts,
            networks=networks,
            sentences=sentences,
            curves=[*term_curves(stages), *layer_curves(*next(iter(trained["ours"].stages.items())))],
        )
