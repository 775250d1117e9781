"""The equations of the objectives for few steps, on the path x_t = (1 - t) x0 + t eps of `flow`, where v = eps - x0.

An expectation is the mean over all elements. What is called a target carries no gradient; the caller sees to that.
"""

# B batch, C channels, h w latents; t, s, e (B,): noise levels, 0 = data, 1 = noise

from __future__ import annotations

import torch

from refine_control import flow


def noise_consistency(
    noisy_latents: torch.Tensor,
    v: torch.Tensor,
    t: torch.Tensor,
    next_latents: torch.Tensor,
    target_v: torch.Tensor,
    s: torch.Tensor,
) -> torch.Tensor:
    """CoDi (arXiv 2310.01407): E ||eps_hat_ema(x_s, s) - eps_hat(x_t, t)||^2 -> (B,C,h,w) squared errors.

    Where x_s is the model's own Euler step from x_t, eps_hat_s - eps_hat_t = (1 - s)(v_s - v_t) with the gradient's
    factor 1 - t: at t = 1 the term teaches nothing."""
    target = flow.pure_noise(next_latents, target_v, s)
    return (flow.pure_noise(noisy_latents, v, t) - target).square()


def velocity_consistency(v: torch.Tensor, target_v: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    """E w(t) ||v(x_t, t) - v_ema(x_s, s)||^2 -> (B,C,h,w): on a straight path the velocity does not change."""
    error = (v - target_v).square()
    return error * (flow.expand(weight, error) if isinstance(weight, torch.Tensor) else weight)


def consistency_weight(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """(1 - t)(1 - s): what CoDi's noise consistency weighs a difference of velocities with. (B,) -> (B,)."""
    return (1 - t) * (1 - s)


def chord_velocity(
    noisy_latents: torch.Tensor, next_latents: torch.Tensor, t: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    """(x_t - x_s) / (t - s): the velocity whose one Euler step leads from x_t to x_s; t > s. s = 0: to the end point.

    PeRFlow (arXiv 2405.07510) inside a window; the end point of the whole path for one step."""
    return (noisy_latents - next_latents) / flow.expand(t - s, noisy_latents)


def on_chord(
    start: torch.Tensor, end: torch.Tensor, first: torch.Tensor, last: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """The point at level t of the straight line from `start`, at level `first`, to `end`, at level `last`."""
    share = flow.expand((t - last) / (first - last), start)
    return share * start + (1 - share) * end


def phase_end(level: torch.Tensor, phases: int) -> torch.Tensor:
    """The end of the phase that an unshifted level lies in: the largest k / phases below it. (B,) in (0, 1] -> (B,)."""
    return ((level * phases).ceil() - 1).clamp(0, phases - 1) / phases


def pseudo_huber(error: torch.Tensor, constant: float) -> torch.Tensor:
    """sqrt(error^2 + c^2) - c by element (Song and Dhariwal, arXiv 2310.14189); the square where c is 0."""
    return error.square() if constant == 0 else (error.square() + constant**2).sqrt() - constant


def feature_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """||a / |a| - b / |b| ||^2 over channels, a mean over places: LPIPS's distance of one layer with equal weights.

    Features (B,C,H,W) -> (B,)."""
    unit_a, unit_b = (each / each.norm(dim=1, keepdim=True).clamp_min(1e-8) for each in (a, b))
    return (unit_a - unit_b).square().sum(1).flatten(1).mean(1)
