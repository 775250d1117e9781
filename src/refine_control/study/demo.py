"""`refine-control demo`: the main job from rendered scenes to a report, with the functions behind the verbs.

First the shipped edge student and the teacher paint a few scenes. Then scenes -> shards -> caches -> Student_fc and the
two stages of ours (same initialisation, batch size and steps; both start from the teacher's layers, which
docs/results.md compares with the paper's start) -> evaluation of both beside the teacher -> report. Only the mini
bundle and the edge student are precomputed.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from refine_control.metrics.cost import ModelCost
from refine_control.miniature.obedience import load_classifier
from refine_control.miniature.scene_shards import scene_photos
from refine_control.miniature.tasks.task import find_oracle
from refine_control.models.card import BUNDLE, EDGE, choose_sampler
from refine_control.models.devices import best_device
from refine_control.models.packed import pack
from refine_control.picture_grid import picture_grid, repaint_grid
from refine_control.randomness import derive_seed
from refine_control.records import INPAINT
from refine_control.storage import only_writer, write_output
from refine_control.study.compare import compare
from refine_control.study.curves import layer_curves, term_curves
from refine_control.study.evaluate import Written, sampler_facts, summarise_models, write_results
from refine_control.study.feature_metrics import FeatureNetworks
from refine_control.study.materials import Bar, Comparison, prepare_data
from refine_control.study.model_cost import load_models, model_costs
from refine_control.study.plan import TEACHER, Budget, read_budget, read_rows, row_recipes
from refine_control.study.report import command_line
from refine_control.study.runs import make_sampler, train_row
from refine_control.study.signatures import signatures
from refine_control.study.summary import Summary
from refine_control.training.run import fast_precision

SHOWN = {"fc": "fc_inherit", "ours": "balanced"}
"""The students by the names they are shown under, and their rows of rows.yaml."""
EDGE_SCENES = 8
"""That the shipped student and the teacher paint before training."""
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


def open_with_edge(out: Path, bar: Bar, say: Callable[[str], None]) -> str:
    """Paints a few scenes by the teacher and by the shipped student for few steps, before anything is trained.

    Writes `edge.png` and passes one sentence to `say`: seconds a picture of both. Returns that sentence."""
    photos = list(scene_photos(derive_seed("demo", "edge"), 0, EDGE_SCENES))
    backbone, controlnets, _ = load_models("mini", None, {"edge": EDGE})
    if backbone.device.type == "cpu":
        pack(backbone.vae, backbone.transformer, *controlnets.values())
    samplers = {name: choose_sampler("mini", folder, {}) for name, folder in ((TEACHER, None), ("edge", "edge"))}
    result = compare(backbone, controlnets, photos, samplers, None, bar("teacher and edge student"))
    write_output(out / "edge.png", picture_grid(repaint_grid(photos, result.images)))
    teacher, edge = (result.seconds[name] for name in (TEACHER, "edge"))
    few = samplers["edge"].num_inference_steps
    sentence = (
        f"The shipped edge student, half the layers and {few} step{'s' * (few > 1)} without guidance, paints a picture "
        f"in {edge:.3f} s; the teacher with {samplers[TEACHER].num_inference_steps} guided steps needs {teacher:.3f} "
        f"s, {teacher / edge:.0f} times as long. Both are in {out / 'edge.png'}."
    )
    say(sentence)
    return sentence


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    budget: str = "demo",
    steps: int | None = None,
    bar: Any = None,
    say: Callable[[str], None] = print,
) -> Written:
    """Runs the comparison of `budget` (a row of recipes/mini/budgets.yaml) with one training seed in `out`.

    `bar(label)` gives a progress callback for each part; `say` prints what is known before the report. The same call
    continues what was interrupted. Raises what the verbs raise."""
    precision = fast_precision(best_device())
    numbers = read_budget(budget, steps).model_copy(update={"precision": precision})
    rows = {name: read_rows()[key] for name, key in SHOWN.items()}
    progress = bar or (lambda label: None)
    with only_writer(out):
        out.mkdir(parents=True, exist_ok=True)
        opening = open_with_edge(out, progress, say)
        comparison = Comparison(numbers, out)
        prepare_data(comparison, rows.values(), progress)
        trained = {name: train_row(name, row, comparison, seed, progress) for name, row in rows.items()}
        photos, sampler = comparison.test_photos(), make_sampler(numbers)
        students = {name: folder for name in ("ours", "fc") if (folder := trained[name].student)}
        backbone, controlnets, own_backbones = load_models("mini", None, students)
        costs = model_costs(backbone, controlnets, "mini", students, sampler.precision, own_backbones=own_backbones)
        networks = FeatureNetworks(load_classifier(BUNDLE), oracle=find_oracle(INPAINT, photos))
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
        more: dict[str, Any] = {"sentences": [*_sentences(summary, costs, numbers), opening], "curves": curves}
        return write_results(out, TITLE, photos, result, summary, costs, facts, **more)
