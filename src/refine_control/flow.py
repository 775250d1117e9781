"""The rectified-flow path of SD3: x_t, its velocity, and how sigmas are drawn."""

# B batch, C channels, h w latents; sigmas (B,): 0 = data, 1 = noise

from __future__ import annotations

import torch


def expand(sigmas: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, 1, ...) in the type of `like`."""
    return sigmas.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def interpolate(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - sigma) x_0 + sigma eps. Latents and noise (B,C,h,w), sigmas (B,) in [0, 1] -> (B,C,h,w)."""
    sigma = expand(sigmas, latents)
    return (1 - sigma) * latents + sigma * noise


def velocity(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """v = eps - x_0, what SD3 predicts (the paper writes epsilon)."""
    return noise - latents


def euler_step(
    noisy_latents: torch.Tensor, v: torch.Tensor, sigmas: torch.Tensor, next_sigmas: torch.Tensor
) -> torch.Tensor:
    """x_s = x_t + (sigma_s - sigma_t) v: one DDIM step in rectified-flow form."""
    return noisy_latents + expand(next_sigmas - sigmas, v) * v


def clean_latents(noisy_latents: torch.Tensor, v: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """x0_hat = x_t - sigma v: the clean latents that a velocity points at."""
    return noisy_latents - expand(sigmas, v) * v


def pure_noise(noisy_latents: torch.Tensor, v: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """eps_hat = x_t + (1 - sigma) v: the noise that a velocity comes from."""
    return noisy_latents + (1 - expand(sigmas, v)) * v


def guided(v: torch.Tensor, v_empty: torch.Tensor, scale: float) -> torch.Tensor:
    """v_empty + scale (v - v_empty): classifier-free guidance; `v_empty` answers the empty prompt."""
    return v_empty + scale * (v - v_empty)


def even_sigmas(steps: int, shift: float = 1.0) -> torch.Tensor:
    """(steps + 1,) from 1 to 0: evenly spaced, then shifted; 4 steps at shift 3 are 1, 0.9, 0.75, 0.5, 0."""
    return shift_sigmas(torch.linspace(1, 0, steps + 1), shift)


def shift_sigmas(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """The scheduler's resolution shift: s sigma / (1 + (s - 1) sigma); 0 and 1 stay."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def logit_normal_sigmas(normals: torch.Tensor, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> torch.Tensor:
    """Standard normals (B,) -> sigmas (B,) in (0, 1): sigmoid of N(mean, std^2), shifted (docs/paper.md, trap 9)."""
    return shift_sigmas(torch.sigmoid(mean + std * normals), shift)
