"""Cost of each ControlNet in one model: operations counted, steps timed alternately, memory of a fresh process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from refine_control.config import SamplerConfig
from refine_control.metrics.cost import CountedCost, ModelCost, count_flops, count_parameters, interleaved, run_fresh
from refine_control.models.backbone import Backbone, predict_velocity
from refine_control.models.controlnet import control_residuals
from refine_control.models.cpu_kernels import in_precision
from refine_control.models.devices import best_device
from refine_control.models.loading import load_backbone, load_controlnet


def _step(backbone: Backbone, controlnet: Any) -> tuple[Any, Any]:
    """Two functions: one ControlNet pass, and one denoising step, on a picture of the model's size."""
    transformer = backbone.transformer
    size, channels = transformer.config["sample_size"], transformer.config["in_channels"]
    embeds, pooled = backbone.encode_prompts(["a red circle"])
    device, dtype = transformer.device, transformer.dtype
    controlnet.to(device)
    noisy = torch.zeros(1, channels, size, size, device=device, dtype=dtype)
    extra = controlnet.config["extra_conditioning_channels"]
    cond = torch.zeros(1, channels + extra, size, size, device=device, dtype=dtype)
    sigmas = torch.full((1,), 0.5, device=device)

    @torch.no_grad()
    def controlled() -> list[torch.Tensor]:
        return control_residuals(controlnet, noisy, sigmas, embeds, cond, backbone.pooled_width)

    @torch.no_grad()
    def whole() -> torch.Tensor:
        return predict_velocity(transformer, noisy, sigmas, embeds, pooled, controlled())

    return controlled, whole


def counted_cost(backbone: Backbone, controlnet: Any) -> CountedCost:
    """Counts by one forward pass of each."""
    controlled, whole = _step(backbone, controlnet)
    layers, params = len(controlnet.transformer_blocks), count_parameters(controlnet)
    return CountedCost(layers, params, count_flops(controlled) / 1e9, count_flops(whole) / 1e9)


def _peak_in_fresh_process(model: str, folder: str | None, precision: str) -> int:
    """Bytes at the peak of a process that loads the model and samples one picture; 0 where it could not."""
    try:
        return run_fresh(_paint_one, model, folder, precision, device=best_device().type).peak_memory
    except Exception:  # whatever ends it, the costs go on without this number
        return 0


def model_costs(
    backbone: Backbone,
    controlnets: Mapping[str, Any],
    model: str,
    folders: Mapping[str, str | None],
    precision: str = "fp32",
    repeats: int = 20,
) -> dict[str, ModelCost]:
    """Costs by name; ControlNets of one shape share one memory measurement. `folders` say where each came from
    (None: the model's own). All networks are cast to `precision`, in place."""
    in_precision(precision, backbone, *controlnets.values())
    steps = {name: _step(backbone, controlnet)[1] for name, controlnet in controlnets.items()}
    times = interleaved(steps, repeats=repeats, warmup=2)
    peaks: dict[int, int] = {}
    out = {}
    for name, controlnet in controlnets.items():
        counted = counted_cost(backbone, controlnet)
        if counted.num_layers not in peaks:
            peaks[counted.num_layers] = _peak_in_fresh_process(model, folders[name], precision)
        out[name] = ModelCost(*counted, times[name].median, peaks[counted.num_layers])
    return out


def compare(model: str, folders: Mapping[str, Path], teacher: str | None = None) -> dict[str, ModelCost]:
    """`refine-control cost`: `teacher` (the model's own ControlNet by default) and those in `folders`."""
    backbone = load_backbone(model, load_controlnet(teacher) if teacher else None, device=best_device())
    controlnets = {"teacher": backbone.pipeline.controlnet, **{n: load_controlnet(f) for n, f in folders.items()}}
    sources = {"teacher": teacher, **{n: str(f) for n, f in folders.items()}}
    return model_costs(backbone, controlnets, model, sources)


def _paint_one(model: str, folder: str | None, precision: str) -> None:
    """Loads, and samples one picture in two steps."""
    import numpy as np

    from refine_control.pipeline.painting import make_pipeline, run_pipeline

    torch.set_num_threads(1)
    loaded = load_controlnet(folder) if folder else None
    backbone = load_backbone(model, loaded, device=best_device())
    controlnet, side = loaded or backbone.pipeline.controlnet, backbone.geometry.side
    in_precision(precision, backbone, controlnet)
    image, mask = np.full((side, side, 3), 128, np.uint8), np.zeros((side, side), bool)
    mask[side // 4 : side // 2, side // 4 : side // 2] = True
    pipeline = make_pipeline(backbone, controlnet)
    run_pipeline(pipeline, backbone, image, mask, "a red circle", SamplerConfig(num_inference_steps=2))
