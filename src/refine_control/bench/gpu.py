"""`refine-control bench gpu`: what needs a GPU, measured with random weights of a recipe's shapes in a given time.

Every measurement runs in a process of its own, so one that fails or hangs is a line of the table, and peaks of memory
are its own. Results are kept in a file, and the next call continues: it repeats only what no time was left for and what
failed by anything but memory. `small` runs the same measurements in this process, on a CPU too.
"""

# B samples on a device at once

from __future__ import annotations

import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from refine_control.bench.random_networks import random_networks
from refine_control.bench.sampling import make_shown
from refine_control.bench.step import (
    OURS,
    PEERS,
    SCRIPT,
    SCRIPT_TEXT,
    STOCK,
    TYPES,
    OurStep,
    comparable,
    make_batch,
    matmul_rate,
    whole_step,
)
from refine_control.bench.stock_step import ScriptStep, Step, StockStep, encode_pictures, make_pictures
from refine_control.config import Recipe, SamplerConfig
from refine_control.errors import MissingError
from refine_control.metrics.cost import Spread, peak_memory, time_call
from refine_control.models.devices import best_device, device_name, memory_bytes
from refine_control.models.skeleton import read_configs
from refine_control.pipeline.painting import paint
from refine_control.progress import Progress
from refine_control.storage import write_json
from refine_control.training.assembly import beside
from refine_control.training.memory import plan_memory

RESULTS = "bench_gpu.json"
_STEPS: dict[str, Callable[..., Step]] = {
    OURS: OurStep,
    STOCK: StockStep,
    SCRIPT: ScriptStep,
    SCRIPT_TEXT: partial(ScriptStep, text=True),
}
_SHARE = 0.6
"""Of the memory: what the plan of the step that all are compared at may take. The peers need more than ours."""
_LONG = 10.0
"""Seconds in which a measurement ends after its first call, at least two calls apart."""
_HALF = 18
"""Of the blocks of student and transformer, 12 and 24 with SD3."""
_OUT_OF_MEMORY, _NO_TIME = "out of memory", "no time was left"


_MEMORY = [
    ("8-bit AdamW", {}, "adamw8bit"),
    ("int8 frozen", {"frozen": "int8"}, ""),
    ("fp8 frozen", {"frozen": "fp8", "precision": "bf16"}, ""),
    ("half the blocks checkpointed", {"gradient_checkpointing": True, "checkpointed_blocks": _HALF}, ""),
    ("moments offloaded", {"offload": "moments"}, ""),
]
"""Settings that save memory: name, of `training`, and `optimizer.kind`."""


class Measurement(NamedTuple):
    """One line of the table."""

    name: str
    settings: Mapping[str, Any]
    """Of the recipe's section `training`."""
    step: str = OURS
    """Whose training step; empty for a picture."""
    attention: str = ""
    """A member of torch's SDPBackend; empty: torch chooses."""
    painting: tuple[str, int, bool] = ("", 0, False)
    """Of a picture: teacher or student, number of steps, and whether guided."""
    optimizer: str = ""
    """`optimizer.kind`; empty: the recipe's."""


class Outcome(NamedTuple):
    """What was measured, or why not."""

    seconds: Spread = Spread(0.0, 0.0, 0.0)
    """Of a step or of a picture."""
    samples: int = 0
    """B of a step."""
    loss: float = 0.0
    """Before the first update."""
    peak: int = 0
    """Bytes (of a CPU: 0)."""
    planned: int = 0
    """Peak of the plan (`training/memory.py`), in bytes."""
    share: float = 0.0
    """Of the measured rate of products that the step reaches."""
    waits: int = 0
    """Times that the host waits for the GPU in a step, counted by torch."""
    problem: str = ""


class GpuBench(NamedTuple):
    """The measurements of one device."""

    recipe: str
    device: str
    torch: str
    batch_size: int
    """B at which steps are compared."""
    rates: dict[str, float]
    """By precision: GFLOP/s of products with the shapes of a feed-forward."""
    outcomes: dict[str, Outcome]

    def ratio(self, peer: str, part: Callable[[Outcome], float]) -> float | None:
        """A peer's number over that of our step, where both are measured."""
        pair = [self.outcomes.get(name, Outcome(problem=_NO_TIME)) for name in (peer, OURS)]
        return None if any(each.problem for each in pair) or not part(pair[1]) else part(pair[0]) / part(pair[1])

    @property
    def text(self) -> str:
        """As a table, with the ratios of the peers below it."""
        rates = ", ".join(f"{name} {rate:.4g}" for name, rate in self.rates.items())
        lines = [f"{self.recipe} on {self.device}, torch {self.torch}; GFLOP/s of products: {rates}"]
        lines.append(f"{'':40}{'s':>9}{'samples':>9}{'loss':>10}{'share':>7}{'peak GB':>9}{'plan GB':>9}{'waits':>7}")
        for name, o in self.outcomes.items():
            numbers = (
                f"{o.seconds.median:9.4g}{o.samples or 1:9}{o.loss:10.4g}{o.share:7.2f}{o.peak / 1e9:9.3g}"
                f"{o.planned / 1e9:9.3g}{o.waits:7}"
            )
            lines.append(f"  {name:38}" + (f" not measured: {o.problem}" if o.problem else numbers))
        for peer in PEERS:
            times, memory = (self.ratio(peer, part) for part in (lambda o: o.seconds.median, lambda o: float(o.peak)))
            if times is not None:
                part = f", with {1 / memory:.2f} of its peak memory" if memory else ""
                lines.append(f"  {OURS} is {times:.2f} times as fast as {peer}{part}")
        return "\n".join(lines)


def measurements(batch: int, largest: int) -> list[Measurement]:
    """What is measured, the most important first: steps of `batch` samples, some of the `largest` number that fits."""
    whole = {"batch_size": batch, "device_batch_size": 0, "gradient_checkpointing": False}
    most = {**whole, "batch_size": largest}
    painted = [("teacher", 28, True), ("student", 28, True), ("student", 4, False), ("student", 1, False)]
    attentions = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    return [
        *(Measurement(name, whole, name) for name in _STEPS),
        Measurement("ours, compiled blocks", {**whole, "compile": True}),
        *(
            Measurement(f"{who}, {n} step{'s' * (n > 1)}{', guided' * guided}", {}, "", painting=(who, n, guided))
            for who, n, guided in painted
        ),
        *(Measurement(f"ours, {n} attention", whole, attention=each) for n, each in attentions.items()),
        Measurement("ours, plain attention", whole, attention="MATH"),
        *(Measurement(f"ours, {name}", whole | more, optimizer=kind) for name, more, kind in _MEMORY),
        *([Measurement(f"ours, batch {largest}", most)] if largest > batch else []),
        Measurement(f"ours, batch {largest}, checkpointing", {**most, "gradient_checkpointing": True}),
    ]


def _set(recipe: Recipe, settings: Mapping[str, Any], optimizer: str = "") -> Recipe:
    """The recipe with the settings of a measurement."""
    training = recipe.training.model_copy(update=dict(settings))
    kind = recipe.optimizer.model_copy(update={"kind": optimizer or recipe.optimizer.kind})
    return recipe.model_copy(update={"training": training, "optimizer": kind})


def _attention(name: str) -> AbstractContextManager[Any]:
    return sdpa_kernel(getattr(SDPBackend, name)) if name else nullcontext()


def _timed(call: Callable[[], Any]) -> Spread:
    """Seconds of a call, of as many calls as `_LONG` has room for."""
    first = time_call(call, warmup=0, repeats=1).median
    return time_call(call, warmup=0, repeats=int(min(20, max(2, _LONG / first)))).spread


def _waits(call: Callable[[], Any]) -> int:
    """How often the host waits for the GPU in a call."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def _measure_step(each: Measurement, recipe: Recipe, rates: dict[str, float]) -> Outcome:
    device, precision = best_device(), recipe.training.precision
    mixed: dict[str, bool] = {} if each.step == OURS else {"mixed": precision == "bf16"}
    given = (precision,) if each.step == OURS else ()
    load = partial(random_networks, text=each.step == SCRIPT_TEXT)
    step = _STEPS[each.step](recipe, device, *given, load=load, **mixed)
    backbone = step.networks.backbone
    batch, draw = make_batch(recipe, backbone, device)
    batch = encode_pictures(batch, make_pictures(recipe, backbone.geometry.side, device), backbone.vae.to(device))
    if each.step in (OURS, STOCK) and backbone.vae not in beside(recipe, backbone):
        backbone.pipeline.vae = backbone.vae = None  # a run over caches does without
    call = partial(whole_step, step, batch, draw)
    with _attention(each.attention):
        loss = step.backward(batch, draw)
        step.update()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        spread = _timed(call)
        peak = peak_memory("cuda") if device.type == "cuda" else 0
        waits = _waits(call)
    samples = len(batch.latents)
    if each.step != OURS:
        return Outcome(spread, samples, loss, peak, waits=waits)
    plan = plan_memory(recipe, cpu_kernels=device.type == "cpu")
    share = plan.flops * samples / spread.median / (1e9 * rates[precision])
    return Outcome(spread, samples, loss, peak, plan.peak, share, waits)


def _measure_picture(each: Measurement, recipe: Recipe) -> Outcome:
    device, (who, steps, guided) = best_device(), each.painting
    networks = random_networks(recipe, device, text=True)
    backbone = networks.backbone
    controlnet = networks.teacher if who == "teacher" else networks.student
    assert controlnet is not None
    sampler = SamplerConfig(num_inference_steps=steps, guidance_scale=7.0 if guided else 1.0, sigmas="even")
    given = make_shown(1, backbone.geometry.side)
    call = partial(paint, backbone, controlnet.eval(), *given, sampler)
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    spread = _timed(call)
    return Outcome(spread, peak=peak_memory("cuda") if device.type == "cuda" else 0)


def measure(each: Measurement, recipe: Recipe, rates: dict[str, float]) -> Outcome:
    """One measurement here; what goes wrong is its problem."""
    try:
        changed = comparable(_set(recipe, each.settings, each.optimizer))
        return _measure_step(each, changed, rates) if each.step else _measure_picture(each, changed)
    except torch.OutOfMemoryError:
        return Outcome(problem=_OUT_OF_MEMORY)
    except Exception as error:  # of any library that runs there: the others are measured all the same
        return Outcome(problem=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _send(sender: Any, *arguments: Any) -> None:
    sender.send(measure(*arguments))


def measure_alone(each: Measurement, recipe: Recipe, rates: dict[str, float], seconds: float) -> Outcome:
    """`measure` in a new process, which is ended after so many seconds."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, each, recipe, rates))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else Outcome(problem=_NO_TIME)
    except EOFError:
        process.join()
        return Outcome(problem=f"its process died with code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _kept(file: Path, head: Mapping[str, Any]) -> dict[str, Outcome]:
    """The outcomes of an earlier call on the same device with the same recipe, without those worth another try."""
    if not file.is_file():
        return {}
    stored = json.loads(file.read_text())
    if {name: stored.get(name) for name in head} != head:
        return {}
    read = {name: Outcome(**{**o, "seconds": Spread(**o["seconds"])}) for name, o in stored["outcomes"].items()}
    return {name: outcome for name, outcome in read.items() if outcome.problem in ("", _OUT_OF_MEMORY)}


def _as_json(report: GpuBench) -> Mapping[str, Any]:
    outcomes = {n: {**o._asdict(), "seconds": o.seconds._asdict()} for n, o in report.outcomes.items()}
    return {**report._asdict(), "outcomes": outcomes}


def _batches(recipe: Recipe, memory: float) -> tuple[int, int]:
    """Samples at which steps are compared, and the most that the plan has room for; 8 at most."""

    def fits(count: int, share: float) -> bool:
        settings = {"batch_size": count, "device_batch_size": 0, "gradient_checkpointing": False}
        return plan_memory(_set(recipe, settings)).peak <= share * memory

    first, largest = (next((n for n in (8, 4, 2) if fits(n, share)), 1) for share in (_SHARE, 1.0))
    return first, largest


def bench_gpu(
    recipe: Recipe, folder: Path, minutes: float, *, small: bool = False, progress: Progress | None = None
) -> GpuBench:
    """Measures what `measurements` lists, continues what `folder` has of it, and writes `bench_gpu.json` there.

    `small`: two samples at most, in this process and on a CPU where there is no GPU. Raises MissingError without a GPU.
    """
    device, began = best_device(), time.monotonic()
    if device.type != "cuda" and not small:
        raise MissingError("torch sees no GPU on this machine; --small runs the same measurements on the CPU")
    batch, largest = (2, 2) if small else _batches(recipe, memory_bytes(device))
    head: Mapping[str, Any] = {
        "recipe": recipe.name,
        "device": device_name(device),
        "torch": torch.__version__,
        "batch_size": batch,
    }
    file = folder / RESULTS
    kept, listed = _kept(file, head), measurements(batch, largest)
    config = read_configs(recipe.model)["transformer"]
    rates = {name: matmul_rate(config, batch, dtype, device) / 1e9 for name, dtype in TYPES.items()}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    report = GpuBench(**head, rates=rates, outcomes={})
    folder.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(listed):
        left = 60 * minutes - (time.monotonic() - began)
        if each.name in kept:
            outcome = kept[each.name]
        elif left <= 0:
            outcome = Outcome(problem=_NO_TIME)
        else:
            outcome = measure(each, recipe, rates) if small else measure_alone(each, recipe, rates, left)
        report.outcomes[each.name] = outcome
        write_json(file, _as_json(report))
        if progress:
            progress(number + 1, len(listed), each.name)
    return report
