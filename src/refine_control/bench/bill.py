"""`refine-control plan`: time, memory, disk and money of recipes, and of the whole chain around them, before a run.

Operations and memory are counted on the networks' shapes (`training.memory`), bytes on the disk follow from the formats
of the cache. Time is operations over the machine's peak rate times an efficiency, assumed or measured.
"""

# h w latents, T text tokens, K levels of a path

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from refine_control.bench.machines import Machine, named_machine, this_machine
from refine_control.cache.building import completion_sampler
from refine_control.cache.stored import Stored, sample_bytes
from refine_control.config import Precision, Recipe, SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.metrics.cost import count_parameters
from refine_control.metrics.live_bytes import LiveBytes
from refine_control.models.backbone import Backbone, predict_velocity
from refine_control.models.controlnet import build_student, control_residuals
from refine_control.models.devices import device_name, memory_bytes
from refine_control.models.skeleton import skeleton, text_tokens
from refine_control.photos.buckets import Size
from refine_control.records import LABELED, UNLABELED
from refine_control.training.assembly import reads_teacher
from refine_control.training.memory import MemoryPlan, fused_attention, plan_memory
from refine_control.training.memory_choice import chosen_settings, fitted, too_large, with_settings
from refine_control.training.run import training_device

SAMPLES = 260_000
"""Of both data sets together, half of them each, as in the paper."""
PAIRS, PATH_LEVELS, PATH_STEPS = 20_000, 8, {"mini": 8, "sd3": 24}
TESTED = 1000
ANNOTATION_FLOPS = 32e12
"""Of an image, estimated: Qwen2.5-VL-7B reads 1,400 image tokens (2 x 7.6e9 a token, 7 TFLOP of its vision tower) and
writes 40 more; SAM 2.1 large takes 0.8 TFLOP."""
BUILT_BYTES = 0.3
"""Of a pixel: a JPEG of high quality and its mask, estimated."""
BUILD_SECONDS = 0.1
"""Of one core for a megapixel of the result, estimated: decode, crop, resize, encode."""


class Stage(NamedTuple):
    """One step of the chain."""

    name: str
    samples: int
    operations: float
    """FLOP."""
    seconds: float
    devices: int
    """That work at the same time; 0: the CPU."""
    memory: float | None
    """Bytes on one device; None: not counted."""
    disk: float
    """Bytes that it writes."""
    money: float
    problem: str = ""
    """Why it does not fit, and the smallest change with which it does."""

    def with_more(self, other: Stage) -> Stage:
        """With the work of another one for the same samples."""
        summed = {name: getattr(self, name) + getattr(other, name) for name in ("operations", "seconds", "money")}
        return self._replace(**summed)


class Bill(NamedTuple):
    """What a plan says."""

    machine: Machine
    price: float
    """An hour of one device."""
    stages: list[Stage]
    memory: dict[str, MemoryPlan]
    """By recipe."""
    chosen: dict[str, list[str]]
    """By recipe with `training.memory: auto`, its settings for this machine."""
    operations: float
    hours: float
    disk: float
    money: float
    lengths: dict[str, str]
    """By recipe, how often its training passes over the samples."""

    @property
    def problems(self) -> list[str]:
        """Of the stages that do not fit."""
        return [stage.problem for stage in self.stages if stage.problem]

    @property
    def text(self) -> str:
        """As a table."""
        m = self.machine
        head = f"{m.count} x {m.name}, {m.memory / 1e9:.3g} GB each, {m.bf16 / 1e12:.3g} TFLOP/s in bf16, "
        lines = [head + f"{m.fp32 / 1e12:.3g} in fp32; efficiency {m.efficiency:.2f} ({m.basis})"]
        lines += [f"{'':34}{'samples':>11}{'PFLOP':>12}{'hours':>10}{'devices':>9}{'GB':>8}{'disk GB':>9}{'money':>10}"]
        total = Stage("total", 0, self.operations, 3600 * self.hours, 0, None, self.disk, self.money)
        for stage in (*self.stages, *([total] if len(self.stages) > 1 else [])):
            memory = "" if stage.memory is None else f"{stage.memory / 1e9:.1f}"
            devices = "" if stage is total else str(stage.devices or "CPU")
            lines.append(
                f"{stage.name:34}{stage.samples or '':>11}{stage.operations / 1e15:12,.4g}{stage.seconds / 3600:10,.3g}"
                f"{devices:>9}{memory:>8}{stage.disk / 1e9:9.3g}{stage.money:10,.2f}"
            )
        lines += [f"{name}: {length}" for name, length in self.lengths.items()]
        lines += [f"{name}: {plan.text}" for name, plan in self.memory.items()]
        lines += [f"{name}: chosen {' '.join(settings)}" for name, settings in self.chosen.items()]
        return "\n".join([*lines, *(f"does not fit: {problem}" for problem in self.problems)])


class Ask(NamedTuple):
    """What the user chooses beside the recipes."""

    machine: str = "this"
    size: int | None = None
    """Side in pixels; None: the model's own."""
    samples: int = SAMPLES
    pairs: int = PAIRS
    """Samples with the teacher's guided paths, for few steps."""
    tested: int = TESTED
    price: float = 0.0
    efficiency: float | None = None
    measured: Path | None = None
    """JSON of `bench step`."""
    chain: bool = False
    epochs: float | None = None
    """Passes of each training over the samples of its caches; None: the recipe's steps."""


def plan(recipes: Sequence[Recipe], ask: Ask) -> Bill:
    """The bill of recipes on a machine, with `chain` of the steps before and after training too.

    Raises InvalidInputError for an unknown machine, for a size that the model cannot paint and for a file without an
    efficiency, and what `skeleton` raises."""
    backbone = skeleton(recipes[0].model, recipes[0].teacher, controlled=reads_teacher(recipes[0]) or ask.chain)
    if ask.size:
        backbone.geometry.check(ask.size, ask.size)
    side = (ask.size or backbone.geometry.side) // backbone.pipeline.vae_scale_factor
    recipes = [_on_machine(_with_length(each, ask), ask, (side, side)) for each in recipes]
    machine, plans = _machine(recipes, ask, (side, side))
    chosen = {each.name: chosen_settings(each) for each in recipes if each.training.memory == "auto"}
    pricing = _Pricing(machine, ask.price)
    stages = [_training(recipe, plans[recipe.name], pricing, (side, side)) for recipe in recipes]
    if ask.chain:
        before, after = _around(recipes, ask, backbone, (side, side), pricing)
        stages = [*before, *stages, *after]
    sums = (sum(getattr(stage, name) for stage in stages) for name in ("operations", "seconds", "disk", "money"))
    operations, seconds, disk, money = sums
    lengths = {each.name: _length(each, ask) for each in recipes if ask.chain or ask.epochs}
    return Bill(machine, ask.price, stages, plans, chosen, operations, seconds / 3600, disk, money, lengths)


def _cached_samples(recipe: Recipe, ask: Ask) -> int:
    """Samples that a recipe is trained on."""
    return sum(count for _, _, count, _ in _caches([recipe], ask))


def _with_length(recipe: Recipe, ask: Ask) -> Recipe:
    """The recipe with as many steps as `ask.epochs` need."""
    if ask.epochs is None:
        return recipe
    steps = math.ceil(ask.epochs * _cached_samples(recipe, ask) / recipe.training.batch_size)
    return with_settings(recipe, {"training.steps": steps})


def _length(recipe: Recipe, ask: Ask) -> str:
    training, samples = recipe.training, _cached_samples(recipe, ask)
    passes, whose = training.steps * training.batch_size / samples, "of the recipe" if ask.epochs is None else "to set"
    return (
        f"training.steps={training.steps} {whose}, with training.batch_size={training.batch_size} "
        f"{passes:.3g} passes over {samples:,} samples"
    )


def _on_machine(recipe: Recipe, ask: Ask, size: Size) -> Recipe:
    """The recipe as it runs on the machine: `training.memory: auto` chooses.

    Raises InvalidInputError where nothing fits."""
    if recipe.training.memory != "auto":
        return recipe
    if ask.machine == "this":
        device = training_device()
        name, memory, processes, cpu = device_name(device), memory_bytes(device), 1, device.type == "cpu"
    else:
        name, processes, memory, cpu = *named_machine(ask.machine)[:3], False
    return fitted(recipe, memory, name, size=size, processes=processes, cpu_kernels=cpu)


def _machine(recipes: Sequence[Recipe], ask: Ask, size: Size) -> tuple[Machine, dict[str, MemoryPlan]]:
    """The machine, and the plans of memory on it."""
    efficiency, basis = ask.efficiency, "given"
    if ask.measured:
        efficiency, basis = read_efficiency(ask.measured), f"measured in {ask.measured}"
    if ask.machine != "this":
        machine = named_machine(ask.machine, efficiency, basis)
        return machine, {each.name: plan_memory(each, size, machine.count) for each in recipes}
    kernels = not torch.cuda.is_available()
    plans = {each.name: plan_memory(each, size, 1, kernels) for each in recipes}
    measurable = next((each for each in recipes if not each.objective.is_few_step), recipes[0])
    return this_machine(measurable, plans[measurable.name], efficiency, basis), plans


def read_efficiency(path: Path) -> float:
    """The share of the product rate in a JSON of `bench step`. Raises InvalidInputError for another file."""
    try:
        return float(json.loads(path.read_text())["fraction_of_floor"]["ours"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidInputError(f"{path} is no result of `refine-control bench step --json`; make one") from None


class _Pricing(NamedTuple):
    """Operations -> stages."""

    machine: Machine
    price: float

    def stage(self, name: str, samples: int, flops: float, precision: str, devices: int = 1, **more: Any) -> Stage:
        """`flops` of a sample; `more` are fields of `Stage`."""
        rate = devices * self.machine.efficiency * (self.machine.fp32 if precision == "fp32" else self.machine.bf16)
        seconds = samples * flops / rate
        fields = {"memory": None, "disk": 0.0, **more}
        return Stage(name, samples, samples * flops, seconds, devices, money=self._money(seconds, devices), **fields)

    def _money(self, seconds: float, devices: int) -> float:
        return seconds / 3600 * devices * self.price


def _training(recipe: Recipe, plan: MemoryPlan, pricing: _Pricing, size: Size) -> Stage:
    """The training by one recipe on all devices."""
    machine, training = pricing.machine, recipe.training
    problem = ""
    if plan.peak > machine.memory:
        on = {"size": size, "processes": machine.count, "cpu_kernels": machine.cpu}
        problem = too_large(recipe, plan, machine.memory, machine.name, **on)
    weights = (plan.masters or plan.student) * (1 + bool(training.ema_decay))
    saved = 2 * (weights + plan.moments)  # two checkpoints while one is replaced
    return pricing.stage(
        f"train {recipe.name}",
        training.steps * training.batch_size,
        plan.flops,
        training.precision,
        machine.count,
        memory=plan.peak,
        disk=saved,
        problem=problem,
    )


class _Passes(NamedTuple):
    """Operations for one sample of the frozen networks, and bytes that are alive at once."""

    encoding: int
    """One picture by the VAE."""
    decoding: int
    text: int
    """One prompt."""
    teacher: int
    """One step of transformer and teacher."""
    student: int
    peaks: tuple[int, int]
    """Bytes with all weights in fp32: of encoding, and of painting by the teacher."""


def _passes(backbone: Backbone, student: Any, size: Size) -> _Passes:
    """Counts one sample without gradients."""
    text = text_tokens(backbone)
    config, encoders = backbone.transformer.config, backbone.text_encoders
    counted, peaks = dict[str, int](), dict[str, int]()

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(1, *shape, device="meta")

    def count(name: str, weights: Sequence[Any], fn: Callable[[], Any]) -> None:
        live = LiveBytes()
        for module in weights:
            live.hold("weights", [*module.parameters(), *module.buffers()])
        with torch.no_grad(), fused_attention(), live:
            fn()
        counted[name], peaks[name] = live.flops, live.peak

    channels, pooled = config["in_channels"], config["pooled_projection_dim"]
    pixels = [side * backbone.pipeline.vae_scale_factor for side in size]
    extra = student.config["extra_conditioning_channels"]

    def step(controlnet: Any) -> Callable[[], Any]:
        given = new(channels, *size), new(), new(text, config["joint_attention_dim"])

        def run() -> None:
            cond, vector = new(channels + extra, *size), new(pooled)
            residuals = control_residuals(controlnet, *given, cond, vector)
            predict_velocity(backbone.transformer, *given, vector, residuals)

        return run

    vae, painters = backbone.vae, (backbone.transformer, backbone.pipeline.controlnet)
    count("encoding", [vae, *encoders], lambda: backbone.encode_images(new(3, *pixels)))
    count("decoding", [vae], lambda: backbone.decode_latents(new(channels, *size)))
    count("teacher", [vae, *encoders, *painters], step(backbone.pipeline.controlnet))
    count("student", [], step(student))
    clip, t5 = encoders[0].config.max_position_embeddings, backbone.max_sequence_length
    lengths = [clip, clip, t5][: len(encoders)]
    weights = [count_parameters(each) for each in encoders]
    words = sum(2 * length * size for length, size in zip(lengths, weights, strict=True))
    steps = peaks["encoding"], peaks["teacher"]
    return _Passes(counted["encoding"], counted["decoding"], words, counted["teacher"], counted["student"], steps)


def _around(
    recipes: Sequence[Recipe], ask: Ask, backbone: Backbone, size: Size, pricing: _Pricing
) -> tuple[list[Stage], list[Stage]]:
    """What comes before the training and after it."""
    with torch.device("meta"):
        student = build_student(backbone.transformer, None, recipes[-1].student.num_layers, "transformer", 0)
    passes, pixels = _passes(backbone, student, size), math.prod(size) * backbone.pipeline.vae_scale_factor**2
    seconds, written = ask.samples * BUILD_SECONDS * pixels / 2**20, ask.samples * BUILT_BYTES * pixels
    before = [pricing.stage("data annotate", ask.samples, ANNOTATION_FLOPS, "bf16", pricing.machine.count)]
    if recipes[0].model == "mini":  # rendered scenes know their prompts
        before = []
    before += [Stage("data build", ask.samples, 0, seconds, 0, None, written, 0.0)]
    for name, role, count, stored in dict.fromkeys(_caches(recipes, ask)):
        flops, sampler = passes.text + passes.encoding * (1 + (role == LABELED)), stored.completions
        disk, peak = count * _cached_bytes(backbone, stored, role, size), passes.peaks[bool(sampler)]
        before.append(pricing.stage(f"cache {name}", count, flops, "fp32", memory=peak, disk=disk))
        if sampler:
            flops = sampler.num_inference_steps * (1 + (sampler.guidance_scale > 1)) * passes.teacher
            before[-1] = before[-1].with_more(pricing.stage("", count, flops, sampler.precision))
    return before, _evaluation(recipes, ask, passes, pricing)


def _caches(recipes: Sequence[Recipe], ask: Ask) -> Iterator[tuple[str, str, int, Stored]]:
    """Name, role, samples and options of the caches that recipes read, as docs/sd3.md makes them."""
    mini, half = recipes[0].model == "mini", ask.samples // 2
    plain = Stored() if mini else Stored(torch.bfloat16, "int8")
    precision: Precision = "fp32" if mini else "bf16"
    for recipe in recipes:
        objective, few = recipe.objective, recipe.objective.few_step
        for role in objective.roles:
            completed = objective.x0_source == "teacher" and (role == UNLABELED or objective.is_few_step)
            if not completed:
                yield role, role, half, plain
            elif objective.is_few_step:
                path = PATH_LEVELS if objective.reads_paths else 0
                steps = PATH_STEPS["mini" if mini else "sd3"] if path else 8
                painted = completion_sampler(steps, few.teacher_guidance, path > 0, precision)
                yield "paths of the teacher", role, ask.pairs, plain._replace(completions=painted, path=path)
            else:
                painted = completion_sampler(precision=precision)
                yield "completions of the teacher", role, half, plain._replace(completions=painted)


def _cached_bytes(backbone: Backbone, stored: Stored, role: str, size: Size) -> float:
    """Of one sample."""
    config, clips, t5 = backbone.transformer.config, backbone.text_encoders[:2], backbone.max_sequence_length
    width = config["joint_attention_dim"]
    tokens = [(clips[0].config.max_position_embeddings, sum(each.config.hidden_size for each in clips))]
    tokens += [(t5, width if len(backbone.text_encoders) > 2 else 0)] if t5 else []
    return sample_bytes(stored, role, config["in_channels"], size, tokens, width, config["pooled_projection_dim"])


def _evaluation(recipes: Sequence[Recipe], ask: Ask, passes: _Passes, pricing: _Pricing) -> list[Stage]:
    """Teacher and last student on the same test samples, each in its own way of sampling; metrics left out."""
    first, last = recipes[0].sampler, recipes[-1].sampler

    def picture(sampler: SamplerConfig, step: int) -> int:
        calls = sampler.num_inference_steps * (1 + (sampler.guidance_scale > 1))
        return calls * step + passes.text + passes.encoding + passes.decoding

    flops = picture(first, passes.teacher) + picture(last, passes.student)
    return [pricing.stage("evaluate", ask.tested, flops, last.precision, memory=passes.peaks[1])]
