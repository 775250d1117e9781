"""Equations 1 to 6 of the paper as pure functions; the mean over elements is the reduction (docs/paper.md)."""

# B batch, C channels, h w latents, N tokens, D width, S student layers, T teacher layers

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from refine_control.config import LossWeights
from refine_control.injection import layer_of_site


class Losses(NamedTuple):
    """The terms of Eq. 1 or Eq. 6, each a scalar; a term that an objective does not have is 0."""

    loss: torch.Tensor
    task_loss: torch.Tensor
    output_loss: torch.Tensor
    feature_loss: torch.Tensor
    feature_losses: torch.Tensor
    """(S,) the layers' parts of `feature_loss`; empty without Eq. 5."""


def mask_weight(mask: torch.Tensor, alpha: float) -> torch.Tensor:
    """Eq. 2: w = alpha M + (1 - alpha)(J - M). Mask (B,1,h,w), 1 = inpaint; alpha in (0, 1)."""
    return alpha * mask + (1 - alpha) * (1 - mask)


def task_loss(target: torch.Tensor, student: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Eq. 3: E ||w (v - v_student)||^2, w inside the norm (1521 : 1 at alpha = .975). (B,C,h,w) -> scalar.

    `weight` None is w = J, the row wo_mask."""
    error = target.float() - student.float()
    return (error if weight is None else weight.float() * error).square().mean()


def output_loss(teacher: torch.Tensor, student: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Eq. 4: E ||v_teacher - v_student||^2, the student answers as the teacher does. (B,C,h,w) -> scalar.

    `weight` as in Eq. 3, inside the norm; None is the paper's."""
    return task_loss(teacher, student, weight)


Groups = Sequence[Sequence[int]]
"""G_j of Eq. 5: the sites of each of the student's layers (`models.controlnet.site_groups`)."""


def _at_sites(teacher: Sequence[torch.Tensor], groups: Groups) -> list[torch.Tensor]:
    """The teacher's residual of each site."""
    return [teacher[layer] for layer in layer_of_site(len(teacher), sum(map(len, groups)))]


def teacher_totals(teacher: Sequence[torch.Tensor], groups: Groups) -> list[torch.Tensor]:
    """sum_{s in G_j} f_T of site s, for each of the student's groups: (B,N,D) each, fp32."""
    f_t = _at_sites(teacher, groups)
    return [torch.stack([f_t[s].float() for s in sites]).sum(0) for sites in groups]


class LayerTargets(NamedTuple):
    """What the student's layers are compared with, each times `counts`."""

    values: list[torch.Tensor]
    """S tensors (B,N,D), fp32."""
    counts: list[int]


def group_targets(teacher: Sequence[torch.Tensor], groups: Groups) -> LayerTargets:
    """Eq. 5: |G_j| f_S^j is compared with the teacher's total over the sites of G_j."""
    return LayerTargets(teacher_totals(teacher, groups), [len(sites) for sites in groups])


def kept_targets(teacher: Sequence[torch.Tensor], groups: Groups) -> LayerTargets:
    """SSD-1B (arXiv 2401.02677): f_S^j is compared with f_T of the last site of G_j alone."""
    f_t = _at_sites(teacher, groups)
    return LayerTargets([f_t[sites[-1]].float() for sites in groups], [1] * len(groups))


def mean_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """E ||f^j||^2 of each tensor (B,N,D) -> (S,); the mean of those of equal parts of a batch is that of the batch."""
    return torch.stack([tensor.square().mean() for tensor in tensors])


def layer_losses(
    targets: LayerTargets, student: Sequence[torch.Tensor], sizes: torch.Tensor | None = None
) -> torch.Tensor:
    """Eq. 5 by layer: E || c_j f_S^j - target_j ||^2 -> (S,); f_S (B,N,D) are residuals after their zero-linears.

    `sizes` (S,), the `mean_squares` of the targets over the whole batch, divide the layers' terms so that no layer
    dominates (not in the paper; `reproduce losses` measures it)."""
    parts = [
        (count * layer.float() - target).square().mean()
        for count, layer, target in zip(targets.counts, student, targets.values, strict=True)
    ]
    losses = torch.stack(parts)
    return losses if sizes is None else losses / sizes.clamp_min(1e-12)


def combine(
    weights: LossWeights,
    task: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
) -> Losses:
    """Eq. 1 and, without `task`, Eq. 6: L = l_task L_task + l_distill L_distill + l_af L_af. Weight 0 = not added.

    Raises ValueError when no term is given."""
    terms = [(weights.task, task), (weights.output, output), (weights.feature, features)]
    present = [(weight, term) for weight, term in terms if term is not None]
    if not present:
        raise ValueError("a loss needs at least one of task, output and features")
    zero = present[0][1].new_zeros(())
    loss = sum((weight * term.sum() for weight, term in present if weight), start=zero)
    layers = zero.new_zeros(0) if features is None else features
    return Losses(loss, zero if task is None else task, zero if output is None else output, layers.sum(), layers)
