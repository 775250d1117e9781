"""Size and arithmetic of SD3 at 1024 px, counted on tensors without data: `python docs/sd3_cost.py`.

Prints the table of docs/sd3.md. Nothing is downloaded and nothing runs: networks of SD3's published configuration stand
on torch's meta device, where the operations of one call can be counted. `tests/test_docs.py` compares the table.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel

from refine_control.injection import expand_residuals
from refine_control.metrics.cost import count_flops, count_parameters
from refine_control.models.skeleton import PUBLISHED
from refine_control.models.skeleton import SD3 as MODEL
from refine_control.recipe_files import load_recipe
from refine_control.study.materials import PATH_STEPS

SD3 = PUBLISHED[MODEL]["transformer"]
"""stabilityai/stable-diffusion-3-medium-diffusers, transformer/config.json."""
TOKENS = 333
"""77 of CLIP and 256 of T5."""
LATENTS = 128
"""Side of the latents of a 1024-px image."""
GUIDED_STEPS = 28
PAIRS = 20_000
"""Samples whose paths are cached: an assumption."""
ROLLED_OUT = 0.75
"""Steps of the target network for each sample of `sd3/edge`, about: see `training.few_step`."""
RATE = 300
"""TFLOP/s that a large GPU might sustain: an assumption, not a measurement."""


def text_inputs() -> dict[str, torch.Tensor]:
    """What both networks read beside their latents, for one image."""
    return {
        "encoder_hidden_states": torch.empty(1, TOKENS, SD3["joint_attention_dim"]),
        "pooled_projections": torch.empty(1, SD3["pooled_projection_dim"]),
        "timestep": torch.empty(1),
    }


def run_controlnet(controlnet: Any) -> list[torch.Tensor]:
    """The residuals of one image, one for each block."""
    latents, condition = torch.empty(1, 16, LATENTS, LATENTS), torch.empty(1, 17, LATENTS, LATENTS)
    out = controlnet(hidden_states=latents, controlnet_cond=condition, **text_inputs())
    return expand_residuals(list(out.controlnet_block_samples))


def run_transformer(transformer: Any, residuals: list[torch.Tensor]) -> torch.Tensor:
    """The velocity of one image."""
    latents = torch.empty(1, 16, LATENTS, LATENTS)
    return transformer(hidden_states=latents, block_controlnet_hidden_states=residuals, **text_inputs()).sample


def training_step(transformer: Any, teacher: Any, student: Any) -> None:
    """Forward and backward of stage 1 for one sample, without gradient checkpointing."""
    with torch.no_grad():
        target = run_transformer(transformer, run_controlnet(teacher))
    residuals = run_controlnet(student)
    velocity = run_transformer(transformer, residuals)
    feature_loss = torch.stack([residual.square().mean() for residual in residuals]).sum()
    ((velocity - target).square().mean() + feature_loss).backward()


def table(training: bool = True) -> list[str]:
    """The lines of the table in docs/sd3.md; those of a training step, which take seconds to count, on demand."""
    with torch.device("meta"):
        transformer: Any = SD3Transformer2DModel(**SD3).requires_grad_(False)
        nets: dict[int, Any] = {
            layers: SD3ControlNetModel(**{**SD3, "num_layers": layers}, extra_conditioning_channels=1)
            for layers in (23, 12)
        }
        teacher, student = nets[23].requires_grad_(False), nets[12]
        residuals = run_controlnet(teacher)
        flops = {
            "base": count_flops(lambda: run_transformer(transformer, residuals)),
            "teacher": count_flops(lambda: run_controlnet(teacher)),
            "student": count_flops(lambda: run_controlnet(student)),
        }
        step = count_flops(lambda: training_step(transformer, teacher, student)) if training else 0
    params = {"base": transformer, "teacher": teacher, "student": student}
    params = {name: count_parameters(network) for name, network in params.items()}
    calls = {name: flops["base"] + flops[name] for name in ("teacher", "student")}
    images = {name: 2 * GUIDED_STEPS * call for name, call in calls.items()}
    # fp32 master weights, two moments and summed gradients, beside bf16 weights and gradients
    optimizer = params["student"] * (4 * 4 + 2 * 2)
    frozen = 2 * (params["base"] + params["teacher"])
    again = step + flops["base"] + flops["student"]
    stages = [load_recipe(f"sd3/balanced_stage{stage}").training for stage in (1, 2)]
    samples = sum(stage.steps * stage.batch_size for stage in stages)
    edge = load_recipe("sd3/edge")
    few = edge.training.steps * edge.training.batch_size
    # forward and backward with checkpointing (the stage-1 step without its teacher), and the rolled-out points' steps
    few_step = again - calls["teacher"] + ROLLED_OUT * calls["student"]
    path = 2 * PATH_STEPS["sd3"] * calls["teacher"]
    rows = [
        ("at 1024 px, one image or sample", "parameters", "memory", "arithmetic"),
        ("---", "---:", "---:", "---:"),
        *(
            (title, f"{params[name]:,}", f"{2 * params[name] / 1e9:.1f} GB", f"{flops[name] / 1e12:.2f} TFLOP")
            for name, title in (
                ("base", "SD3-medium transformer, bf16, one forward pass"),
                ("teacher", "teacher ControlNet, 23 layers, likewise"),
                ("student", "student ControlNet, 12 layers, likewise"),
            )
        ),
        ("inpainting by the teacher, 28 guided steps", "", "", f"{images['teacher'] / 1e12:,.0f} TFLOP"),
        ("inpainting by the student, 28 guided steps", "", "", f"{images['student'] / 1e12:,.0f} TFLOP"),
        ("inpainting by the student, 4 steps without guidance", "", "", f"{4 * calls['student'] / 1e12:,.0f} TFLOP"),
        ("inpainting by the student, 1 step without guidance", "", "", f"{calls['student'] / 1e12:,.0f} TFLOP"),
        ("training: weights, gradients, optimizer; no activations", "", f"{(optimizer + frozen) / 1e9:.1f} GB", ""),
        ("training, stage 1, a sample", "", "", f"{step / 1e12:.0f} TFLOP"),
        ("the same with gradient checkpointing", "", "", f"{again / 1e12:.0f} TFLOP"),
        (f"both stages, the same for {samples:,} samples", "", "", f"{samples * again / 1e18:.1f} EFLOP"),
        (f"the same at an assumed {RATE} TFLOP/s", "", "", f"{samples * again / (RATE * 1e12) / 3600:.0f} hours"),
    ]
    rows += [
        (f"path of the teacher, {PATH_STEPS['sd3']} guided steps, a sample", "", "", f"{path / 1e12:,.0f} TFLOP"),
        ("few steps (`sd3/edge`) with checkpointing, a sample", "", "", f"{few_step / 1e12:.0f} TFLOP"),
        (f"few steps, the same for {few:,} samples", "", "", f"{few * few_step / 1e18:.1f} EFLOP"),
        (f"paths of {PAIRS:,} samples", "", "", f"{PAIRS * path / 1e18:.1f} EFLOP"),
        (
            f"both at an assumed {RATE} TFLOP/s",
            "",
            "",
            f"{(few * few_step + PAIRS * path) / (RATE * 1e12) / 3600:.0f} hours",
        ),
    ]
    shown = rows if training else rows[:-9]
    return ["| " + " | ".join(row) + " |" for row in shown]


if __name__ == "__main__":
    print("\n".join(table()))
