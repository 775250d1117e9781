"""The paper's two stages and its baseline as objectives: each owns the frozen networks and one student."""

# B batch, h w latents, S student layers

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from refine_control import flow
from refine_control.conditions.inpainting import control_cond
from refine_control.config import LossWeights, SigmaConfig
from refine_control.losses import (
    Losses,
    combine,
    feature_losses,
    kept_layers,
    mask_weight,
    mean_squares,
    one_to_one_losses,
    output_loss,
    task_loss,
    teacher_totals,
)
from refine_control.models.backbone import Backbone, predict_velocity
from refine_control.models.controlnet import ControlNet, control_residuals, trainable_parameters
from refine_control.training.loop import Draw, Objective
from refine_control.training.optimizer import Trainable, compute_in


class LabeledBatch(NamedTuple):
    """From D_sl: everything, in latents. latents and masked_latents (B,16,h,w), mask (B,1,h,w) 1 = inpaint."""

    latents: torch.Tensor
    masked_latents: torch.Tensor
    mask: torch.Tensor
    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor


class UnlabeledBatch(NamedTuple):
    """From D_ssl: no ground truth. x0_latents are the masked image's own, or the teacher's completion."""

    x0_latents: torch.Tensor
    masked_latents: torch.Tensor
    mask: torch.Tensor
    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor


class MixedBatch(NamedTuple):
    """D_sl and D_ssl in one batch: the first rows are labelled."""

    labeled: LabeledBatch
    unlabeled: UnlabeledBatch

    def joined(self) -> UnlabeledBatch:
        """All rows with their x0: the ground truth where there is one."""
        return UnlabeledBatch(*(torch.cat(parts) for parts in zip(self.labeled, self.unlabeled, strict=True)))


class Noised(NamedTuple):
    """One point on the path for each sample."""

    noisy_latents: torch.Tensor
    noise: torch.Tensor
    sigmas: torch.Tensor


class Answer(NamedTuple):
    """What a ControlNet injects, and the velocity that follows."""

    residuals: Sequence[torch.Tensor]
    velocity: torch.Tensor


class Networks:
    """Frozen backbone and teacher, one student: every forward pass an objective makes.

    The teacher (and the backbone behind it) runs outside the graph; behind the student the backbone is
    frozen but in the graph, for gradients pass through it to the residuals."""

    def __init__(
        self,
        backbone: Backbone,
        teacher: ControlNet | None,
        student: ControlNet,
        *,
        dtype: torch.dtype = torch.float32,
        sigmas: SigmaConfig | None = None,
        conditioning_scale: float = 1.0,
    ):
        self.backbone, self.teacher = backbone, teacher
        self.student = student
        self.trainable = compute_in(student, dtype, trainable_parameters(student))
        backbone.transformer.to(dtype).requires_grad_(False)
        if teacher is not None:
            teacher.to(dtype).requires_grad_(False).eval()  # type: ignore[arg-type]
        self.sigmas = sigmas or SigmaConfig()
        self.shift = backbone.shift if self.sigmas.shift is None else self.sigmas.shift
        self.conditioning_scale = conditioning_scale

    def noised(self, latents: torch.Tensor, draw: Draw) -> Noised:
        """x_t of clean latents (B,16,h,w) at logit-normal, shifted sigmas."""
        sigmas = flow.logit_normal_sigmas(
            draw.normals("sigmas"), self.sigmas.logit_mean, self.sigmas.logit_std, self.shift
        ).to(latents.device)
        noise = draw.normals("noise", *latents.shape[1:]).to(latents.device)
        return Noised(flow.interpolate(latents, noise, sigmas), noise, sigmas)

    def _residuals(
        self, controlnet: ControlNet, at: Noised, batch: LabeledBatch | UnlabeledBatch
    ) -> list[torch.Tensor]:
        return control_residuals(
            controlnet,
            at.noisy_latents,
            at.sigmas,
            batch.prompt_embeds,
            control_cond(batch.masked_latents, batch.mask),
            self.backbone.pooled_width,
            self.conditioning_scale,
        )

    def _answer(self, controlnet: ControlNet, at: Noised, batch: LabeledBatch | UnlabeledBatch) -> Answer:
        residuals = self._residuals(controlnet, at, batch)
        transformer = self.backbone.transformer
        v = predict_velocity(
            transformer, at.noisy_latents, at.sigmas, batch.prompt_embeds, batch.pooled_prompt_embeds, residuals
        )
        return Answer(residuals, v)

    def student_answer(self, at: Noised, batch: LabeledBatch | UnlabeledBatch) -> Answer:
        """With a graph back to the student's parameters."""
        return self._answer(self.student, at, batch)

    @torch.no_grad()
    def teacher_answer(self, at: Noised, batch: LabeledBatch | UnlabeledBatch) -> Answer:
        """The same point and prompt, without a graph."""
        return self._answer(self._asked_teacher(), at, batch)

    @torch.no_grad()
    def teacher_residuals(self, at: Noised, batch: LabeledBatch | UnlabeledBatch) -> list[torch.Tensor]:
        """What the teacher injects there, without a pass of the transformer."""
        return self._residuals(self._asked_teacher(), at, batch)

    def _asked_teacher(self) -> ControlNet:
        if self.teacher is None:
            raise ValueError("this objective was built without a teacher")
        return self.teacher

    @property
    def num_sites(self) -> int:
        return self.backbone.num_blocks - 1

    @property
    def num_layers(self) -> int:
        return len(self.student.transformer_blocks)


def _output_weight(weights: LossWeights, mask: torch.Tensor) -> torch.Tensor | None:
    """The weight of Eq. 4, of (B,1,h,w) masks: none in the paper."""
    return None if weights.output_alpha is None else mask_weight(mask, weights.output_alpha)


class _Distillation(Objective):
    """What the objectives with a teacher share: with `relative_features` each layer's term is divided by the mean
    square of what the teacher has in its place, over the whole batch."""

    def __init__(self, networks: Networks, weights: LossWeights, relative_features: bool = False):
        self.networks, self.weights, self.relative = networks, weights, relative_features

    def trainable(self) -> Trainable:
        """The student's parameters."""
        return self.networks.trainable

    def _point(self, batch: Any, draw: Draw) -> tuple[Noised, LabeledBatch | UnlabeledBatch]:
        """Where the networks are asked, and the rows of the batch in that order."""
        return self.networks.noised(batch[0], draw), batch

    def _targets(self, teacher: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the student's layers are compared with."""
        return teacher_totals(teacher, self.networks.num_layers, self.networks.num_sites)

    def statistics(self, batch: Any, draw: Draw) -> torch.Tensor | None:
        """The mean square of each layer's target, (S,), where the terms are divided by it."""
        if not self.relative:
            return None
        return mean_squares(self._targets(self.networks.teacher_residuals(*self._point(batch, draw))))

    def _sizes(self, teacher: Answer, statistics: torch.Tensor | None) -> torch.Tensor | None:
        """The divisors of the layers' terms: of the whole batch, which is this one where it is not split."""
        return mean_squares(self._targets(teacher.residuals)) if self.relative and statistics is None else statistics


class Supervised(_Distillation):
    """Eq. 1: stage 1, the task, the teacher's output and its features, on labelled data."""

    def losses(self, batch: LabeledBatch, draw: Draw, statistics: torch.Tensor | None = None) -> Losses:
        """l_task L_task + l_distill L_distill + l_af L_af."""
        w = self.weights
        at, _ = self._point(batch, draw)
        teacher, student = self.networks.teacher_answer(at, batch), self.networks.student_answer(at, batch)
        sizes = self._sizes(teacher, statistics)
        target = flow.velocity(batch.latents, at.noise)
        return combine(
            task=task_loss(target, student.velocity, mask_weight(batch.mask, w.alpha)),
            output=output_loss(teacher.velocity, student.velocity, _output_weight(w, batch.mask)),
            features=feature_losses(teacher.residuals, student.residuals, self.networks.num_sites, sizes),
            task_weight=w.task,
            output_weight=w.output,
            feature_weight=w.feature,
        )


class SelfSupervised(_Distillation):
    """Eq. 6: stage 2, the teacher alone, on data that has no ground truth."""

    def losses(self, batch: UnlabeledBatch, draw: Draw, statistics: torch.Tensor | None = None) -> Losses:
        """l_distill L_distill + l_af L_af."""
        at, _ = self._point(batch, draw)
        teacher, student = self.networks.teacher_answer(at, batch), self.networks.student_answer(at, batch)
        sizes = self._sizes(teacher, statistics)
        return combine(
            task=None,
            output=output_loss(teacher.velocity, student.velocity, _output_weight(self.weights, batch.mask)),
            features=feature_losses(teacher.residuals, student.residuals, self.networks.num_sites, sizes),
            output_weight=self.weights.output,
            feature_weight=self.weights.feature,
        )


class FromScratch(Objective):
    """Eq. 3 alone: Student_fc, the same network trained without the teacher."""

    def __init__(self, networks: Networks, weights: LossWeights):
        self.networks, self.weights = networks, weights

    def trainable(self) -> Trainable:
        """The student's parameters."""
        return self.networks.trainable

    def losses(self, batch: LabeledBatch, draw: Draw, statistics: torch.Tensor | None = None) -> Losses:
        """l_task L_task."""
        at = self.networks.noised(batch.latents, draw)
        student = self.networks.student_answer(at, batch)
        target = flow.velocity(batch.latents, at.noise)
        weight = mask_weight(batch.mask, self.weights.alpha)
        return combine(
            task=task_loss(target, student.velocity, weight),
            output=None,
            features=None,
            task_weight=self.weights.task,
        )


class Mixed(_Distillation):
    """The row one_stage: Eq. 1 on the samples of D_sl and Eq. 6 on those of D_ssl, in one batch."""

    def _point(self, batch: MixedBatch, draw: Draw) -> tuple[Noised, UnlabeledBatch]:
        rows = batch.joined()
        draw = draw._replace(slots=sorted(draw.slots, key=lambda slot: slot % 2))  # the order of the rows
        return self.networks.noised(rows.x0_latents, draw), rows

    def losses(self, batch: MixedBatch, draw: Draw, statistics: torch.Tensor | None = None) -> Losses:
        """The mean over all samples of what each contributes."""
        w, count = self.weights, len(batch.labeled.mask)
        at, rows = self._point(batch, draw)
        teacher, student = self.networks.teacher_answer(at, rows), self.networks.student_answer(at, rows)
        sizes = self._sizes(teacher, statistics)
        target = flow.velocity(batch.labeled.latents, at.noise[:count])
        task = task_loss(target, student.velocity[:count], mask_weight(batch.labeled.mask, w.alpha))
        return combine(
            task=task * (count / len(rows.mask)),
            output=output_loss(teacher.velocity, student.velocity, _output_weight(w, rows.mask)),
            features=feature_losses(teacher.residuals, student.residuals, self.networks.num_sites, sizes),
            task_weight=w.task,
            output_weight=w.output,
            feature_weight=w.feature,
        )


class OneToOne(_Distillation):
    """Student_ssd: SSD-1B's loss. The plain task, the teacher's output, and each kept layer against itself."""

    def _targets(self, teacher: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return kept_layers(teacher, self.networks.num_layers, self.networks.num_sites)

    def losses(self, batch: LabeledBatch, draw: Draw, statistics: torch.Tensor | None = None) -> Losses:
        """Task without a mask weight (`alpha` is not read), output, one-to-one layer terms."""
        w = self.weights
        at, _ = self._point(batch, draw)
        teacher, student = self.networks.teacher_answer(at, batch), self.networks.student_answer(at, batch)
        sizes = self._sizes(teacher, statistics)
        return combine(
            task=task_loss(flow.velocity(batch.latents, at.noise), student.velocity),
            output=output_loss(teacher.velocity, student.velocity, _output_weight(w, batch.mask)),
            features=one_to_one_losses(teacher.residuals, student.residuals, self.networks.num_sites, sizes),
            task_weight=w.task,
            output_weight=w.output,
            feature_weight=w.feature,
        )
