"""The plan of memory against torch's own allocator in real steps, and what fits."""

import copy
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from refine_control.config import Recipe
from refine_control.metrics.cost import count_flops
from refine_control.models import skeleton
from refine_control.models.loading import load_backbone
from refine_control.recipe_files import load_recipe
from refine_control.storage import write_json
from refine_control.training.assembly import make_objective
from refine_control.training.few_step import fields_read
from refine_control.training.loop import Draw
from refine_control.training.memory import at_most, micro_batches, plan_memory, smallest_change
from refine_control.training.objectives import Batch
from refine_control.training.optimizer import MasterWeights
from refine_control.training.run import prepare


@pytest.fixture(scope="module")
def model(tiny_backbone, tmp_path_factory):
    """Of four blocks."""
    folder, pipeline = tmp_path_factory.mktemp("model") / "tiny", copy.copy(tiny_backbone.pipeline)
    for name, layers in (("transformer", 4), ("controlnet", 3)):
        network = getattr(pipeline, name)
        setattr(pipeline, name, type(network).from_config({**network.config, "num_layers": layers}))
    pipeline.save_pretrained(folder)
    write_json(folder / "refine_control.json", {"max_sequence_length": 0})
    return str(folder)


def make(model, kind="supervised", **more):
    few = {"x0_source": "teacher"} if kind in ("end_points", "guidance", "phases", "self_supervised") else {}
    values = {
        "name": "tiny",
        "model": model,
        "student": {"num_layers": 2, **more.pop("student", {})},
        "objective": {"kind": kind, "feature_normalisation": "layer", **few, "few_step": {"first": 0.3}},
        "training": {"batch_size": 8, **more},
    }
    return Recipe.model_validate(values)


def real_batch(recipe, backbone, count):
    config, draw = backbone.transformer.config, Draw(0, "real", 0, range(count))
    shape, fields = (config["in_channels"], 8, 8), fields_read(recipe.objective)
    text, pooled = (each[0].shape for each in backbone.encode_prompts([""]))
    labeled = count if recipe.objective.kind in ("supervised", "from_scratch") else 0
    batch = Batch(
        *(draw.normals(name, *shape) for name in ("latents", "cond_latents")),
        (draw.normals("mask", 1, 8, 8) > 0).float(),
        draw.normals("embeds", *text),
        draw.normals("pooled", *pooled),
        draw.slots,
        labeled,
        noise=draw.normals("noise", *shape) if "noise" in fields else None,
        path=draw.normals("path", 7, *shape) if "path" in fields else None,
        empty=(torch.zeros(1, *text), torch.zeros(1, *pooled)) if "empty" in fields else None,
    )
    return batch, draw


def measured(recipe):
    """Bytes that torch's allocator had at most in a second step, and FLOPs of that step."""
    samples, count = micro_batches(recipe)
    flops = []

    def update(objective, master, batch, draw):
        for _ in range(count):
            statistics = objective.statistics(batch, draw) if count > 1 else None
            (objective.losses(batch, draw, statistics).loss / count).backward()
            master.accumulate()
        master.step(1e-4, 0, 1.0)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        networks = prepare(recipe, torch.device("cpu"))
        objective = make_objective(recipe.objective, networks)
        master = MasterWeights(objective.trainable(), recipe.optimizer, recipe.training.ema_decay)
        update(objective, master, *real_batch(recipe, networks.backbone, samples))
        update(objective, master, *real_batch(recipe, networks.backbone, samples))
    batch, draw = real_batch(recipe, networks.backbone, samples)
    flops = count_flops(lambda: update(objective, master, batch, draw)) / count / samples
    events = [each for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    backbone = networks.backbone  # VAE and text encoders stay on the CPU when a GPU trains
    unused = [backbone.vae, *backbone.text_encoders]
    unused += [backbone.pipeline.controlnet] if networks.teacher is None else []
    return peak - sum(p.nbytes for part in unused for p in part.parameters()), flops


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("supervised", {}),
        ("supervised", {"precision": "bf16", "ema_decay": 0.9}),
        ("supervised", {"gradient_checkpointing": True}),
        ("self_supervised", {"device_batch_size": 2, "precision": "bf16"}),
        ("from_scratch", {}),
        ("guidance", {}),
        ("phases", {"student": {"backbone": "whole"}}),
        ("end_points", {"student": {"backbone": "lora"}}),
    ],
    ids=["stage 1", "bf16, mean", "checkpointing", "stage 2, split", "fc", "guidance", "whole", "lora"],
)
def test_the_plan_is_the_peak_of_a_real_step_within_a_tenth(model, kind, options):
    recipe = make(model, kind, **options)
    plan, (peak, flops) = plan_memory(recipe, cpu_kernels=True), measured(recipe)
    assert plan.peak == pytest.approx(peak, rel=0.1)
    assert plan.flops == pytest.approx(flops, rel=0.01)


def test_processes_that_share_parameters_hold_parts_of_the_sums(model):
    plans = [plan_memory(make(model, precision="bf16", ema_decay=0.9, engine=e), processes=4) for e in ("ddp", "fsdp2")]
    for name in ("masters", "moments", "average"):
        assert getattr(plans[1], name) == pytest.approx(getattr(plans[0], name) / 4, rel=0.01)
    assert plans[0].samples == plans[1].samples == 2
    sums = sum(getattr(plans[0], name) for name in ("masters", "moments", "average"))
    assert plans[0].peak - plans[1].peak >= 0.75 * sums - 16


@pytest.mark.slow
def test_the_plan_of_the_mini_model_is_the_peak_of_its_step():
    recipe = load_recipe("mini/balanced_stage1", ["training.batch_size=8"])
    assert plan_memory(recipe, cpu_kernels=True).peak == pytest.approx(measured(recipe)[0], rel=0.1)


def test_a_skeleton_has_the_shapes_of_the_model(model):
    there, bare = load_backbone(model), skeleton.skeleton(model)
    for part in ("transformer", "vae", "controlnet", "text_encoder", "text_encoder_2"):
        shapes = [{n: p.shape for n, p in getattr(b.pipeline, part).state_dict().items()} for b in (there, bare)]
        assert shapes[0] == shapes[1], part
    assert bare.shift == there.shift
    assert skeleton.text_tokens(bare) == there.encode_prompts([""])[0].shape[1]


def test_the_smallest_change_takes_the_most_samples_and_then_checkpointing():
    recipe = load_recipe("mini/ours_stage1", ["training.batch_size=12"])

    def change(limit):
        def fits(other):
            t = other.training
            factor = 1 if t.gradient_checkpointing else 4
            return t.device_batch_size * factor * (1 if t.precision == "fp32" else 0.5) <= limit

        return smallest_change(recipe, fits)

    assert change(17) == ["training.device_batch_size=4"]
    assert change(3) == ["training.device_batch_size=3", "training.gradient_checkpointing=true"]
    assert (
        change(0.5) == [*change(3)[1:], "training.precision=bf16"][-2:] or change(0.5)[-1] == "training.precision=bf16"
    )
    assert change(0.1) == []


def test_the_bound_that_spares_small_steps_their_plan_is_above_it(model):
    for recipe in (make(model), make(model, precision="bf16")):
        assert plan_memory(recipe, cpu_kernels=True).peak < at_most(recipe, None, 1) < math.inf
