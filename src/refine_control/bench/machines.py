"""Machines to plan for: memory and peak rates of accelerators as their makers state them, and those of this one."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from refine_control.bench.step import OurStep, make_batch, matmul_rate, whole_step
from refine_control.config import Recipe
from refine_control.errors import InvalidInputError
from refine_control.metrics.cost import time_call
from refine_control.models.devices import device_name, memory_bytes
from refine_control.models.skeleton import read_configs
from refine_control.threads import torch_threads
from refine_control.training.memory import MemoryPlan
from refine_control.training.run import training_device

ASSUMED = 0.4
"""Of the peak rate, where nobody has measured: large transformers train at 0.35 to 0.55 of it."""
_LONGEST_STEP = 20.0
"""Seconds: a step that would take longer is not measured."""


class Machine(NamedTuple):
    """Equal devices, and what they compute."""

    name: str
    count: int
    memory: float
    """Bytes of one device."""
    bf16: float
    """FLOP/s of one device's dense products with sums in fp32."""
    fp32: float
    """The same without TF32: the VAE, the text encoders and the teacher's completions run in fp32."""
    efficiency: float = ASSUMED
    """Part of these rates that a step reaches."""
    basis: str = "assumed"
    """Where the efficiency comes from."""
    cpu: bool = False


DEVICES = {
    "3090": (24e9, 71e12, 35.6e12),
    "4090": (24e9, 165.2e12, 82.6e12),
    "5090": (32e9, 209.5e12, 104.8e12),
    "A100-40": (40e9, 312e12, 19.5e12),
    "A100": (80e9, 312e12, 19.5e12),
    "L4": (24e9, 121e12, 30.3e12),
    "L40S": (48e9, 362e12, 91.6e12),
    "6000Ada": (48e9, 364.2e12, 91.1e12),
    "H100": (80e9, 989.4e12, 66.9e12),
    "H200": (141e9, 989.4e12, 66.9e12),
    "B200": (180e9, 2250e12, 75e12),
}
"""Memory, dense bf16 and fp32 rate, of NVIDIA's data sheets (SXM) and white papers (GeForce)."""


def named_machine(name: str, efficiency: float | None = None, basis: str = "given") -> Machine:
    """`4090` or `8xH100`. Raises InvalidInputError for a device that is not known."""
    match = re.fullmatch(r"(?:([1-9]\d{0,5})x)?(.+)", name)
    known = {each.lower(): each for each in DEVICES}
    if not match or match[2].lower() not in known:
        raise InvalidInputError(
            f"--machine {name} is not known; give this or, with a count as in 8xH100, {', '.join(DEVICES)}"
        )
    device = known[match[2].lower()]
    used = {} if efficiency is None else {"efficiency": efficiency, "basis": basis}
    return Machine(device, int(match[1] or 1), *DEVICES[device], **used)


def this_machine(recipe: Recipe, plan: MemoryPlan, efficiency: float | None = None, basis: str = "given") -> Machine:
    """The best device here: its product rates at the recipe's shapes and, unless given, what a step of it reaches.

    A step for few steps, one that would take long and one that does not fit are not measured."""
    device, precision = training_device(), recipe.training.precision
    with torch_threads(recipe.training.threads):
        config, types = read_configs(recipe.model)["transformer"], (torch.bfloat16, torch.float32)
        rates = [matmul_rate(config, plan.samples, dtype, device) for dtype in types]
        memory, rate = memory_bytes(device), rates[precision == "fp32"]
        machine = Machine(device_name(device), 1, memory, rates[0], rates[1], cpu=device.type == "cpu")
        if efficiency is not None:
            return machine._replace(efficiency=efficiency, basis=basis)
        flops = plan.samples * plan.flops
        if recipe.objective.is_few_step or plan.peak > memory or flops / rate > _LONGEST_STEP:
            return machine
        step = OurStep(recipe, device, precision)
        batch, draw = make_batch(recipe, step.backbone, device)
        seconds = time_call(lambda: whole_step(step, batch, draw), warmup=1, repeats=3).median
    return machine._replace(efficiency=flops / rate / seconds, basis="measured on a step")
