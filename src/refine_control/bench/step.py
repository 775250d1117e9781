"""`refine-control bench step`: the training step of a recipe against its peers, in one run.

The peers (`bench/stock_step.py`) are a plain loop over cached latents and the step of diffusers' own training script,
in which a teacher runs too. All start from the same networks, with the losses of the recipe on the same batch, noise
and sigmas. First losses and gradients are compared, then all are timed alternately in one process. Peak memory is
measured in fresh processes.
"""

# B batch, H W pixels, h w latents, N image tokens, D width

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median_high
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from refine_control.bench.stock_step import Load, ScriptStep, Step, StockStep, samples_at_once
from refine_control.conditions.condition import has_region
from refine_control.config import DataConfig, Precision, Recipe
from refine_control.metrics.cost import Spread, count_flops, interleaved, ratio, run_fresh, time_call
from refine_control.models.backbone import Backbone
from refine_control.models.devices import device_name
from refine_control.models.skeleton import read_configs, text_tokens
from refine_control.threads import torch_threads
from refine_control.training.few_step import fields_read
from refine_control.training.loop import Draw
from refine_control.training.objectives import Batch
from refine_control.training.optimizer import MasterWeights
from refine_control.training.run import fast_precision, make_objective, prepare, training_device

STOCK, SCRIPT, SCRIPT_TEXT, OURS = "stock", "diffusers' script", "diffusers' script, prompts too", "ours"
PEERS = (STOCK, SCRIPT, SCRIPT_TEXT)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSS_TOLERANCE, GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}, {"fp32": 1e-3, "bf16": 0.2}
"""Relative differences of the first loss and of its gradient from which on two steps do not compute the same."""


class StepBench(NamedTuple):
    """The training step against its peers. Steps by name: `stock` is a plain loop over cached latents; `diffusers'
    script` encodes the images in every step, and the prompts too; `ours` is that of `train`, in either type."""

    recipe: str
    device: str
    threads: int
    precision: str
    """The type of `ours`: that with the higher rate of products. Peers are fp32 on a CPU, where autocast is slower
    (docs/engineering.md); on a GPU they are in this type, bf16 by autocast."""
    batch_size: int
    loss: float
    """Of `stock`, before the first update."""
    loss_difference: dict[str, float]
    """|other - stock| / stock, before the first update."""
    gradient_difference: dict[str, float]
    """2-norm of the difference between the student's gradients, relative to the norm of stock's."""
    seconds: dict[str, Spread]
    """Of one step."""
    speedup: dict[str, dict[str, Spread]]
    """By step of ours and by peer: the peer's time over that of ours, paired by round."""
    samples_per_second: dict[str, float]
    phases: dict[str, float]
    """Seconds of the parts of `ours`."""
    gflops: float
    """Matrix products, convolutions and attention of one step of `stock`; 1 multiply-add is 2 FLOP."""
    matmul_gflops: dict[str, float]
    """By precision: GFLOP/s of torch's matrix products with the shapes of a feed-forward, (B N, D) and (B N, 4 D)."""
    floor_seconds: dict[str, float]
    """By precision: `gflops` over that rate, a lower bound of the step's time."""
    fraction_of_floor: dict[str, float]
    """Lower bound over measured time, each in its precision."""
    peak_memory: dict[str, int]
    """Bytes of a fresh process that loads the networks and runs three steps (GPU: allocated by torch)."""

    @property
    def text(self) -> str:
        """As a table."""
        shown = f"{self.device}, {self.threads} threads, batch {self.batch_size}, loss {self.loss:.5g}"
        lines = [
            f"{self.recipe}: {shown}",
            f"{'':32}{'s a step':>10}{'of floor':>10}{'loss differs':>14}{'peak MB':>9}",
        ]
        for name, spread in self.seconds.items():
            memory = f"{self.peak_memory[name] / 1e6:9.0f}" if name in self.peak_memory else ""
            numbers = f"{spread.median:10.4g}{self.fraction_of_floor[name]:10.2f}"
            lines.append(f"  {name:30}{numbers}{self.loss_difference.get(name, 0.0):14.1e}{memory}")
        for name, peers in self.speedup.items():
            for peer, (median, low, high) in peers.items():
                lines.append(f"  {name} is {median:.2f} times [{low:.2f}, {high:.2f}] as fast as {peer}")
        lines.append("  " + ", ".join(f"{name} {seconds:.3g} s" for name, seconds in self.phases.items()))
        rates = ", ".join(f"{name} {rate:.4g}" for name, rate in self.matmul_gflops.items())
        return "\n".join([*lines, f"  {self.gflops:.4g} GFLOP a step; GFLOP/s of products: {rates}"])


class OurStep(Step):
    """The training step of `refine-control train`."""

    def __init__(self, recipe: Recipe, device: torch.device, precision: str, load: Load = prepare):
        training = recipe.training.model_copy(update={"precision": precision})
        self.recipe = recipe
        self.networks = load(recipe.model_copy(update={"training": training}), device)
        self.backbone = self.networks.backbone
        self.objective = make_objective(recipe.objective, self.networks)
        self.master = MasterWeights(self.objective.trainable(), recipe.optimizer, offload=recipe.training.offload)

    def loss(self, batch: Batch, draw: Draw) -> torch.Tensor:
        return self.objective.losses(batch, draw).loss

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.objective.trainable().parameters)

    def update(self) -> None:
        self.master.accumulate()
        self.master.step(self.recipe.optimizer.learning_rate, 0, self.recipe.optimizer.max_grad_norm)

    def phases(self, batch: Batch, draw: Draw) -> dict[str, float]:
        """Seconds of the parts of one step; a teacher runs once more, for its own timing."""

        def seconds(part: Callable[[], Any]) -> float:
            return time_call(part, warmup=0, repeats=1).median

        losses: list[torch.Tensor] = []
        at, asked = self.networks.noised(batch, draw), self.networks.teacher is not None
        answer = {"pass of the teacher": seconds(lambda: self.networks.teacher_answer(at, batch))} if asked else {}
        return {
            **answer,
            "losses": seconds(lambda: losses.append(self.loss(batch, draw))),
            "backward": seconds(losses[0].backward),
            "optimiser": seconds(self.update),
        }


def comparable(recipe: Recipe) -> Recipe:
    """A recipe whose step needs no files: the student starts as `student.init` says, in groups of equal size, which
    cost what groups by relevance cost."""
    training = recipe.training.model_copy(update={"validate_every": 0})
    student = recipe.student.model_copy(update={"placement": "equal"})
    return recipe.model_copy(update={"training": training, "student": student, "init_from": None, "data": DataConfig()})


def _makers(recipe: Recipe, device: torch.device, best: Precision) -> dict[str, Callable[[], Step]]:
    """By name, how to create each step; on a CPU ours also in the other type, if there are units for it."""
    cpu = device.type == "cpu"
    given: Any = recipe, device, partial(prepare, cpu_kernels=False), not cpu and best == "bf16"
    other = "fp32" if best == "bf16" else "bf16"
    both = cpu and "bf16" in (best, fast_precision(device))
    makers: dict[str, Callable[[], Step]] = {
        STOCK: partial(StockStep, *given),
        SCRIPT: partial(ScriptStep, *given),
        SCRIPT_TEXT: partial(ScriptStep, *given, text=True),
        OURS: partial(OurStep, recipe, device, best),
    }
    return {**makers, f"{OURS} in {other}": partial(OurStep, recipe, device, other)} if both else makers


def make_batch(recipe: Recipe, backbone: Backbone, device: torch.device) -> tuple[Batch, Draw]:
    """A random batch with the model's shapes and the fields that the recipe's objective reads."""
    objective, steps = recipe.objective, recipe.objective.few_step.steps
    draw, fields = Draw(recipe.training.seed, "bench", 0, range(samples_at_once(recipe))), fields_read(objective)
    config, count, controlnet = backbone.transformer.config, len(draw.slots), backbone.pipeline.controlnet
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    embeds, pooled = (text_tokens(backbone), config["joint_attention_dim"]), config["pooled_projection_dim"]
    labeled = {"self_supervised": 0, "mixed": count // 2}.get(objective.kind, 0 if objective.is_few_step else count)

    def normals(purpose: str, *shape: int) -> torch.Tensor:
        return draw.normals(purpose, *shape).to(device)

    region = controlnet is None or has_region(controlnet.config)
    batch = Batch(
        latents=normals("latents", *shape),
        cond_latents=normals("masked_latents", *shape),
        mask=(normals("mask", 1, *shape[1:]) > 1).float() if region else None,
        prompt_embeds=normals("prompt_embeds", *embeds),
        pooled_prompt_embeds=normals("pooled_prompt_embeds", pooled),
        slots=draw.slots,
        num_labeled=labeled,
        noise=normals("path noise", *shape) if "noise" in fields else None,
        path=normals("path", steps * math.ceil(8 / steps) - 1, *shape) if "path" in fields else None,
        empty=(normals("empty", *embeds)[:1], normals("empty pooled", pooled)[:1]) if "empty" in fields else None,
    )
    return batch, draw


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


def _three_steps(recipe: Recipe, name: str, best: Precision, threads: int) -> None:
    """Loads the networks and runs three steps of `name`."""
    torch.set_num_threads(threads)
    device = training_device()
    step = _makers(recipe, device, best)[name]()
    batch, draw = make_batch(recipe, step.networks.backbone, device)
    for _ in range(3):
        whole_step(step, batch, draw)


def bench_step(recipe: Recipe, *, repeats: int) -> StepBench:
    """Compares losses, time and memory of the step of a recipe on this machine, on a random batch.

    Raises AssertionError where a step does not have the losses and gradients of the plain loop."""
    with torch_threads(recipe.training.threads):
        return _bench_step(comparable(recipe), repeats)


def refuse_unequal(what: str, differences: Mapping[str, float], tolerances: Mapping[str, float]) -> None:
    """Raises AssertionError where a step differs from the plain loop by more than the tolerance of its type."""
    if wrong := {name: value for name, value in differences.items() if not value <= tolerances[name]}:
        raise AssertionError(f"{what} differ from those of {STOCK}: {wrong}; allowed {dict(tolerances)}")


def _bench_step(recipe: Recipe, repeats: int) -> StepBench:
    device, size, config = training_device(), samples_at_once(recipe), read_configs(recipe.model)["transformer"]
    rates = {name: matmul_rate(config, size, dtype, device) for name, dtype in TYPES.items()}
    best: Precision = "bf16" if fast_precision(device) == "bf16" and rates["bf16"] > rates["fp32"] else "fp32"
    steps = {name: make() for name, make in _makers(recipe, device, best).items()}
    peers = "fp32" if device.type == "cpu" else best
    types = {n: peers if n in PEERS else best if n == OURS else n.rpartition(" ")[2] for n in steps}
    batch, draw = make_batch(recipe, steps[STOCK].networks.backbone, device)
    script = steps[SCRIPT_TEXT]
    assert isinstance(script, ScriptStep)
    batch = script.encoded(batch)  # what all of them start from
    answers = {name: _first_answer(step, batch, draw) for name, step in steps.items()}
    compared = [name for name in steps if name != STOCK]
    (loss, grads), tolerances = answers[STOCK], {n: "bf16" if "bf16" in (types[n], peers) else "fp32" for n in steps}
    losses = {n: abs(answers[n][0] - loss) / abs(loss) for n in compared}
    gradients = {n: _distance(answers[n][1], grads) for n in compared}
    refuse_unequal("losses", losses, {n: LOSS_TOLERANCE[tolerances[n]] for n in compared})
    refuse_unequal("gradients", gradients, {n: GRADIENT_TOLERANCE[tolerances[n]] for n in compared})
    del answers, grads
    timings = interleaved({n: partial(whole_step, step, batch, draw) for n, step in steps.items()}, repeats=repeats)
    our_step = steps[OURS]
    assert isinstance(our_step, OurStep)
    laps = [our_step.phases(batch, draw) for _ in range(repeats)]
    flops = count_flops(partial(whole_step, steps[STOCK], batch, draw))
    return StepBench(
        recipe=recipe.name,
        device=device_name(device),
        threads=torch.get_num_threads(),
        precision=best,
        batch_size=size,
        loss=loss,
        loss_difference=losses,
        gradient_difference=gradients,
        seconds={name: timing.spread for name, timing in timings.items()},
        speedup={n: {peer: ratio(timings[peer], timings[n]).spread for peer in PEERS} for n in steps if n not in PEERS},
        samples_per_second={name: size / timing.median for name, timing in timings.items()},
        phases={name: median_high(lap[name] for lap in laps) for name in laps[0]},
        gflops=flops / 1e9,
        matmul_gflops={name: rate / 1e9 for name, rate in rates.items()},
        floor_seconds={name: flops / rate for name, rate in rates.items()},
        fraction_of_floor={n: flops / rates[types[n]] / timings[n].median for n in steps},
        peak_memory={
            name: run_fresh(_three_steps, recipe, name, best, torch.get_num_threads(), device=device.type).peak_memory
            for name in (*PEERS, OURS)
        },
    )
