"""Parameters, operations, time and peak memory of a baseline of Table 2, as `model_cost` measures them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

import numpy as np

from refine_control.baselines.models import Baseline, load_baseline
from refine_control.baselines.painting import denoising_step, paint
from refine_control.config import SamplerConfig
from refine_control.metrics.cost import ModelCost, count_flops, count_parameters, peak_memory, time_call


class BaselineCost(NamedTuple):
    """A single square picture at the baseline's own size, without guidance."""

    model: ModelCost
    """As of a ControlNet in its model; a U-Net has no ControlNet: no layers, no parameters, no FLOP of one."""
    denoiser_params: int
    """Of the U-Net or the transformer."""
    size: int
    """Pixels of a side."""


def baseline_cost(baseline: Baseline, *, controlnet: str | None = None, repeats: int = 20) -> BaselineCost:
    """Costs of a loaded baseline; its memory by loading it again in a fresh process, 0 where that fails.

    `controlnet` is the argument that `load_baseline` had."""
    controlled, whole = denoising_step(baseline)
    network = baseline.controlnet
    model = ModelCost(
        len(network.transformer_blocks) + len(network.single_transformer_blocks) if network else 0,
        count_parameters(network) if network else 0,
        count_flops(controlled) / 1e9 if controlled else 0.0,
        count_flops(whole) / 1e9,
        time_call(whole, warmup=2, repeats=repeats).median,
        _peak_in_fresh_process(baseline, controlnet),
    )
    return BaselineCost(model, count_parameters(baseline.denoiser), baseline.size)


def _peak_in_fresh_process(baseline: Baseline, controlnet: str | None) -> int:
    """Bytes at the peak of a process that loads the baseline on the same device and repaints one picture."""
    precision = "bf16" if "bfloat16" in str(baseline.denoiser.dtype) else "fp32"
    arguments = {"name": baseline.name, "size": baseline.size, "controlnet": controlnet, "precision": precision}
    arguments["device"] = str(baseline.denoiser.device)
    command = [sys.executable, "-m", "refine_control.baselines.cost", json.dumps(arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(result.stdout.split()[-1]) if result.returncode == 0 else 0


def _main(arguments: str) -> None:
    """Loads, repaints one picture in two steps, prints the peak."""
    import torch

    torch.set_num_threads(1)
    given = json.loads(arguments)
    baseline, side = load_baseline(given.pop("name"), **given), given["size"]
    image, mask = np.full((1, side, side, 3), 128, np.uint8), np.zeros((1, side, side), bool)
    mask[:, side // 4 : side // 2, side // 4 : side // 2] = True
    sampler = SamplerConfig(num_inference_steps=2, guidance_scale=1.0, precision=given["precision"])
    paint(baseline, image, mask, ["a red circle"], sampler)
    print(peak_memory(given["device"]))


if __name__ == "__main__":
    _main(sys.argv[1])
