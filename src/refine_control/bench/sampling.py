"""`refine-control bench sampling`: whole pictures by teacher and student, text encoders and VAE included.

Every way to paint is timed in turn in one process, each with the networks as diffusers' modules and packed
(`models/packed.py`), for each batch size. Ratios are of the same round of the same run. All pictures of a batch have
their own prompts; weights do not matter for speed, so without a student its size alone is measured.
"""

# B batch, H W pixels

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from refine_control.conditions.condition import Shown
from refine_control.config import Precision, SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.metrics.cost import Spread, Timing, interleaved, ratio
from refine_control.models.backbone import Backbone
from refine_control.models.card import choose_sampler
from refine_control.models.controlnet import build_student, join
from refine_control.models.cpu_kernels import in_precision
from refine_control.models.devices import best_device, device_name
from refine_control.models.fit import check_controlnet
from refine_control.models.loading import load_backbone, load_controlnet
from refine_control.models.packed import pack
from refine_control.pipeline.painting import paint
from refine_control.pipeline.picture_cost import PictureCost, painting_parts, picture_cost

TEACHER, STUDENT, MODULES = "teacher", "student", "modules"
Way = tuple[str, int, bool]
"""Which network paints, in how many steps, and whether guided."""


def ways(steps: int) -> dict[str, Way]:
    """By name; `steps` is the usual number of guided steps."""
    chosen = [
        (TEACHER, steps, True),
        (STUDENT, steps, True),
        (TEACHER, 4, True),
        (STUDENT, 4, False),
        (STUDENT, 1, False),
    ]
    return {f"{who} {n} step{'s' * (n > 1)}{' guided' * guided}": (who, n, guided) for who, n, guided in chosen}


_PARTS = {"text": "text", "encode": "encode", "call": "teacher's call", "decode": "decode"}


class BatchBench(NamedTuple):
    """Of one batch size; seconds are of the whole batch."""

    seconds: dict[str, Spread]
    """By way, with packed networks; with `modules` before the name as diffusers runs them."""
    seconds_a_picture: dict[str, float]
    parts: dict[str, Spread]
    """Of text encoders, VAE's encoder and decoder, and one call of ControlNet and transformer (packed)."""
    speedup: dict[str, Spread]
    """`A / B`: the seconds of A over those of B."""


class SamplingBench(NamedTuple):
    """Seconds and operations of whole pictures on this machine."""

    device: str
    threads: int
    precision: str
    layers: dict[str, int]
    cost: dict[str, PictureCost]
    """By way: network calls, and GFLOP of a picture."""
    operations: dict[str, float]
    """`A / B`: the operations of A over those of B, a bound of the speedup where all of them run equally fast."""
    batches: dict[int, BatchBench]

    @property
    def text(self) -> str:
        """As tables."""
        counts = ", ".join(f"{name} {count} layers" for name, count in self.layers.items())
        lines = [f"{self.device}, {self.threads} threads, {self.precision}; {counts}"]
        for batch, each in self.batches.items():
            lines.append(f"batch {batch:<22}{'calls':>6}{'GFLOP':>8}{'ms a picture':>14}{'as modules':>12}")
            for name, cost in self.cost.items():
                times = [1000 * each.seconds_a_picture[key] for key in (name, f"{MODULES}, {name}")]
                numbers = f"{cost.network_calls:6}{cost.gflops_picture:8.2f}{times[0]:14.1f}{times[1]:12.1f}"
                lines.append(f"  {name:26}{numbers}")
            lines.append("  ms: " + ", ".join(f"{name} {1000 * t.median:.1f}" for name, t in each.parts.items()))
            lines += [
                f"  {name}: {spread.median:.1f} times [{spread.low:.1f}, {spread.high:.1f}]"
                + (f", operations {self.operations[name]:.1f}" if name in self.operations else "")
                for name, spread in each.speedup.items()
            ]
        return "\n".join(lines)


def _networks(
    model: str, student: Path | None, layers: int, precision: Precision
) -> tuple[Backbone, dict[str, Any], Backbone, dict[str, Any]]:
    """The backbone with teacher and student as modules, and copies of both that are packed."""
    backbone = load_backbone(model, device=best_device())
    teacher = backbone.pipeline.controlnet
    if student is None:
        loaded = build_student(backbone.transformer, teacher, layers, "teacher", seed=0)
    else:
        loaded = load_controlnet(student)
        check_controlnet(loaded.config, backbone.transformer.config, student)
        join(loaded, backbone.transformer)
    networks = {TEACHER: teacher, STUDENT: loaded.requires_grad_(False).eval()}
    in_precision(precision, backbone, *networks.values())
    fast, of_fast = copy.copy(backbone), copy.deepcopy(networks)
    fast.vae, fast.transformer = copy.deepcopy((backbone.vae, backbone.transformer))
    pack(fast.vae, fast.transformer, *of_fast.values())
    return backbone, networks, fast, of_fast


def _sampler(steps: int, guided: bool, guidance: float, precision: Precision) -> SamplerConfig:
    scale = guidance if guided else 1.0
    return SamplerConfig(num_inference_steps=steps, guidance_scale=scale, precision=precision, sigmas="even")


def make_shown(batch: int, side: int) -> tuple[Shown, list[str]]:
    """Random images, masks of a quarter of them, prompts."""
    images = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    masks = np.zeros((batch, side, side), bool)
    masks[:, side // 4 : -side // 4, side // 4 : -side // 4] = True
    return Shown(images, masks), [("a red circle", "a blue ring")[number % 2] for number in range(batch)]


def _pairs(chosen: Mapping[str, Way]) -> list[tuple[str, str]]:
    """Each way of the teacher against those of the student that take no more steps."""
    slow, fast = ({n: way for n, way in chosen.items() if way[0] == network} for network in (TEACHER, STUDENT))
    return [(a, b) for a in slow for b in fast if fast[b][1] <= slow[a][1]]


def _speedups(times: dict[str, Timing], chosen: Mapping[str, Way]) -> dict[str, Spread]:
    """Teacher over student, both packed and both as modules; modules over packed."""
    both = _pairs(chosen)
    pairs = [*both, *((f"{MODULES}, {a}", f"{MODULES}, {b}") for a, b in both)]
    pairs += [(f"{MODULES}, {name}", name) for name in chosen]
    pairs += [(f"{MODULES}, {a}", b) for a, b in both]
    return {f"{a} / {b}": ratio(times[a], times[b]).spread for a, b in pairs}


def bench_sampling(
    model: str = "mini",
    student: Path | None = None,
    *,
    layers: int = 12,
    precision: Precision = "fp32",
    guidance: float = 3.0,
    batches: Sequence[int] = (1, 8),
    repeats: int = 3,
) -> SamplingBench:
    """Times every one of `ways` with a student of `layers` layers, or the one in the folder `student`.

    Raises InvalidInputError for no guidance and for a student that does not fit the model."""
    if guidance <= 1:
        raise InvalidInputError(f"guidance is {guidance:g}, which is none; give more than 1")
    backbone, networks, fast, of_fast = _networks(model, student, layers, precision)
    chosen = ways(choose_sampler(model, None, {}).num_inference_steps)
    samplers = {name: _sampler(steps, guided, guidance, precision) for name, (_, steps, guided) in chosen.items()}
    cost = {name: picture_cost(backbone, networks[way[0]], samplers[name]) for name, way in chosen.items()}
    results = {}
    for batch in batches:
        given = make_shown(batch, backbone.geometry.side)
        calls: dict[str, Callable[[], Any]] = {}
        for name, (network, *_) in chosen.items():
            calls[f"{MODULES}, {name}"] = partial(paint, backbone, networks[network], *given, samplers[name])
            calls[name] = partial(paint, fast, of_fast[network], *given, samplers[name])
        parts = {_PARTS[name]: part for name, part in painting_parts(fast, of_fast[TEACHER], batch).items()}
        parts["student's call"] = painting_parts(fast, of_fast[STUDENT], batch)["call"]
        times = interleaved({**calls, **parts}, repeats)
        results[batch] = BatchBench(
            {name: times[name].spread for name in calls},
            {name: times[name].median / batch for name in calls},
            {name: times[name].spread for name in parts},
            _speedups(times, chosen),
        )
    operations = {f"{a} / {b}": cost[a].gflops_picture / cost[b].gflops_picture for a, b in _pairs(chosen)}
    counts = {name: len(network.transformer_blocks) for name, network in networks.items()}
    device = device_name(backbone.device)
    return SamplingBench(device, torch.get_num_threads(), precision, counts, cost, operations, results)
