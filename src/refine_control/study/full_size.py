"""Size and arithmetic of SD3 at 1024 px, counted on tensors without data, as `refine-control plan` counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from refine_control.metrics.cost import count_parameters
from refine_control.metrics.live_bytes import LiveBytes
from refine_control.models.backbone import predict_velocity
from refine_control.models.controlnet import build_student, control_residuals
from refine_control.models.skeleton import SD3, skeleton, text_tokens
from refine_control.recipe_files import load_recipe
from refine_control.study.materials import PATH_STEPS
from refine_control.study.tables import Table
from refine_control.training.memory import fused_attention, plan_memory

LAYERS, GUIDED_STEPS, PAIRS = 12, 28, 20_000


def _flops(fn: Callable[[], Any]) -> int:
    live = LiveBytes()
    with torch.no_grad(), fused_attention(), live:
        fn()
    return live.flops


def _networks(teacher_name: str | None) -> dict[str, tuple[int, int]]:
    """Parameters, and FLOP of one pass for one picture, of transformer, teacher and student."""
    backbone = skeleton(SD3, teacher_name)
    transformer, teacher, config = backbone.transformer, backbone.pipeline.controlnet, backbone.transformer.config
    side = backbone.geometry.side // backbone.pipeline.vae_scale_factor
    with torch.device("meta"):
        student: Any = build_student(transformer, teacher, LAYERS, "transformer", 0)
        given = torch.empty(1, 16, side, side), torch.empty(1)
        text = torch.empty(1, text_tokens(backbone), config["joint_attention_dim"])
        cond, pooled = torch.empty(1, 17, side, side), torch.empty(1, config["pooled_projection_dim"])
    controlnets = {"teacher": teacher, "student": student}
    passes = {n: _flops(lambda c=c: control_residuals(c, *given, text, cond, pooled)) for n, c in controlnets.items()}
    residuals = control_residuals(student, *given, text, cond, pooled)
    passes["transformer"] = _flops(lambda: predict_velocity(transformer, *given, text, pooled, residuals))
    return {n: (count_parameters({**controlnets, "transformer": transformer}[n]), passes[n]) for n in passes}


def full_size_table() -> Table:
    """Networks, pictures and training by the `sd3` recipes, whose steps are those that `plan` counts."""
    recipes = [load_recipe(f"sd3/{name}") for name in ("balanced_stage1", "balanced_stage2", "edge")]
    networks = _networks(recipes[0].teacher)
    rows = [
        [title, f"{networks[name][0]:,}", f"{2 * networks[name][0] / 1e9:.1f} GB", _tera(networks[name][1], 2)]
        for name, title in (
            ("transformer", "SD3-medium transformer, bf16, one forward pass"),
            ("teacher", "teacher ControlNet, 23 layers, likewise"),
            ("student", f"student ControlNet, {LAYERS} layers, likewise"),
        )
    ]
    calls = {name: networks["transformer"][1] + networks[name][1] for name in ("teacher", "student")}
    path = 2 * PATH_STEPS["sd3"] * calls["teacher"]
    stage1, edge = (plan_memory(recipe) for recipe in (recipes[0], recipes[2]))  # a sample of stage 2 costs the same
    steps = [recipe.training.steps * recipe.training.batch_size for recipe in recipes]
    stages = steps[0] + steps[1]

    def add(title: str, arithmetic: str = "", memory: str = "") -> None:
        rows.append([title, "", memory, arithmetic])

    for who in ("teacher", "student"):
        add(f"inpainting by the {who}, {GUIDED_STEPS} guided steps", _tera(2 * GUIDED_STEPS * calls[who]))
    add("inpainting by the student, 4 steps without guidance", _tera(4 * calls["student"]))
    add("inpainting by the student, 1 step without guidance", _tera(calls["student"]))
    standing = stage1.resident + stage1.gradients
    add("training: weights, gradients, optimizer; no activations", memory=f"{standing / 1e9:.1f} GB")
    at_once = f"{stage1.samples} samples at once"
    add(f"the same at its peak, checkpointing, {at_once}", memory=f"{stage1.peak / 1e9:.1f} GB")
    add(f"training, stage 1, checkpointing, {at_once}, a sample", _tera(stage1.flops))
    add(f"both stages, {stages:,} samples", _exa(stages * stage1.flops))
    add(f"path of the teacher, {PATH_STEPS['sd3']} guided steps, a sample", _tera(path))
    add(f"paths of {PAIRS:,} samples", _exa(PAIRS * path))
    add("few steps (`sd3/edge`), checkpointing, a sample", _tera(edge.flops))
    add(f"few steps, {steps[2]:,} samples", _exa(steps[2] * edge.flops))
    return Table("SD3 in numbers", ["at 1024 px, one image or sample", "parameters", "memory", "arithmetic"], rows)


def _tera(flops: int, places: int = 0) -> str:
    return f"{flops / 1e12:,.{places}f} TFLOP"


def _exa(flops: int) -> str:
    return f"{flops / 1e18:.1f} EFLOP"
