"""The plan of memory against torch's own allocator in real steps, what fits, and steps in other types."""

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
from refine_control.training.memory import at_most, micro_batches, plan_memory
from refine_control.training.memory_choice import choose, fitted, smallest_change, with_settings
from refine_control.training.objectives import Batch
from refine_control.training.optimizer import MasterWeights
from refine_control.training.run import prepare

EIGHT_BITS = {"optimizer": {"kind": "adamw8bit"}, "frozen": "int8"}


@pytest.fixture(scope="module")
def model(tiny_backbone, tmp_path_factory):
    """Of four blocks, its teacher's residuals not zero."""
    folder, pipeline = tmp_path_factory.mktemp("model") / "tiny", copy.copy(tiny_backbone.pipeline)
    torch.manual_seed(0)
    for name, layers in (("transformer", 4), ("controlnet", 3)):
        network = getattr(pipeline, name)
        setattr(pipeline, name, type(network).from_config({**network.config, "num_layers": layers}))
    for parameter in pipeline.controlnet.controlnet_blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
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
        "optimizer": more.pop("optimizer", {}),
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
        ("supervised", {**EIGHT_BITS, "gradient_checkpointing": True, "checkpointed_blocks": 3, "precision": "bf16"}),
        ("self_supervised", {"device_batch_size": 2, "precision": "bf16"}),
        ("from_scratch", {}),
        ("guidance", {}),
        ("phases", {"student": {"backbone": "whole"}}),
        ("end_points", {"student": {"backbone": "lora"}}),
    ],
    ids=["stage 1", "bf16, mean", "checkpointing", "8 bits", "stage 2, split", "fc", "guidance", "whole", "lora"],
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
    alone = plan_memory(make(model, precision="bf16", ema_decay=0.9))
    assert plans[0].student == 2 * alone.student  # with the copy that one process paints with
    sums = sum(getattr(plans[0], name) for name in ("masters", "moments", "average"))
    assert plans[0].peak - plans[1].peak >= 0.75 * sums - 16


def test_what_is_offloaded_is_not_on_the_device(model):
    options = {"precision": "bf16", "ema_decay": 0.9, "engine": "fsdp2"}
    plans = {
        offload: plan_memory(make(model, **options, offload=offload), processes=2)
        for offload in ("none", "mean", "moments")
    }
    whole, mean, moments = plans.values()
    assert (whole.offloaded, mean.offloaded, moments.offloaded) == (0, whole.average, whole.average + whole.moments)
    for plan in (mean, moments):
        assert plan.peak == whole.peak - plan.offloaded
        assert plan.resident == whole.resident - plan.offloaded
        assert "in the host's memory" in plan.text
    assert plan_memory(make(model, **options, offload="moments"), cpu_kernels=True).offloaded == 0


def test_blocks_that_recompute_save_what_they_keep(model):
    counts = 0, 1, 4
    recomputed = [{"gradient_checkpointing": True, "checkpointed_blocks": count} for count in counts]
    plans = [plan_memory(make(model, **each), cpu_kernels=True) for each in ({}, *recomputed[1:], recomputed[0])]
    kept, flops = ([fn(each) for each in plans] for fn in (lambda p: sum(p.activations.values()), lambda p: p.flops))
    assert kept == sorted(set(kept), reverse=True)
    assert flops == sorted(set(flops))


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


def test_auto_changes_first_what_changes_no_number():
    settings = ["training.batch_size=12", "training.gradient_checkpointing=true", "training.ema_decay=0.9"]
    recipe = load_recipe("mini/ours_stage1", settings)
    asked = []

    def chosen(limit, host=True):
        """A step takes 11 and 8 for each sample; moments 6 of the former, frozen weights 3, the mean 1."""

        def fits(other):
            asked.append(t := other.training)
            recomputed = t.gradient_checkpointing * (t.checkpointed_blocks or 36) / 36
            moments = 0 if host and t.offload == "moments" else 2 if other.optimizer.kind == "adamw8bit" else 6
            fixed = 1 + moments + (not host or t.offload == "none") + (1 if t.frozen == "int8" else 3)
            return fixed + t.device_batch_size * (8 - 6 * recomputed) <= limit

        if (other := choose(recipe, fits)) is None:
            return None
        t, kind = other.training, other.optimizer.kind
        return t.device_batch_size, t.offload, t.gradient_checkpointing, t.checkpointed_blocks, kind, t.frozen

    assert chosen(107) == (12, "none", False, 0, "adamw", "precision")
    assert chosen(46) == (4, "none", False, 0, "adamw", "precision")
    assert chosen(18) == (1, "mean", False, 0, "adamw", "precision")
    assert chosen(12) == (1, "moments", False, 0, "adamw", "precision")
    assert chosen(9) == (1, "moments", True, 18, "adamw", "precision")
    assert chosen(6) == (1, "moments", True, 0, "adamw", "precision")
    assert chosen(5.9) == (1, "moments", True, 25, "adamw", "int8")
    assert chosen(12, host=False) == (1, "none", True, 30, "adamw", "int8")
    assert chosen(8, host=False) == (1, "none", True, 30, "adamw8bit", "int8")
    assert chosen(3) is None
    assert len(asked) < 100


def test_stage_1_of_sd3_at_1024_px_fits_48_gb_without_checkpointing():
    settings = ["training.device_batch_size=2", "training.gradient_checkpointing=false"]
    assert plan_memory(load_recipe("sd3/balanced_stage1", settings), (128, 128)).peak < 0.9 * 48e9


def test_stage_1_of_sd3_at_512_px_fits_24_gb_in_8_bits():
    settings = ["training.device_batch_size=1", "training.gradient_checkpointing=false", "optimizer.kind=adamw8bit"]
    plan = plan_memory(load_recipe("sd3/balanced_stage1", [*settings, "training.frozen=int8"]), (64, 64))
    assert plan.peak < 0.9 * 24e9
    assert plan.moments < 0.52 * plan.masters, "two bytes and scales, of four"
    assert plan.frozen < 4.6e9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "memory", "samples", "offload"),
    [(64, 24e9, 1, "moments"), (128, 141e9, 8, "none")],
    ids=["512 px on 24 GB", "8 at 1024 px on 141 GB"],
)
def test_auto_fits_stage_1_of_sd3_without_checkpointing_and_without_8_bits(side, memory, samples, offload):
    chosen = fitted(load_recipe("sd3/balanced_stage1"), memory, "a GPU", size=(side, side))
    training = chosen.training
    assert (training.device_batch_size, training.offload, training.gradient_checkpointing) == (samples, offload, False)
    assert (chosen.optimizer.kind, training.frozen) == ("adamw", "precision")


def test_the_bound_that_spares_small_steps_their_plan_is_above_it(model):
    for recipe in (make(model), make(model, precision="bf16")):
        assert plan_memory(recipe, cpu_kernels=True).peak < at_most(recipe, None, 1) < math.inf


BF16 = {"training.precision": "bf16"}


def train(recipe):
    """Losses and gradient norms of three steps on one batch, and how the weights moved."""
    networks = prepare(recipe, torch.device("cpu"))
    objective = make_objective(recipe.objective, networks)
    master = MasterWeights(objective.trainable(), recipe.optimizer)
    start, values = [each.detach().clone() for each in master.masters], []
    batch, draw = real_batch(recipe, networks.backbone, 4)
    for step in range(3):
        losses = objective.losses(batch, draw)
        losses.loss.backward()
        master.accumulate()
        values.append((float(losses.loss.detach()), float(master.step(1e-4, step))))
    moved = torch.cat([(m.detach() - s).flatten() for m, s in zip(master.masters, start, strict=True)])
    return torch.tensor(values), moved


@pytest.fixture(scope="module")
def reference(model):
    recipe = with_settings(make(model, student={"init": "teacher"}), {"objective.feature_normalisation": "none"})
    return recipe, *train(recipe)


@pytest.mark.parametrize(
    ("settings", "scalars", "update"),
    [
        (BF16, 0.005, 0.15),
        ({"optimizer.kind": "adamw8bit"}, 1e-5, 0.03),
        ({"training.frozen": "int8"}, 1e-4, 0.02),
        ({**BF16, "training.frozen": "fp8"}, 0.005, 0.15),
        pytest.param({"training.compile": True}, 1e-4, 0.05, marks=pytest.mark.slow),
    ],
    ids=["bf16", "8-bit moments", "int8", "fp8", "compiled"],
)
def test_a_variant_is_near_the_step_in_fp32(reference, settings, scalars, update):
    """Loss and gradient norm of each step, and the update of all of them, relative.

    AdamW's first updates have one size whatever the gradient, so rounding moves the weights whose gradient is near 0:
    another order of the same sums (compiled) changes the gradient norm by 1e-5 and the update by 3 %."""
    recipe, values, moved = reference
    other_values, other_moved = train(with_settings(recipe, settings))
    assert torch.allclose(other_values, values, rtol=scalars)
    error = float((other_moved - moved).norm() / moved.norm())
    assert 0 < error < update
