"""What a baseline of Table 2 costs to run: counted, timed, and weighed in a fresh process, as `model_cost` does."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import numpy as np

from refine_control.baselines.models import Baseline, load_baseline
from refine_control.baselines.painting import denoising_step, held_precision, paint
from refine_control.config import Precision, SamplerConfig
from refine_control.metrics.cost import ModelCost, count_flops, count_parameters, peak_memory, time_call


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
    precision, device = held_precision(baseline), str(baseline.denoiser.device)
    arguments = [baseline.name, str(baseline.size), precision, device]
    command = [sys.executable, "-m", "refine_control.baselines.cost", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(result.stdout.split()[-1]) if result.returncode == 0 else 0


def _main(name: str, size: str, precision: Precision, device: str) -> None:
    """Loads, repaints one picture in two steps, prints the peak."""
    import torch

    torch.set_num_threads(1)
    side = int(size)
    baseline = load_baseline(name, size=side, precision=precision, device=device)
    image, mask = np.full((1, side, side, 3), 128, np.uint8), np.zeros((1, side, side), bool)
    mask[:, side // 4 : side // 2, side // 4 : side // 2] = True
    sampler = SamplerConfig(num_inference_steps=2, guidance_scale=1.0, precision=precision)
    paint(baseline, image, mask, ["a red circle"], sampler)
    print(peak_memory(device))


if __name__ == "__main__":
    _main(*sys.argv[1:])  # type: ignore[arg-type]
