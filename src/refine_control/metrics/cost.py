"""The cost of a model, measured: parameters, FLOPs, seconds and memory.

One multiply-accumulate (MAC) is 2 FLOPs everywhere in this project; papers that count MACs report half.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, NamedTuple

from refine_control.errors import InvalidInputError, MissingError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class Spread(NamedTuple):
    """A median with the 5th and the 95th percentile."""

    median: float
    low: float
    high: float


class Timing(NamedTuple):
    """Wall-clock seconds of one call: the median, the 5th and the 95th percentile, and all of them in order."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @property
    def spread(self) -> Spread:
        """Without the samples."""
        return Spread(self.median, self.low, self.high)


class FreshRun(NamedTuple):
    """One call in a process that did nothing else."""

    seconds: float
    peak_memory: int
    """Bytes, as `peak_memory` reports them."""


def run_fresh(fn: Callable[..., Any], *args: Any, device: str = "cpu", **kwargs: Any) -> FreshRun:
    """Time and peak memory of `fn(*args, **kwargs)` in a new process, which imports only what the call needs.

    Raises what `fn` raises, MissingError where the process dies."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, fn, args, kwargs, device).result()
        except BrokenProcessPool:
            raise MissingError(f"the process that measures {fn.__name__} died, probably out of memory") from None


def peak_memory_fresh(fn: Callable[..., Any], *args: Any, device: str = "cpu") -> int:
    """Bytes at the peak of `run_fresh`; 0 and a warning where the process fails, for other costs do not need it."""
    try:
        return run_fresh(fn, *args, device=device).peak_memory
    except Exception as error:  # of any library that runs there
        logger.warning("peak memory is not measured: %s: %s", type(error).__name__, " ".join(str(error).split())[:200])
        return 0


def _measure(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], device: str) -> FreshRun:
    seconds = _seconds(lambda: fn(*args, **kwargs))
    return FreshRun(seconds, peak_memory(device))


def count_parameters(module: torch.nn.Module) -> int:
    """The number of parameters, trainable or frozen; shared tensors count once, buffers not at all."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(fn: Callable[[], Any]) -> int:
    """FLOPs of the matrix products, convolutions and attentions of one call of `fn()`; 1 MAC = 2 FLOPs.

    A backward pass inside `fn` counts (2.5 times the forward for fused attention, which computes the scores again),
    elementwise work does not, and attention under a causal mask counts in full. A CPU and a GPU report the same number.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as counter:
        fn()
    return int(counter.get_total_flops())


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """By operator, what `count_flops` counts: FLOPs from the arguments and, as `out_val`, the result."""
    from torch.utils.flop_counter import flop_registry, shape_wrapper

    return {**flop_registry, **{operator: shape_wrapper(formula) for operator, formula in _missing_formulas().items()}}


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas, from shapes to FLOPs, for operators that torch 2.13's own registry lacks."""
    import torch
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: sdpa_flop_count(*qkv[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
        ),
        aten.mv: lambda matrix, *_, **__: 2 * math.prod(matrix),
        aten.addmv: lambda bias, matrix, *_, **__: 2 * math.prod(matrix),
    }
    if torch.backends.mkldnn.is_available():  # models/cpu_kernels.py
        formulas[torch.ops.mkldnn._linear_pointwise] = lambda hidden, weight, *_, **__: (
            2 * math.prod(hidden) * weight[0]
        )
    return formulas


def time_call(fn: Callable[[], Any], warmup: int = 1, repeats: int = 10) -> Timing:
    """Seconds of `fn()` over `repeats` calls, after `warmup` calls that are not counted.

    Raises InvalidInputError for repeats < 1 or warmup < 0."""
    return interleaved({"fn": fn}, repeats=repeats, warmup=warmup)["fn"]


def interleaved(fns: dict[str, Callable[[], Any]], repeats: int = 10, warmup: int = 1) -> dict[str, Timing]:
    """Times several callables in turn, every second round backwards, so that a drift of the machine meets all of them.

    `ratio` compares two by round. Raises InvalidInputError for no callables, repeats < 1 or warmup < 0."""
    if not fns or repeats < 1 or warmup < 0:
        raise InvalidInputError(
            f"cannot time {len(fns)} callables with {repeats} repeats after {warmup} warm-up calls; "
            "give at least one callable, one repeat and no negative warm-up"
        )
    samples: dict[str, list[float]] = {name: [] for name in fns}
    for fn in fns.values():
        for _ in range(warmup):
            fn()
    for round_number in range(repeats):
        for name in list(fns)[:: -1 if round_number % 2 else 1]:
            samples[name].append(_seconds(fns[name]))
    return {name: _timing(seconds) for name, seconds in samples.items()}


def ratio(numerator: Timing, denominator: Timing) -> Timing:
    """How many times longer `numerator` takes: the quotients of the rounds of one `interleaved` run.

    The fields are then pure numbers. Raises InvalidInputError when the two have different round counts."""
    if len(numerator.samples) != len(denominator.samples):
        raise InvalidInputError(
            f"timings of {len(numerator.samples)} and {len(denominator.samples)} rounds cannot be paired; "
            "time both in one interleaved run"
        )
    return _timing([a / b for a, b in zip(numerator.samples, denominator.samples, strict=True)])


def peak_memory(device: str = "cpu") -> int:
    """The most memory used so far, in bytes.

    "cpu": resident memory of this process since it started (see `run_fresh`). "cuda", "cuda:1": tensors since the last
    `torch.cuda.reset_peak_memory_stats`. Raises InvalidInputError for another device, MissingError without a GPU."""
    kind = device.partition(":")[0]
    if kind == "cpu":
        return _peak_resident_memory()
    if kind != "cuda":
        raise InvalidInputError(f"peak memory of device {device!r} is not known here; give cpu or cuda")
    import torch

    if not torch.cuda.is_available():
        raise MissingError("torch sees no GPU on this machine; measure with device cpu")
    return torch.cuda.max_memory_allocated(device)


def _peak_resident_memory() -> int:
    """Bytes. On Linux from VmHWM: after fork and exec `ru_maxrss` still holds the parent's peak."""
    if sys.platform == "linux":
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _synchronize() -> None:
    """Waits for the GPU, if this process has used one; torch is not imported for it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _seconds(fn: Callable[[], Any]) -> float:
    _synchronize()
    start = time.perf_counter()
    fn()
    _synchronize()
    return time.perf_counter() - start


def _timing(seconds: list[float]) -> Timing:
    import numpy as np

    low, high = np.quantile(seconds, [0.05, 0.95])
    return Timing(statistics.median(seconds), float(low), float(high), tuple(seconds))


class CountedCost(NamedTuple):
    """What can be counted of one ControlNet in one model, whatever the machine."""

    num_layers: int
    num_params: int
    """Of the ControlNet."""
    gflops_controlnet: float
    """One forward pass of a single picture at the model's own size; 1 multiply-add = 2 FLOP."""
    gflops_step: float
    """ControlNet and transformer: one denoising step without guidance."""


class ModelCost(NamedTuple):
    """`CountedCost` and what is measured, for a single picture at the model's own size, without guidance."""

    num_layers: int
    num_params: int
    gflops_controlnet: float
    gflops_step: float
    step_seconds: float
    """Median of one denoising step, timed alternately with the others."""
    peak_memory: int
    """Bytes of resident (GPU: allocated) memory in a process that does nothing but sample; 0 = not measured."""
