"""What a student of S layers must lose, seen from the teacher alone: how alike are neighbouring residuals?

Every layer of a student feeds its whole group of sites with one residual. The best it can do in Eq. 5's sense is the
group's mean; what is left, sum_s E |f_T^s - mean of its group|^2, no training removes. How much of it the picture
notices is the change of the transformer's answer when the teacher itself injects the means of its groups.
"""

# N pictures, T teacher layers, S student layers, R sites, P tokens, D width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from refine_control import flow
from refine_control.conditions.condition import control_cond, show
from refine_control.injection import groups, layer_of_site
from refine_control.models.backbone import Backbone, predict_velocity
from refine_control.models.controlnet import control_residuals
from refine_control.models.families import condition_encoding
from refine_control.pixels import from_images
from refine_control.randomness import slot_normals
from refine_control.records import Photo
from refine_control.study.curves import Curve
from refine_control.study.tables import Table


class Alignment(NamedTuple):
    """Statistics of a teacher's residuals f_T^s over pictures and noise levels."""

    power: np.ndarray
    """(T,) E |f_T^s|^2, mean over elements."""
    cosine: np.ndarray
    """(T - 1,) of neighbours, mean over pictures."""
    errors: dict[int, float]
    """By S: the error that no student of S layers avoids, as a share of sum_s E |f_T^s|^2."""
    outputs: dict[int, float]
    """By S: E |v(group means) - v_T|^2 as a share of E |v(no control) - v_T|^2; 1 where control changes nothing."""
    pictures: int
    """Over how many."""


@torch.no_grad()
def teacher_alignment(
    backbone: Backbone,
    controlnet: Any,
    photos: Sequence[Photo],
    layers: Sequence[int],
    seed: int = 0,
    batch_size: int = 32,
) -> Alignment:
    """Measures a teacher (its parameters' dtype) at one training-like sigma and noise for each photo.

    The teacher is moved to the backbone's device, in place. Sigmas are logit-normal, shifted as the scheduler says.
    Raises ValueError for a count of layers not in 1..sites."""
    controlnet.to(backbone.device)
    sites = backbone.num_blocks - 1
    feeds = layer_of_site(len(controlnet.controlnet_blocks), sites)
    power, cosine, control = np.zeros(sites), np.zeros(sites - 1), 0.0
    errors, outputs = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    for first in range(0, len(photos), batch_size):
        points = _points(backbone, controlnet, photos[first : first + batch_size], seed, first)
        residuals = _residuals(backbone, controlnet, points)
        exact = _velocity(backbone, points, residuals)
        control += float((_velocity(backbone, points, None) - exact).square().mean((1, 2, 3)).sum())
        at_sites = torch.stack([residuals[layer].float() for layer in feeds], 1).flatten(2)  # (n, R, P D)
        power += at_sites.square().mean(2).sum(0).numpy()
        cosine += torch.cosine_similarity(at_sites[:, 1:], at_sites[:, :-1], dim=2).sum(0).numpy()
        for layer_count in layers:
            means = [at_sites[:, group].mean(1) for group in groups(layer_count, sites)]
            spread = at_sites - torch.stack(means, 1)[:, layer_of_site(layer_count, sites)]
            errors[layer_count] += float(spread.square().mean(2).sum())
            shared = _velocity(backbone, points, [mean.view_as(residuals[0]) for mean in means])
            outputs[layer_count] += float((shared - exact).square().mean((1, 2, 3)).sum())
    shares = {s: error / control if control else 1.0 for s, error in outputs.items()}
    errors = {s: error / float(power.sum()) for s, error in errors.items()}
    return Alignment(power / len(photos), cosine / len(photos), errors, shares, len(photos))


def alignment_table(measured: Alignment) -> Table:
    """A row for each count of layers."""
    rows = [[str(s), f"{100 * measured.errors[s]:.1f}", f"{100 * measured.outputs[s]:.2f}"] for s in measured.errors]
    cosine = measured.cosine
    note = (
        f"Of the teacher alone, over {measured.pictures} pictures at training's noise levels, with the mean of its "
        "residuals in each group of sites. Residuals: sum over sites of E |f_T^s - mean of its group|^2 as a share of "
        "E |f_T^s|^2, which no training of the student removes. Velocity: the squared change of the transformer's "
        "velocity as a share of the change without control. Cosine of neighbouring residuals: "
        f"{cosine.min():.2f} to {cosine.max():.2f}, mean {cosine.mean():.2f}."
    )
    columns = ["layers", "residuals' error by sharing %", "velocity's error by sharing %"]
    return Table("What sharing a residual loses", columns, rows, [note])


def alignment_curves(measured: Alignment) -> list[Curve]:
    """Over the sites: how strong each teacher residual is, and how like the next."""
    sites = np.arange(len(measured.power))
    return [
        Curve("Power of the teacher's residuals", {"E |f|^2": (sites, measured.power)}, log_y=True, x_label="site"),
        Curve("Cosine of neighbouring residuals", {"cosine": (sites[:-1], measured.cosine)}, x_label="site"),
    ]


class _Points(NamedTuple):
    """Where the teacher is asked, on the backbone's device."""

    noisy: torch.Tensor
    sigmas: torch.Tensor
    prompts: torch.Tensor
    pooled: torch.Tensor
    cond: torch.Tensor


def _points(backbone: Backbone, controlnet: Any, photos: Sequence[Photo], seed: int, first: int) -> _Points:
    device = backbone.device
    pixels = from_images(np.stack([p.image for p in photos]))
    pictures, mask = show(photos).tensors()
    latents = backbone.encode_images(pixels).to(device).float()
    shown = backbone.encode_condition(pictures, condition_encoding(controlnet.config)).to(device).float()
    cond = control_cond(shown, None if mask is None else mask.to(device))
    slots = range(first, first + len(photos))
    noise = slot_normals(latents.shape[1:], slots, seed, "alignment noise").to(device)
    levels = slot_normals((), slots, seed, "alignment sigmas")
    sigmas = flow.logit_normal_sigmas(levels, shift=backbone.shift).to(device)
    prompts, pooled = backbone.encode_prompts([p.prompt for p in photos])
    noisy = flow.interpolate(latents, noise, sigmas)
    return _Points(noisy, sigmas, prompts, pooled, cond)


def _residuals(backbone: Backbone, controlnet: Any, points: _Points) -> list[torch.Tensor]:
    """(n, P, D) of each layer, on the CPU."""
    noisy, sigmas, prompts, pooled, cond = points
    residuals = control_residuals(controlnet, noisy, sigmas, prompts, cond, pooled)
    return [residual.cpu() for residual in residuals]


def _velocity(backbone: Backbone, points: _Points, residuals: Sequence[torch.Tensor] | None) -> torch.Tensor:
    """(n, C, h, w) fp32 on the CPU."""
    transformer = backbone.transformer
    given = None if residuals is None else [r.to(backbone.device, transformer.dtype) for r in residuals]
    velocity = predict_velocity(transformer, points.noisy, points.sigmas, points.prompts, points.pooled, given)
    return velocity.float().cpu()
