"""What a baseline of Table 2 costs to run: counted, timed, and weighed in a fresh process, as `model_cost` does."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refine_control.baselines.models import Baseline, load_baseline
from refine_control.baselines.painting import denoising_step, paint
from refine_control.config import Precision, SamplerConfig
from refine_control.metrics.cost import ModelCost, count_flops, count_parameters, peak_memory_fresh, time_call


class BaselineCost(NamedTuple):
    """A single square picture at the baseline's own size, without guidance."""

    model: ModelCost
    """As of a ControlNet in its model; a U-Net has no ControlNet: no layers, no parameters, no FLOP of one."""
    denoiser_params: int
    """Of the U-Net or the transformer."""
    size: int
    """Pixels of a side."""


def baseline_cost(baseline: Baseline) -> BaselineCost:
    """Costs of a loaded baseline; its memory by loading it again in a fresh process, 0 where that fails."""
    controlled, whole = denoising_step(baseline)
    network = baseline.controlnet
    model = ModelCost(
        len(network.transformer_blocks) + len(network.single_transformer_blocks) if network else 0,
        count_parameters(network) if network else 0,
        count_flops(controlled) / 1e9 if controlled else 0.0,
        count_flops(whole) / 1e9,
        time_call(whole, warmup=2, repeats=20).median,
        _peak_in_fresh_process(baseline),
    )
    return BaselineCost(model, count_parameters(baseline.denoiser), baseline.size)


def _peak_in_fresh_process(baseline: Baseline) -> int:
    """Bytes at the peak of a process that loads the baseline on the same device and repaints one picture."""
    precision = "bf16" if "bfloat16" in str(baseline.denoiser.dtype) else "fp32"
    device = str(baseline.denoiser.device)
    arguments = (baseline.name, baseline.size, device, precision)
    return peak_memory_fresh(_paint_one, *arguments, device=device)


def _paint_one(name: str, side: int, place: str, precision: Precision) -> None:
    """Loads, and repaints one picture in two steps."""
    import torch

    torch.set_num_threads(1)
    baseline = load_baseline(name, size=side, device=place, precision=precision)
    image, mask = np.full((1, side, side, 3), 128, np.uint8), np.zeros((1, side, side), bool)
    mask[:, side // 4 : side // 2, side // 4 : side // 2] = True
    sampler = SamplerConfig(num_inference_steps=2, guidance_scale=1.0, precision=precision)
    paint(baseline, image, mask, ["a red circle"], sampler)
