"""A plan of memory: what a training step holds on a device, counted on tensors without data, before a weight is loaded.

The step that is counted is the one that runs: the same networks by their configs, the same objective and the same
optimizer, on the meta device. What an operator needs inside of it, and what the allocator loses, is not in the plan.
"""

# B samples on a device at once, h w latents, T text tokens

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from refine_control.conditions.condition import has_region
from refine_control.config import Recipe
from refine_control.metrics.live_bytes import LiveBytes
from refine_control.models.families import layer_counts
from refine_control.models.skeleton import read_configs, text_tokens
from refine_control.photos.buckets import Size
from refine_control.training.assembly import beside, make_objective, shape_of_run
from refine_control.training.few_step import fields_read, needs_target
from refine_control.training.loop import Draw, Objective
from refine_control.training.objectives import Batch, Networks
from refine_control.training.optimizer import MasterWeights, new_moments

_PATH = 8
"""Least levels of a cached path."""


class MemoryPlan(NamedTuple):
    """Bytes on one device, and operations, of a training step."""

    samples: int
    """B: on one device at once."""
    frozen: int
    """Weights of transformer and teacher, and of what else is on the device without being trained."""
    student: int
    """Weights that are trained, in the type of the arithmetic."""
    masters: int
    """fp32 weights beside a student in bf16."""
    moments: int
    average: int
    """The running mean of the weights, and the target network of an objective for few steps."""
    gradients: int
    """The sum in fp32, and those of one batch in the type of the arithmetic."""
    activations: dict[str, int]
    """Kept when the forward passes are done, by what computed them: student, transformer, teacher, target, batch."""
    peak: int
    """The most that is alive at once in a step: weights and moments, and of the rest what is needed then."""
    flops: int
    """Matrix products, convolutions and attentions for one sample; 1 multiply-add is 2."""
    offloaded: int = 0
    """Of moments and mean, what is in the host's memory. torch rounds pinned tensors up to a power of two each."""

    @property
    def resident(self) -> int:
        """Bytes that stay on the device from step to step."""
        return self.frozen + self.student + self.masters + self.moments + self.average - self.offloaded

    @property
    def text(self) -> str:
        """In one line."""
        sizes = {name: getattr(self, name) for name in ("frozen", "student", "masters", "moments", "average")}
        sizes |= {"gradients": self.gradients, "activations": sum(self.activations.values())}
        shown = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in sizes.items() if size)
        away = f"; {self.offloaded / 1e9:.3g} of these in the host's memory" if self.offloaded else ""
        return f"{self.peak / 1e9:.3g} GB with {self.samples} samples at once ({shown}{away})"


class _NoDraw(Draw):
    """Numbers without values."""

    def normals(self, purpose: str, *shape: int) -> torch.Tensor:
        del purpose
        return torch.empty(len(self.slots), *shape, device="meta")

    def uniforms(self, purpose: str) -> torch.Tensor:
        del purpose
        return torch.empty(len(self.slots), device="meta")


@contextmanager
def fused_attention() -> Iterator[None]:
    """torch's attention on the meta device as GPUs compute it; by itself torch would keep all scores there."""
    stock, fused = functional.scaled_dot_product_attention, torch.ops.aten._scaled_dot_product_flash_attention

    def attend(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return fused(query, key, value)[0]

    functional.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock


def micro_batches(recipe: Recipe, processes: int = 1) -> tuple[int, int]:
    """Samples on one device at once, and the number of such batches in an update."""
    each = max(1, recipe.training.batch_size // processes)
    samples = min(recipe.training.device_batch_size or each, each)
    return samples, math.ceil(each / samples)


def plan_memory(recipe: Recipe, size: Size | None = None, processes: int = 1, cpu_kernels: bool = False) -> MemoryPlan:
    """The plan of a recipe's step at a size in latents (h, w), by default the model's own.

    `cpu_kernels`: the operators of a CPU, whose memory is the host's: nothing is offloaded. Points that the student's
    own steps lead to (`rollout`) are counted as one pass of the target network over the batch: they hold no more. Of
    several `processes` that share parameters (fsdp2) each has its part of masters, moments and sums. Raises what
    `skeleton` raises."""
    networks = shape_of_run(recipe, cpu_kernels)
    few = recipe.objective.few_step.model_copy(update={"rollout": 0.0})
    objective = make_objective(recipe.objective.model_copy(update={"few_step": few}), networks)
    rolls = needs_target(recipe.objective) and getattr(objective, "target", None) is None
    target = networks.copy_student() if rolls else getattr(objective, "target", None)
    live, trained = LiveBytes(), networks.trainable
    student = live.hold("student", trained.parameters.values())
    masters = live.hold("masters", trained.masters.values())
    parts = [networks.student, networks.own_transformer, networks.teacher, networks.backbone.transformer]
    frozen = live.hold("frozen", _tensors([*parts, *beside(recipe, networks.backbone)]))
    live.hold("average", _tensors([target, *networks.steered.values()]))
    samples, count = micro_batches(recipe, processes)
    side = networks.backbone.geometry.side // networks.backbone.pipeline.vae_scale_factor
    with fused_attention(), live:
        with live.named("mean"):
            master = MasterWeights(trained, recipe.optimizer, recipe.training.ema_decay)
        with live.named("moments"):  # of the fused update, which needs no more than these
            moments = [new_moments(each, recipe.optimizer.kind) for each in master.masters]
        step = _Step(live, networks, objective, master, target if rolls else None)
        with live.named("batch"):
            batch = _batch(recipe, networks, samples, size or (side, side))
        step.several = count * processes > 1
        step.run(*batch)
    gradients = sum(m.nbytes for m in master.masters) + (student if master.masters is not master.params else 0)
    sums = {"masters": masters, "moments": live.alive["moments"], "mean": live.alive["mean"]}
    parts_of = processes if recipe.training.engine == "fsdp2" else 1  # each process has its rows of these
    elsewhere = {name: size - size // parts_of for name, size in live.at_peak.items() if name in (*sums, "gradients")}
    masters, held, mean = (size // parts_of for size in sums.values())
    del moments
    offload = "none" if cpu_kernels else recipe.training.offload
    offloaded = {"none": 0, "mean": mean, "moments": mean + held}[offload]
    whole = student if processes > 1 else 0  # the copy that one process alone paints with (`Networks.share`)
    resident = frozen, student + whole, masters, held, live.alive["average"] + mean
    peak = live.peak + whole - sum(elsewhere.values()) - offloaded
    return MemoryPlan(samples, *resident, gradients, step.kept, peak, live.flops // samples, offloaded)


def at_most(recipe: Recipe, size: Size | None, processes: int) -> float:
    """A generous bound of the plan's bytes by widths and layers alone, in no time.

    A joint block has at most 24 D^2 weights, kept 5 times in fp32 by training, and 160 D numbers a token and 4 scores a
    pair of tokens and head alive."""
    config, backbone = read_configs(recipe.model)["transformer"], recipe.student.backbone
    heads, width = config["num_attention_heads"], config["num_attention_heads"] * config["attention_head_dim"]
    h, w = size or (config.get("sample_size", 128),) * 2
    tokens, blocks = h * w / config["patch_size"] ** 2 + 600, 3 * sum(layer_counts(config))
    alive = micro_batches(recipe, processes)[0] * tokens * (160 * width + 4 * heads * tokens)
    return 4 * blocks * (24 * width**2 * 5 * (2 if backbone == "whole" else 1) + alive)


class _Step:
    """The work of one device batch, and what was alive when its forward passes were done."""

    def __init__(
        self, live: LiveBytes, networks: Networks, objective: Objective, master: MasterWeights, rolled: Any | None
    ):
        self.live, self.networks, self.objective, self.master, self.rolled = live, networks, objective, master, rolled
        self.several, self.kept = False, dict[str, int]()
        # the parts of the networks, under names
        residuals, answer = networks.residuals, networks.answer
        networks.residuals = live.naming(lambda part, *_: self._name(part), residuals)  # type: ignore[method-assign]
        networks.answer = live.naming(lambda *_: "transformer", answer)  # type: ignore[method-assign]

    def _name(self, controlnet: Any) -> str:
        names = {self.networks.student: "student", self.networks.teacher: "teacher"}
        return names.get(controlnet, "target")

    def run(self, batch: Batch, draw: Draw) -> None:
        """Loss, gradients and their sum, which is there before where the update has `several` batches."""
        live, statistics = self.live, None
        if self.several:
            with live.named("gradients"):
                for each in self.master.masters:
                    each.grad = torch.zeros_like(each)
            with torch.no_grad():
                statistics = self.objective.statistics(batch, draw)
        if self.rolled is not None:
            with torch.no_grad():
                self.networks.answer(self.rolled, self.networks.noised(batch, draw), batch)
        with live.named("losses"):
            loss = self.objective.losses(batch, draw, statistics).loss
        held = {"student", "transformer", "teacher", "target", "batch", "losses"}
        self.kept = {name: size for name, size in live.alive.items() if name in held and size}
        with live.named("backward"):
            torch.autograd.backward(loss)
        del loss
        with live.named("gradients"):
            self.master.accumulate()


def _tensors(modules: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Parameters and buffers of modules, of those that are none."""
    return chain.from_iterable(chain(each.parameters(), each.buffers()) for each in modules if each is not None)


def _batch(recipe: Recipe, networks: Networks, samples: int, size: Size) -> tuple[Batch, Draw]:
    """A batch as the caches give it, in fp32, and its draw."""
    config, objective = networks.backbone.transformer.config, recipe.objective
    channels, tokens = networks.backbone.latent_channels, text_tokens(networks.backbone)
    knots = objective.few_step.steps * math.ceil(_PATH / objective.few_step.steps)
    widths = config["joint_attention_dim"], config["pooled_projection_dim"]
    labeled = {"supervised": samples, "from_scratch": samples, "one_to_one": samples, "mixed": samples // 2}

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(samples, *shape, device="meta")

    fields, draw = fields_read(objective), _NoDraw(0, "plan", 0, range(samples))
    batch = Batch(
        latents=new(channels, *size),
        cond_latents=new(channels, *size),
        mask=new(1, *size) if has_region(networks.student.config) else None,
        prompt_embeds=new(tokens, widths[0]),
        pooled_prompt_embeds=new(widths[1]),
        slots=draw.slots,
        num_labeled=labeled.get(objective.kind, 0),
        noise=new(channels, *size) if "noise" in fields else None,
        path=new(knots - 1, channels, *size) if "path" in fields else None,
        empty=(new(tokens, widths[0])[:1], new(widths[1])[:1]) if "empty" in fields else None,
    )
    return batch, draw
