"""Objectives for sampling in few steps without guidance: the equations of `consistency` over networks and batches.

What they share is here once: levels and noise, the frozen network's guided answer, and the target network, whose
weights are the running mean of the student's that the checkpoints hold. Guidance enters by frozen networks alone:
student and target are never guided, for otherwise it would compound with every update of the mean.
"""

# B batch, h w latents; levels u (B,) are unshifted, sigmas t, s, e (B,) shifted; 0 = data, 1 = noise

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from refine_control import flow
from refine_control.config import Engine, FewStepConfig, ObjectiveConfig
from refine_control.consistency import (
    chord_velocity,
    consistency_weight,
    feature_distance,
    noise_consistency,
    on_chord,
    phase_end,
    pseudo_huber,
    velocity_consistency,
)
from refine_control.models.backbone import decode_latents, encode_images, encoder_features
from refine_control.models.devices import send
from refine_control.training.loop import Draw, Objective
from refine_control.training.objectives import Batch, Networks, Point, region_weight
from refine_control.training.optimizer import Trainable


class FewStepLosses(NamedTuple):
    """The terms of an objective for few steps, each a scalar; one that it does not have is 0."""

    loss: torch.Tensor
    data_loss: torch.Tensor
    """Against data, or against what a frozen network says."""
    consistency_loss: torch.Tensor
    """Against the target network."""


class FewStep(Objective):
    """data_weight L_data + consistency L_consistency by the rule of `KINDS`, for the student of `networks`."""

    def __init__(self, networks: Networks, config: ObjectiveConfig):
        self.networks, self.kind, self.alpha = networks, config.kind, config.weights.output_alpha
        self.config = config.few_step
        self.target = networks.copy_student() if needs_target(config) else None

    def trainable(self) -> Trainable:
        """The student's parameters."""
        return self.networks.trainable

    def share(self, engine: Engine) -> Callable[[bool], None]:
        """Shares the student; the target network stays whole."""
        return self.networks.share(engine)

    def updated(self, averaged: Mapping[str, torch.Tensor]) -> None:
        """The target network takes the running mean."""
        if self.target is not None:
            self.networks.load(averaged, self.target)

    def losses(self, batch: Batch, draw: Draw, statistics: torch.Tensor | None = None) -> FewStepLosses:
        """Both terms, and their weighted sum."""
        del statistics
        data, consistency = KINDS[self.kind](self, batch, draw._replace(slots=batch.slots))
        zero = batch.latents.new_zeros(())
        loss = zero
        for weight, term in ((self.config.data_weight, data), (self.config.consistency, consistency)):
            loss = loss if term is None or not weight else loss + weight * term
        return FewStepLosses(loss, zero if data is None else data, zero if consistency is None else consistency)

    def shifted(self, levels: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sigmas of levels, (B,), for latents of the batch's size."""
        return flow.shift_sigmas(levels, self.networks.shift_at(batch.latents.shape[-2:]))

    def uniforms(self, draw: Draw, purpose: str, latents: torch.Tensor) -> torch.Tensor:
        """(B,) in [0, 1): one a sample or, with `shared_level`, one for the whole batch."""
        slots = [0] * len(draw.slots) if self.config.shared_level else draw.slots
        return send(draw._replace(slots=slots).uniforms(purpose), latents.device)

    def levels(self, draw: Draw, latents: torch.Tensor) -> torch.Tensor:
        """Uniform levels in (0, 1], a share of `first` at 1."""
        first = self.uniforms(draw, "first", latents) < self.config.first
        return torch.where(first, 1.0, 1 - self.uniforms(draw, "levels", latents))

    def point(self, latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> Point:
        """x_t of latents and noise (B,16,h,w)."""
        return Point(flow.interpolate(latents, noise, sigmas), noise, sigmas, flow.velocity(latents, noise))

    def fresh_noise(self, batch: Batch, draw: Draw) -> torch.Tensor:
        """(B,16,h,w) of the draw's slots."""
        return send(draw.normals("noise", *batch.latents.shape[1:]), batch.latents.device)

    def student_velocity(self, at: Point, batch: Batch) -> torch.Tensor:
        """With a graph, fp32."""
        return self.networks.student_answer(at, batch).velocity.float()

    @torch.no_grad()
    def target_velocity(self, at: Point, batch: Batch) -> torch.Tensor:
        """The running mean's, without a graph, fp32."""
        assert self.target is not None
        return self.networks.answer(self.target, at, batch).velocity.float()

    def guided_velocity(self, at: Point, batch: Batch) -> torch.Tensor:
        """The frozen teacher's, fp32."""
        return self.networks.guided_velocity(at, batch, self.config.teacher_guidance)

    def weighted(self, squares: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The mean of squared errors (B,C,h,w), with the weight of Eq. 2 inside the square where there is one."""
        weight = region_weight(batch, self.alpha)
        return (squares if weight is None else squares * weight.square()).mean()

    def next_point(self, at: Point, v: torch.Tensor, s: torch.Tensor, batch: Batch) -> Point:
        """The second point of a consistency term, at sigmas `s`, by the recipe's `ode`."""
        ode = self.config.ode
        if ode == "none":
            x = flow.interpolate(batch.latents, at.noise, s)
        else:
            used = v.detach() if ode == "own" else self.guided_velocity(at, batch)
            x = flow.euler_step(at.noisy_latents, used, at.sigmas, s)
        return at._replace(noisy_latents=x, sigmas=s)

    def distance(self, latents: torch.Tensor, predicted: torch.Tensor, batch: Batch) -> torch.Tensor:
        """d(x0, x0_hat) of CoDi's data term, a scalar."""
        kind, vae = self.config.distance, self.networks.backbone.vae
        if kind == "latent":
            return self.weighted((predicted - latents).square(), batch)
        painted = decode_latents(vae, predicted)
        if kind == "encoded":
            return self.weighted((encode_images(vae, painted) - latents).square(), batch)
        with torch.no_grad():
            original = decode_latents(vae, latents)
        if kind == "pixel":
            return (painted - original).square().mean()
        with torch.no_grad():
            references = encoder_features(vae, original)
        pairs = zip(encoder_features(vae, painted), references, strict=True)
        return torch.stack([feature_distance(a, b).mean() for a, b in pairs]).mean()


Terms = tuple[torch.Tensor | None, torch.Tensor | None]
"""The data term and the consistency term, scalars; None: there is none."""


def codi(objective: FewStep, batch: Batch, draw: Draw) -> Terms:
    """d(x0, x0_hat(x_t, t)) and the noise consistency of x_t and x_s; `shared_level`, `dt`, `ode` and `distance`."""
    config, levels = objective.config, objective.levels(draw, batch.latents)
    s = objective.shifted((levels - config.dt).clamp_min(0), batch)
    at = objective.point(batch.latents, objective.fresh_noise(batch, draw), objective.shifted(levels, batch))
    v = objective.student_velocity(at, batch)
    data = objective.distance(batch.latents, flow.clean_latents(at.noisy_latents, v, at.sigmas), batch)
    if not config.consistency:
        return data, None
    after = objective.next_point(at, v, s, batch)
    target_v = objective.target_velocity(after, batch)
    squares = noise_consistency(at.noisy_latents, v, at.sigmas, after.noisy_latents, target_v, s)
    return data, objective.weighted(squares, batch)


def end_points(objective: FewStep, batch: Batch, draw: Draw) -> Terms:
    """E ||v(x_t, t) - (x_t - x0*) / t||^2 with x0* the end of the teacher's guided path from the same noise.

    x_t is pure noise for a share of `first`; else a knot of the path, or a point of the line from x0* to its noise; of
    those a share of `rollout` is moved to where the student's own steps from the noise lead."""
    assert batch.noise is not None
    config, levels = objective.config, objective.levels(draw, batch.latents)
    if config.points == "path":
        knots, apart = config.steps, _knots(batch) // config.steps
        number = torch.where(levels == 1, 0, ((1 - levels) * (knots - 1)).long() + 1).clamp_max(knots - 1)
        levels = 1 - number / knots
        points = torch.stack(_points(batch))
        x = points[number * apart, torch.arange(len(levels), device=levels.device)]
        at = Point(x, batch.noise, objective.shifted(levels, batch), flow.velocity(batch.latents, batch.noise))
    else:
        at = objective.point(batch.latents, batch.noise, objective.shifted(levels, batch))
    if config.rollout:
        at, levels = _rolled_out(objective, batch, draw, at, levels)
    v = objective.student_velocity(at, batch)
    target = chord_velocity(at.noisy_latents, batch.latents, at.sigmas, torch.zeros_like(at.sigmas))
    data = objective.weighted((v - target).square(), batch)
    if not config.consistency:
        return data, None
    after = objective.next_point(at, v, objective.shifted((levels - config.dt).clamp_min(0), batch), batch)
    weight = consistency_weight(at.sigmas, after.sigmas) if config.weighting == "codi" else 1.0
    squares = velocity_consistency(v, objective.target_velocity(after, batch), weight)
    return data, objective.weighted(squares, batch)


def _knots(batch: Batch) -> int:
    """K of the cached path."""
    return 1 if batch.path is None else batch.path.shape[1] + 1


def _points(batch: Batch) -> list[torch.Tensor]:
    """The K + 1 points of the teacher's path from noise to x0*, (B,16,h,w) each."""
    assert batch.noise is not None
    return [batch.noise, *(() if batch.path is None else batch.path.unbind(1)), batch.latents]


def _rolled_out(
    objective: FewStep, batch: Batch, draw: Draw, at: Point, levels: torch.Tensor
) -> tuple[Point, torch.Tensor]:
    """The points and levels with a share of those below pure noise moved to where samplers of few steps come by.

    Samplers have each number of steps above 1 that divides the recipe's. Each of their later points is as likely; the
    target network leads there from the sample's noise."""
    assert batch.noise is not None
    steps, device = objective.config.steps, levels.device
    visits = [(n, k) for n in range(2, steps + 1) if steps % n == 0 for k in range(1, n)]
    moved = objective.uniforms(draw, "rollout", levels) < objective.config.rollout
    rows = (moved & (levels < 1)).nonzero()[:, 0]
    if not len(rows) or not visits:
        return at, levels
    drawn = (objective.uniforms(draw, "visits", levels)[rows] * len(visits)).long()
    count, number = torch.tensor(visits, device=device)[drawn].unbind(1)
    x = batch.noise[rows].clone()
    for step in range(int(number.max())):
        going = (number > step).nonzero()[:, 0]
        t, s = (objective.shifted(1 - (step + ahead) / count[going], batch) for ahead in (0, 1))
        here = Point(x[going], batch.noise[rows[going]], t, at.target[rows[going]])
        v = objective.target_velocity(here, batch.take(rows[going]))
        x[going] = flow.euler_step(here.noisy_latents, v, t, s)
    levels = levels.index_copy(0, rows, 1 - number / count)
    latents = at.noisy_latents.index_copy(0, rows, x)
    return at._replace(noisy_latents=latents, sigmas=objective.shifted(levels, batch)), levels


def windows(objective: FewStep, batch: Batch, draw: Draw) -> Terms:
    """E ||v(x_t, t) - (x_a - x_b) / (t_a - t_b)||^2 on the chords of the teacher's path in n windows, t_a >= t > t_b.

    A share of `first` lies at the beginning of its window, where a sampler of n steps asks."""
    assert batch.noise is not None
    config = objective.config
    count, apart = config.steps, _knots(batch) // config.steps
    number = (objective.uniforms(draw, "windows", batch.latents) * count).long().clamp_max(count - 1)
    part = objective.levels(draw, batch.latents)
    first, last = 1 - number / count, 1 - (number + 1) / count
    points, rows = torch.stack(_points(batch)), torch.arange(len(number), device=number.device)
    start, end = points[number * apart, rows], points[(number + 1) * apart, rows]
    t_start, t_end = objective.shifted(first, batch), objective.shifted(last, batch)
    sigmas = objective.shifted(last + part * (first - last), batch)
    x = on_chord(start, end, t_start, t_end, sigmas)
    at = Point(x, batch.noise, sigmas, chord_velocity(start, end, t_start, t_end))
    return objective.weighted((objective.student_velocity(at, batch) - at.target).square(), batch), None


def guidance(objective: FewStep, batch: Batch, draw: Draw) -> Terms:
    """E ||v(x_t, t) - v_guided(x_t, t)||^2 at the noise levels of stage 1, v_guided of the frozen teacher."""
    at = objective.networks.noised(batch, draw)
    target = objective.guided_velocity(at, batch)
    return objective.weighted((objective.student_velocity(at, batch) - target).square(), batch), None


def phases(objective: FewStep, batch: Batch, draw: Draw) -> Terms:
    """E d(x_e of the student from x_t, x_e of the target network from x_s), e the end of t's phase.

    One phase: LCM (arXiv 2310.04378); several: PCM (arXiv 2405.18407). x_s is a step of the frozen guided teacher."""
    config, levels = objective.config, objective.levels(draw, batch.latents)
    end = phase_end(levels, config.steps)
    e, s = objective.shifted(end, batch), objective.shifted(torch.maximum(levels - config.dt, end), batch)
    at = objective.point(batch.latents, objective.fresh_noise(batch, draw), objective.shifted(levels, batch))
    v = objective.student_velocity(at, batch)
    after = objective.next_point(at, v, s, batch)
    target = flow.euler_step(after.noisy_latents, objective.target_velocity(after, batch), s, e)
    error = flow.euler_step(at.noisy_latents, v, at.sigmas, e) - target
    return None, objective.weighted(pseudo_huber(error, config.huber), batch)


KINDS: dict[str, Callable[[FewStep, Batch, Draw], Terms]] = {
    "codi": codi,
    "end_points": end_points,
    "windows": windows,
    "guidance": guidance,
    "phases": phases,
}


def needs_target(config: ObjectiveConfig) -> bool:
    """Whether an objective asks the target network."""
    few: FewStepConfig = config.few_step
    if config.kind == "phases":
        return True
    consistent = config.kind in ("codi", "end_points") and few.consistency > 0
    return consistent or (config.kind == "end_points" and few.rollout > 0)


def asks_teacher(config: ObjectiveConfig) -> bool:
    """Whether an objective for few steps asks the frozen teacher in training, beside what the cache holds."""
    few = config.few_step
    consistent = config.kind == "phases" or (config.kind in ("codi", "end_points") and few.consistency > 0)
    return config.kind == "guidance" or (consistent and few.ode == "frozen")


def fields_read(config: ObjectiveConfig) -> frozenset[str]:
    """Fields of `Batch` that an objective reads beside those that every batch has; of the older objectives none."""
    few = config.few_step
    reads = {
        "noise": config.kind in ("end_points", "windows"),
        "path": config.reads_paths and few.steps > 1,
        "empty": config.is_few_step and asks_teacher(config) and few.teacher_guidance > 1,
    }
    return frozenset(name for name, read in reads.items() if read)
