"""`refine-control bench step`: the training step of stage 1 against a plain loop over stock diffusers modules.

Both start from the same networks and use the same batch, noise and sigmas. Their first losses and gradients are
compared, then both are timed alternately in one process. Peak memory is measured in fresh processes.
"""

# B batch, h w latents, N image tokens, D width

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median_high
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from refine_control.bench.stock_step import Step, StockStep
from refine_control.config import Recipe
from refine_control.errors import InvalidInputError
from refine_control.metrics.cost import Spread, count_flops, interleaved, ratio, run_fresh, time_call
from refine_control.models.backbone import Backbone
from refine_control.models.devices import device_name
from refine_control.threads import torch_threads
from refine_control.training.loop import Draw
from refine_control.training.objectives import Batch
from refine_control.training.optimizer import MasterWeights
from refine_control.training.run import fast_precision, make_objective, prepare, training_device

STOCK, STOCK_OPEN, OURS_FP32, OURS = "stock", "stock, nothing frozen", "ours in fp32", "ours"


class StepBench(NamedTuple):
    """The training step against a plain eager loop. `stock` freezes all but the student and runs the teacher without a
    graph, as diffusers' training script does; `stock, nothing frozen` does neither."""

    device: str
    threads: int
    precision: str
    """The type of `ours`; the stock loops are fp32."""
    batch_size: int
    loss_difference: dict[str, float]
    """|ours - stock| / stock, before the first update."""
    gradient_difference: dict[str, float]
    """2-norm of the difference between the student's gradients, relative to the norm of stock's."""
    seconds: dict[str, Spread]
    """Of one step."""
    speedup: dict[str, Spread]
    """Time of `stock` over time of the step, paired by round."""
    samples_per_second: dict[str, float]
    phases: dict[str, float]
    """Seconds of the parts of `ours`."""
    gflops: float
    """Matrix products and attention of one step of `stock`; 1 multiply-add is 2 FLOP."""
    matmul_gflops: dict[str, float]
    """By precision: GFLOP/s of torch's matrix products with the shapes of a feed-forward, (B N, D) and (B N, 4 D)."""
    floor_seconds: dict[str, float]
    """By precision: `gflops` over that rate, a lower bound of the step's time."""
    fraction_of_floor: dict[str, float]
    """Lower bound over measured time, each in its precision."""
    peak_memory: dict[str, int]
    """Bytes of a fresh process that loads the networks and runs three steps (GPU: allocated by torch)."""


class OurStep(Step):
    """The training step of `refine-control train`."""

    def __init__(self, recipe: Recipe, device: torch.device, precision: str):
        training = recipe.training.model_copy(update={"precision": precision})
        self.recipe = recipe
        self.networks = prepare(recipe.model_copy(update={"training": training}), device)
        self.backbone = self.networks.backbone
        self.objective = make_objective(recipe.objective, self.networks)
        self.master = MasterWeights(self.objective.trainable(), recipe.optimizer)

    def loss(self, batch: Batch, draw: Draw) -> torch.Tensor:
        return self.objective.losses(batch, draw).loss

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.objective.trainable().parameters)

    def update(self) -> None:
        self.master.accumulate()
        self.master.step(self.recipe.optimizer.learning_rate, 0, self.recipe.optimizer.max_grad_norm)

    def phases(self, batch: Batch, draw: Draw) -> dict[str, float]:
        """Seconds of the parts of one step; the teacher runs twice, once for its own timing."""

        def seconds(part: Callable[[], Any]) -> float:
            return time_call(part, warmup=0, repeats=1).median

        losses: list[torch.Tensor] = []
        at = self.networks.noised(batch, draw)
        teacher = seconds(lambda: self.networks.teacher_answer(at, batch))
        forward = seconds(lambda: losses.append(self.loss(batch, draw)))
        return {
            "teacher forward": teacher,
            "student forward and losses": forward - teacher,
            "backward": seconds(losses[0].backward),
            "optimiser": seconds(self.update),
        }


def _makers(recipe: Recipe, device: torch.device) -> dict[str, Callable[[], Any]]:
    """By name, how to create each step; `ours in fp32` only if the device has a faster type."""
    fast = fast_precision(device)
    makers: dict[str, Callable[[], Any]] = {
        STOCK: partial(StockStep, recipe, device),
        STOCK_OPEN: partial(StockStep, recipe, device, everything=True),
        OURS: partial(OurStep, recipe, device, fast),
    }
    return makers if fast == "fp32" else {**makers, OURS_FP32: partial(OurStep, recipe, device, "fp32")}


def make_batch(recipe: Recipe, backbone: Backbone, device: torch.device) -> tuple[Batch, Draw]:
    """A random batch with the model's shapes."""
    count = recipe.training.device_batch_size or recipe.training.batch_size
    draw = Draw(recipe.training.seed, "bench", 0, range(count))
    config = backbone.transformer.config
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    embeds, pooled = (t[0] for t in backbone.encode_prompts([""]))
    tensors = (
        draw.normals("latents", *shape),
        draw.normals("masked_latents", *shape),
        (draw.normals("mask", 1, *shape[1:]) > 1).float(),
        draw.normals("prompt_embeds", *embeds.shape),
        draw.normals("pooled_prompt_embeds", *pooled.shape),
    )
    return Batch(*(tensor.to(device) for tensor in tensors), slots=draw.slots, num_labeled=count), draw


def whole_step(step: Step, batch: Batch, draw: Draw) -> None:
    """Loss, gradients and update."""
    step.backward(batch, draw)
    step.update()


def _first_answer(step: Step, batch: Batch, draw: Draw) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients before the first update, which is then made."""
    loss = step.backward(batch, draw)
    grads = {name: p.grad.float().clone() for name, p in step.parameters.items() if p.grad is not None}
    step.update()
    return loss, grads


def _distance(grads: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    if grads.keys() != reference.keys():
        raise AssertionError(f"gradients of other parameters: {sorted(grads.keys() ^ reference.keys())}")
    squares = sum(float((grads[name] - grad).square().sum()) for name, grad in reference.items())
    return (squares / sum(float(grad.square().sum()) for grad in reference.values())) ** 0.5


def matmul_rate(config: Mapping[str, Any], batch_size: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the two matrix products of the image stream's feed-forward, by a transformer's config."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    rows = batch_size * (config["sample_size"] // config["patch_size"]) ** 2
    shapes = ((rows, 4 * width), (rows, width), (4 * width, width), (width, 4 * width))
    wide, narrow, into, out_of = (torch.randn(shape, device=device).to(dtype) for shape in shapes)

    def products() -> None:
        for _ in range(10):
            functional.linear(narrow, into)
            functional.linear(wide, out_of)

    return 10 * 2 * 8 * rows * width**2 / time_call(products, warmup=1, repeats=10).median


def _three_steps(recipe: Recipe, name: str, threads: int) -> None:
    """Loads the networks and runs three steps of `name`."""
    torch.set_num_threads(threads)
    device = training_device()
    step = _makers(recipe, device)[name]()
    batch, draw = make_batch(recipe, step.backbone, device)
    for _ in range(3):
        whole_step(step, batch, draw)


def bench_step(recipe: Recipe, *, repeats: int) -> StepBench:
    """Compares losses, time and memory of the step of a supervised recipe on this machine, on a random batch.

    Raises InvalidInputError for a recipe of another objective."""
    if recipe.objective.kind != "supervised":
        raise InvalidInputError(f"objective.kind is {recipe.objective.kind}; bench step measures supervised recipes")
    with torch_threads(recipe.training.threads):
        return _bench_step(recipe, repeats)


def _bench_step(recipe: Recipe, repeats: int) -> StepBench:
    device = training_device()
    steps = {name: make() for name, make in _makers(recipe, device).items()}
    backbone = steps[STOCK].backbone
    batch, draw = make_batch(recipe, backbone, device)
    answers = {name: _first_answer(step, batch, draw) for name, step in steps.items()}
    timings = interleaved({n: partial(whole_step, step, batch, draw) for n, step in steps.items()}, repeats=repeats)
    laps = [steps[OURS].phases(batch, draw) for _ in range(repeats)]
    size, precision = len(batch.latents), fast_precision(device)
    flops = count_flops(partial(whole_step, steps[STOCK], batch, draw))
    rates = {
        name: matmul_rate(backbone.transformer.config, size, dtype, device)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    types = {name: precision if name == OURS else "fp32" for name in steps}
    compared = [name for name in steps if name != STOCK]
    loss, grads = answers[STOCK]
    return StepBench(
        device=device_name(device),
        threads=torch.get_num_threads(),
        precision=precision,
        batch_size=size,
        loss_difference={n: abs(answers[n][0] - loss) / abs(loss) for n in compared},
        gradient_difference={n: _distance(answers[n][1], grads) for n in compared},
        seconds={name: timing.spread for name, timing in timings.items()},
        speedup={n: ratio(timings[STOCK], timings[n]).spread for n in compared},
        samples_per_second={name: size / timing.median for name, timing in timings.items()},
        phases={name: median_high(lap[name] for lap in laps) for name in laps[0]},
        gflops=flops / 1e9,
        matmul_gflops={name: rate / 1e9 for name, rate in rates.items()},
        floor_seconds={name: flops / rate for name, rate in rates.items()},
        fraction_of_floor={n: flops / rates[types[n]] / timings[n].median for n in steps},
        peak_memory={
            name: run_fresh(_three_steps, recipe, name, torch.get_num_threads(), device=device.type).peak_memory
            for name in (STOCK, OURS)
        },
    )
