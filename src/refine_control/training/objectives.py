"""The paper's two stages and its baselines as objectives: sums of named terms over frozen networks and one student.

An objective of these kinds is a row of `KINDS`: which terms it has. Another kind of loss is a class of its own beside
`Distillation`, with the same `Networks` and `noised`.
"""

# B batch, h w latents, N tokens, D width, S student layers

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

from refine_control import flow
from refine_control.conditions.condition import control_cond
from refine_control.config import Engine, LossWeights, SigmaConfig
from refine_control.injection import expand_residuals
from refine_control.losses import (
    Groups,
    LayerTargets,
    Losses,
    combine,
    group_targets,
    kept_targets,
    layer_losses,
    mask_weight,
    mean_squares,
    output_loss,
    task_loss,
)
from refine_control.models.backbone import Backbone, predict_velocity
from refine_control.models.controlnet import (
    ControlNet,
    control_residuals,
    injection_of,
    layer_modules,
    site_groups,
    trainable_parameters,
)
from refine_control.models.devices import send
from refine_control.models.own_transformer import sharing_copy
from refine_control.training.loop import Draw, Objective
from refine_control.training.optimizer import Trainable, compute_in


class Batch(NamedTuple):
    """Samples in latents, those with ground truth first. latents, cond_latents (B,16,h,w), mask (B,1,h,w)."""

    latents: torch.Tensor
    """x0: the image's own in D_sl; in D_ssl the masked image's, or the teacher's completion."""
    cond_latents: torch.Tensor
    """Of the condition picture; in inpainting, of the masked image."""
    mask: torch.Tensor | None
    """1 = inpaint; None where the condition has no region."""
    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    slots: Sequence[int]
    """Of the rows, in the batch of the step."""
    num_labeled: int
    """The first so many rows are of D_sl: their latents are the ground truth."""
    noise: torch.Tensor | None = None
    """(B,16,h,w) in which the teacher's completions began."""
    path: torch.Tensor | None = None
    """(B,K-1,16,h,w): the way of the completions at levels 1 - 1/K, ..., 1/K."""
    empty: tuple[torch.Tensor, torch.Tensor] | None = None
    """Embeddings and pooled embeddings of the empty prompt, one row each."""

    def take(self, rows: torch.Tensor) -> Batch:
        """Some of the samples, by their numbers in the batch; all of one kind."""
        numbers = rows.tolist()
        return self._replace(
            **{name: value[rows] for name, value in self._asdict().items() if isinstance(value, torch.Tensor)},
            slots=[self.slots[number] for number in numbers],
            num_labeled=sum(number < self.num_labeled for number in numbers),
        )


class Point(NamedTuple):
    """One point on the path for each sample, and the velocity there."""

    noisy_latents: torch.Tensor
    noise: torch.Tensor
    sigmas: torch.Tensor
    target: torch.Tensor


def noised(latents: torch.Tensor, draw: Draw, sigmas: SigmaConfig | None = None, shift: float = 1.0) -> Point:
    """x_t of clean latents (B,16,h,w) at logit-normal sigmas, shifted, with the noise of the draw's slots."""
    sigmas = sigmas or SigmaConfig()
    drawn = flow.logit_normal_sigmas(draw.normals("sigmas"), sigmas.logit_mean, sigmas.logit_std, shift)
    drawn = send(drawn, latents.device)
    noise = send(draw.normals("noise", *latents.shape[1:]), latents.device)
    return Point(flow.interpolate(latents, noise, drawn), noise, drawn, flow.velocity(latents, noise))


class Answer(NamedTuple):
    """What a ControlNet injects, and the velocity that follows."""

    residuals: Sequence[torch.Tensor]
    velocity: torch.Tensor


class Networks:
    """Frozen backbone and teacher, one student: every forward pass an objective makes.

    The teacher (and the backbone behind it) runs outside the graph; behind the student the transformer is in the graph,
    for gradients pass through it to the residuals. It is the backbone's, frozen, or that of `student_backbone`, whose
    parameters that require a gradient are trained with the ControlNet."""

    def __init__(
        self,
        backbone: Backbone,
        teacher: ControlNet | None,
        student: ControlNet,
        *,
        student_backbone: Backbone | None = None,
        dtype: torch.dtype = torch.float32,
        sigmas: SigmaConfig | None = None,
        conditioning_scale: float = 1.0,
        guidance_scale: float = 1.0,
        teacher_mark: str = "",
    ):
        self.teacher_mark = teacher_mark
        """Of the exact weights of backbone and teacher, as caches of completions state it."""
        self.backbone, self.teacher, self.student = backbone, teacher, student
        self.student_backbone = student_backbone or backbone
        transformer = self.student_backbone.transformer
        self.steered: dict[ControlNet, Any] = {} if transformer is backbone.transformer else {student: transformer}
        """Transformers of their own, by ControlNet; every other ControlNet steers the frozen one."""
        self.trainable = compute_in(student, dtype, trainable_parameters(student))
        if self.own_transformer is not None:
            trained = compute_in(self.own_transformer, dtype, dict(self.own_transformer.named_parameters()))
            self.trainable = Trainable.joined(controlnet=self.trainable, transformer=trained)
        backbone.transformer.to(dtype).requires_grad_(False)
        if teacher is not None:
            teacher.to(dtype).requires_grad_(False).eval()  # type: ignore[arg-type]
        self.dtype, self.whole = dtype, student
        """`whole` is a student that one process alone may run: where it is shared, a copy that lacks what was trained.
        """
        self.sigmas = sigmas or SigmaConfig()
        self.conditioning_scale, self.guidance_scale = conditioning_scale, guidance_scale
        """The latter is a number that distilled transformers (FLUX) read; there is no pass without guidance."""

    @property
    def own_transformer(self) -> Any | None:
        """The transformer that is trained with the student; None where it steers the frozen one."""
        return self.steered.get(self.student)

    @property
    def whole_backbone(self) -> Backbone:
        """The backbone that `whole` paints with."""
        transformer = self.steered.get(self.whole)
        return self.backbone if transformer is None else self.backbone.with_transformer(transformer)

    def copy_student(self) -> ControlNet:
        """A frozen copy of the student for a running mean, and of its own transformer, whose frozen part is shared."""
        copied, pairs = copy.deepcopy(self.student).requires_grad_(False), list[tuple[Any, Any]]()
        if self.own_transformer is not None:
            self.steered[copied] = sharing_copy(self.own_transformer).requires_grad_(False)
            pairs += zip(layer_modules(self.steered[copied]), layer_modules(self.own_transformer), strict=True)
        for block, original in (*pairs, *zip(layer_modules(copied), layer_modules(self.student), strict=True)):
            if original._compiled_call_impl is not None:  # which copies of modules leave out
                block.compile()
        return copied

    def share(self, engine: Engine) -> Callable[[bool], None]:
        """Shares the student over all processes; see `Objective.share`."""
        from refine_control.training.sharding import shard

        self.whole = self.copy_student()
        parts = {"": self.student}
        if self.own_transformer is not None:
            parts = {"controlnet.": self.student, "transformer.": self.own_transformer}
        self.trainable, average = shard(parts, self.trainable, self.dtype, engine)
        return average

    @torch.no_grad()
    def load(self, weights: Mapping[str, torch.Tensor], student: ControlNet) -> None:
        """Copies values, by the names of `trainable`, into the student or a copy of it."""
        parts: dict[str, Any] = {"": student}
        if self.own_transformer is not None:
            parts = {"controlnet.": student, "transformer.": self.steered[student]}
        for prefix, part in parts.items():
            for name, parameter in part.named_parameters():
                if (value := weights.get(prefix + name)) is not None:
                    parameter.copy_(value.to(parameter.device))  # a cast before the copy would be the host's

    def shift_at(self, size: Sequence[int]) -> float:
        """The sigma shift for latents of size h w: the recipe's, else the scheduler's."""
        return self.backbone.shift_at(size) if self.sigmas.shift is None else self.sigmas.shift

    def noised(self, batch: Batch, draw: Draw) -> Point:
        """Where on the path a batch is at this step."""
        shift = self.shift_at(batch.latents.shape[-2:])
        return noised(batch.latents, draw._replace(slots=batch.slots), self.sigmas, shift)

    def residuals(
        self, controlnet: ControlNet, at: Point, batch: Batch, guidance: float | None = None
    ) -> list[torch.Tensor]:
        """What a ControlNet injects there, (B,N,D) each, without a pass of the transformer."""
        return control_residuals(
            controlnet,
            at.noisy_latents,
            at.sigmas,
            batch.prompt_embeds,
            control_cond(batch.cond_latents, batch.mask),
            batch.pooled_prompt_embeds,
            self.conditioning_scale,
            self.guidance_scale if guidance is None else guidance,
        )

    def answer(self, controlnet: ControlNet, at: Point, batch: Batch, guidance: float | None = None) -> Answer:
        """What a ControlNet injects there, and the velocity of the transformer that it steers.

        `guidance` stands for `guidance_scale`."""
        scale = self.guidance_scale if guidance is None else guidance
        residuals = self.residuals(controlnet, at, batch, scale)
        text = batch.prompt_embeds, batch.pooled_prompt_embeds
        asked = self.steered.get(controlnet, self.backbone.transformer), at.noisy_latents, at.sigmas, *text
        return Answer(residuals, predict_velocity(*asked, residuals, injection_of(controlnet), scale))

    def student_answer(self, at: Point, batch: Batch) -> Answer:
        """With a graph back to the student's parameters."""
        return self.answer(self.student, at, batch)

    @torch.no_grad()
    def teacher_answer(self, at: Point, batch: Batch, guidance: float | None = None) -> Answer:
        """The same point and prompt, without a graph; a residual for each site."""
        answer = self.answer(self._require_teacher(), at, batch, guidance)
        return answer._replace(residuals=self._at_sites(answer.residuals))

    @torch.no_grad()
    def guided_velocity(self, at: Point, batch: Batch, scale: float) -> torch.Tensor:
        """The teacher's velocity there with classifier-free guidance, or with that which is distilled into it,
        (B,16,h,w) in fp32, without a graph."""
        v = self.teacher_answer(at, batch, scale).velocity.float()
        if scale <= 1 or self.backbone.embeds_guidance:
            return v
        assert batch.empty is not None
        embeds, pooled = (each.expand(len(v), *each.shape[1:]) for each in batch.empty)
        unprompted = batch._replace(prompt_embeds=embeds, pooled_prompt_embeds=pooled)
        return flow.guided(v, self.teacher_answer(at, unprompted).velocity.float(), scale)

    @torch.no_grad()
    def teacher_residuals(self, at: Point, batch: Batch) -> list[torch.Tensor]:
        """What the teacher injects there at each site, without a pass of the transformer."""
        return self._at_sites(self.residuals(self._require_teacher(), at, batch))

    def _at_sites(self, residuals: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The teacher's residuals, one for each site that it feeds."""
        injection = injection_of(self._require_teacher())
        return expand_residuals(residuals, self.backbone.num_sites + 1, injection)[:-1]

    def _require_teacher(self) -> ControlNet:
        if self.teacher is None:
            raise ValueError("this objective was built without a teacher")
        return self.teacher

    @property
    def groups(self) -> list[list[int]]:
        """G_j of Eq. 5: the sites that each of the student's layers feeds."""
        return site_groups(self.student, self.backbone.num_sites)

    @property
    def num_layers(self) -> int:
        return len(layer_modules(self.student))


class Forward:
    """A batch at its point of the path; teacher and student answer when a term first asks them."""

    def __init__(self, networks: Networks, batch: Batch, draw: Draw):
        self.networks, self.batch, self.at = networks, batch, networks.noised(batch, draw)

    @cached_property
    def teacher(self) -> Answer:
        return self.networks.teacher_answer(self.at, self.batch)

    @cached_property
    def student(self) -> Answer:
        return self.networks.student_answer(self.at, self.batch)


def region_weight(batch: Batch, alpha: float | None) -> torch.Tensor | None:
    """w of Eq. 2, (B,1,h,w); None is J: for a condition without a region, and where `alpha` is None."""
    return None if batch.mask is None or alpha is None else mask_weight(batch.mask, alpha)


def masked_task(forward: Forward, weights: LossWeights) -> torch.Tensor:
    """Eq. 3 on the rows that have a ground truth, as their part of the mean over all rows."""
    count = forward.batch.num_labeled
    weight = region_weight(forward.batch, weights.alpha)
    target, velocity = forward.at.target, forward.student.velocity
    loss = task_loss(target[:count], velocity[:count], None if weight is None else weight[:count])
    return loss * (count / len(target))


def plain_task(forward: Forward, weights: LossWeights) -> torch.Tensor:
    """Eq. 3 with w = J; `alpha` is not read."""
    del weights
    return task_loss(forward.at.target, forward.student.velocity)


def teacher_output(forward: Forward, weights: LossWeights) -> torch.Tensor:
    """Eq. 4; with `output_alpha` the weight of Eq. 2 stands inside it, as in Eq. 3."""
    weight = region_weight(forward.batch, weights.output_alpha)
    return output_loss(forward.teacher.velocity, forward.student.velocity, weight)


class Terms(NamedTuple):
    """What an objective adds up, and what it compares the student's layers with; None: it has no such term."""

    task: Callable[[Forward, LossWeights], torch.Tensor] | None = None
    output: Callable[[Forward, LossWeights], torch.Tensor] | None = None
    layers: Callable[[Sequence[torch.Tensor], Groups], LayerTargets] | None = None
    """(teacher's residuals, the student's groups of sites) -> targets."""


KINDS = {
    "supervised": Terms(masked_task, teacher_output, group_targets),
    "self_supervised": Terms(None, teacher_output, group_targets),
    "from_scratch": Terms(masked_task),
    "mixed": Terms(masked_task, teacher_output, group_targets),
    "one_to_one": Terms(plain_task, teacher_output, kept_targets),
}
"""Eq. 1 (stage 1); Eq. 6 (stage 2, the teacher alone); Eq. 3 alone (Student_fc); Eq. 1 where a sample has a ground
truth and Eq. 6 where it has none (one_stage); SSD-1B's loss (Student_ssd)."""


class Distillation(Objective):
    """l_task L_task + l_distill L_distill + l_af L_af of the terms that it has.

    With `relative_features` each layer's term is divided by the mean square of its target over the whole batch."""

    def __init__(self, networks: Networks, terms: Terms, weights: LossWeights, relative_features: bool = False):
        self.networks, self.terms, self.weights, self.relative = networks, terms, weights, relative_features

    def trainable(self) -> Trainable:
        """The student's parameters."""
        return self.networks.trainable

    def share(self, engine: Engine) -> Callable[[bool], None]:
        """Shares the student."""
        return self.networks.share(engine)

    def statistics(self, batch: Batch, draw: Draw) -> torch.Tensor | None:
        """The mean square of each layer's target, (S,), where the terms are divided by it."""
        if not self.relative or self.terms.layers is None:
            return None
        residuals = self.networks.teacher_residuals(self.networks.noised(batch, draw), batch)
        return mean_squares(self.terms.layers(residuals, self.networks.groups).values)

    def _features(self, forward: Forward, sizes: torch.Tensor | None) -> torch.Tensor | None:
        if self.terms.layers is None:
            return None
        targets = self.terms.layers(forward.teacher.residuals, self.networks.groups)
        if self.relative and sizes is None:  # the batch is not split
            sizes = mean_squares(targets.values)
        return layer_losses(targets, forward.student.residuals, sizes)

    def losses(self, batch: Batch, draw: Draw, statistics: torch.Tensor | None = None) -> Losses:
        """Each term, and their weighted sum."""
        forward, terms, weights = Forward(self.networks, batch, draw), self.terms, self.weights
        output = terms.output and terms.output(forward, weights)  # asks the teacher, before there is a graph in memory
        features = self._features(forward, statistics)
        return combine(weights, terms.task and terms.task(forward, weights), output, features)
