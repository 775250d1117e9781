"""Cost of each ControlNet in one model: operations counted, steps timed alternately, memory of a fresh process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from refine_control.conditions.condition import Shown, has_region
from refine_control.config import Precision, SamplerConfig
from refine_control.metrics.cost import (
    CountedCost,
    ModelCost,
    count_flops,
    count_parameters,
    interleaved,
    peak_memory_fresh,
)
from refine_control.models.backbone import Backbone, predict_velocity
from refine_control.models.controlnet import ControlNet, control_residuals, injection_of, layer_modules
from refine_control.models.cpu_kernels import in_precision
from refine_control.models.devices import best_device
from refine_control.models.families import extra_channels
from refine_control.models.loading import load_backbone, load_controlnet, load_painter, load_student
from refine_control.pipeline.painting import paint
from refine_control.study.plan import TEACHER


def _step(backbone: Backbone, controlnet: Any) -> tuple[Any, Any]:
    """Two functions: one ControlNet pass, and one denoising step, on a picture of the model's size."""
    transformer = backbone.transformer
    size, channels = backbone.geometry.side // backbone.pipeline.vae_scale_factor, backbone.latent_channels
    embeds, pooled = backbone.encode_prompts(["a red circle"])
    device, dtype = transformer.device, transformer.dtype
    controlnet.to(device)
    noisy = torch.zeros(1, channels, size, size, device=device, dtype=dtype)
    extra = extra_channels(controlnet.config)
    cond = torch.zeros(1, channels + extra, size, size, device=device, dtype=dtype)
    sigmas = torch.full((1,), 0.5, device=device)

    @torch.no_grad()
    def controlled() -> list[torch.Tensor]:
        return control_residuals(controlnet, noisy, sigmas, embeds, cond, pooled)

    @torch.no_grad()
    def whole() -> torch.Tensor:
        return predict_velocity(transformer, noisy, sigmas, embeds, pooled, controlled(), injection_of(controlnet))

    return controlled, whole


def counted_cost(backbone: Backbone, controlnet: Any) -> CountedCost:
    """Counts by one forward pass of each."""
    controlled, whole = _step(backbone, controlnet)
    layers, params = len(layer_modules(controlnet)), count_parameters(controlnet)
    return CountedCost(layers, params, count_flops(controlled) / 1e9, count_flops(whole) / 1e9)


def _peak_in_fresh_process(model: str, folder: str | Path | None, precision: Precision) -> int:
    """Bytes at the peak of a process that loads the model and samples one picture; 0 where it could not."""
    return peak_memory_fresh(_sample_once, model, folder, precision, device=best_device().type)


def _sample_once(model: str, folder: str | Path | None, precision: Precision) -> None:
    """Loads a model and repaints one picture in two steps."""
    torch.set_num_threads(1)
    backbone, controlnet = load_painter(model, folder, best_device())
    in_precision(precision, backbone, controlnet)
    side = backbone.geometry.side
    image, mask = np.full((1, side, side, 3), 128, np.uint8), np.zeros((1, side, side), bool)
    mask[:, side // 4 : side // 2, side // 4 : side // 2] = True
    shown = Shown(image, mask if has_region(controlnet.config) else None)
    paint(backbone, controlnet, shown, ["a red circle"], SamplerConfig(num_inference_steps=2))


class Models(NamedTuple):
    """What is compared: teacher and students in one model."""

    backbone: Backbone
    controlnets: dict[str, ControlNet]
    own_backbones: dict[str, Backbone]
    """By name, the backbones of students that paint with a transformer of their own."""


def load_models(model: str, teacher: str | Path | None, students: Mapping[str, Path]) -> Models:
    """A model on the best device with its teacher (None: its own ControlNet), and the students by name.

    Raises what `load_student` raises."""
    controlnet = load_controlnet(teacher) if teacher else None
    backbone = load_backbone(model, controlnet, device=best_device(), controlnet_name=teacher)
    loaded = {name: load_student(backbone, folder) for name, folder in students.items()}
    own_backbones = {name: around for name, (around, _) in loaded.items() if around is not backbone}
    return Models(
        backbone,
        {TEACHER: backbone.pipeline.controlnet, **{name: controlnet for name, (_, controlnet) in loaded.items()}},
        own_backbones,
    )


def model_costs(
    backbone: Backbone,
    controlnets: Mapping[str, Any],
    model: str,
    sources: Mapping[str, str | Path | None],
    precision: Precision = "fp32",
    repeats: int = 20,
    own_backbones: Mapping[str, Backbone] | None = None,
) -> dict[str, ModelCost]:
    """Costs by name; ControlNets of one shape share one memory measurement. `sources` say where each came from
    (the teacher by default from the model), `own_backbones` are as in `compare`. Casts to `precision` in place."""
    backbones = {**dict.fromkeys(controlnets, backbone), **(own_backbones or {})}
    for name, controlnet in controlnets.items():
        in_precision(precision, backbones[name], controlnet)
    steps = {name: _step(backbones[name], controlnet)[1] for name, controlnet in controlnets.items()}
    times = interleaved(steps, repeats=repeats, warmup=2)
    peaks: dict[int, int] = {}
    out = {}
    for name, controlnet in controlnets.items():
        counted = counted_cost(backbones[name], controlnet)
        if counted.num_layers not in peaks:
            peaks[counted.num_layers] = _peak_in_fresh_process(model, sources.get(name), precision)
        out[name] = ModelCost(*counted, times[name].median, peaks[counted.num_layers])
    return out


def compare(model: str, students: Mapping[str, Path], teacher: str | None = None) -> dict[str, ModelCost]:
    """`refine-control cost`: `teacher` (the model's own ControlNet by default) and `students`, folders by name."""
    backbone, controlnets, own_backbones = load_models(model, teacher, students)
    return model_costs(backbone, controlnets, model, {TEACHER: teacher, **students}, own_backbones=own_backbones)
