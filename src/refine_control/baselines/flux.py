"""FLUX.1 inpainting by a ControlNet that sees the masked picture and its mask, as alimama-creative publishes it.

Published with FLUX.1-dev-Controlnet-Inpainting-Beta: six double blocks and no single ones, trained at 1024 pixels;
control input as in `control_tokens`; 28 Euler steps, embedded guidance 3.5, conditioning scale 0.9 to 1, no true
guidance.
"""

# B batch, H W pixels, h w latents, N = h w / 4 image tokens, T text tokens

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from refine_control import flow
from refine_control.conditions.condition import control_cond, masked_pixels
from refine_control.config import SamplerConfig
from refine_control.models.backbone import encode_images
from refine_control.models.flux import Condition, control_residuals, pack, unpack, velocity

MAX_SEQUENCE_LENGTH = 512
"""T5 tokens of a prompt, padding included."""


def control_tokens(vae: Any, pixel_values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The control input: pixels (B,3,H,W) in [-1,1] and mask (B,1,H,W), 1 = inpaint -> (B,N,68).

    64 numbers of the latents of the picture whose hole is -1, then 4 of the mask at the latents' size, 1 = keep. The
    published code draws the latents from the VAE's posterior; here they are its mean."""
    masked_latents = encode_images(vae, masked_pixels(pixel_values, mask)).float()
    return pack(control_cond(masked_latents, mask))


def schedule(scheduler: Any, num_inference_steps: int, num_tokens: int) -> torch.Tensor:
    """The sigmas (steps + 1,) from 1 to 0: even steps, shifted the more the more tokens a picture has."""
    from diffusers.pipelines.flux.pipeline_flux_controlnet import calculate_shift

    fresh, config = scheduler.__class__.from_config(scheduler.config), scheduler.config
    ends = [config[f"{which}_{what}"] for what in ("image_seq_len", "shift") for which in ("base", "max")]
    sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    fresh.set_timesteps(sigmas=sigmas, mu=calculate_shift(num_tokens, *ends))
    return fresh.sigmas


def predict_velocity(pipeline: Any, tokens: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
    """v (B,N,64) in fp32 for noisy tokens (B,N,64) and one sigma for all.

    Residual j of the ControlNet's L feeds the transformer's blocks i with i // ceil(blocks / L) = j: stock diffusers
    does as the published code."""
    residuals = control_residuals(pipeline.controlnet, tokens, sigma, condition)
    return velocity(pipeline.transformer, residuals, tokens, sigma, condition)


@torch.no_grad()
def complete(
    pipeline: Any,
    pixel_values: torch.Tensor,
    mask: torch.Tensor,
    prompts: Sequence[str],
    sampler: SamplerConfig,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Repaints: pixels (B,3,H,W) in [-1,1], mask (B,1,H,W) 1 = inpaint, noise (B,16,h,w) -> latents (B,16,h,w).

    `sampler.guidance_scale` is the embedded one, a number that the distilled transformer reads. Noise, steps and VAE
    are fp32 whatever the type of transformer and ControlNet."""
    size = (noise.shape[-2], noise.shape[-1])
    control = control_tokens(pipeline.vae, pixel_values, mask)
    embeds, pooled, _ = pipeline.encode_prompt(list(prompts), None, max_sequence_length=MAX_SEQUENCE_LENGTH)
    condition = Condition(control, embeds, pooled, sampler.guidance_scale, sampler.conditioning_scale, size)
    tokens = pack(noise)
    sigmas = schedule(pipeline.scheduler, sampler.num_inference_steps, tokens.shape[1]).to(tokens.device)
    for sigma, following in pairwise(sigmas):
        v = predict_velocity(pipeline, tokens, sigma, condition)
        tokens = flow.euler_step(tokens, v, sigma[None], following[None])
    return unpack(tokens, *size)


def blank(transformer: Any, controlnet: Any, side: int) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Tokens, sigma and condition of one empty picture whose latents have `side` rows: what a measurement runs on."""
    config, tokens = transformer.config, side * side // 4
    channels, extra = config["in_channels"], controlnet.config["extra_condition_channels"]
    zeros = partial(torch.zeros, 1, device=transformer.device, dtype=transformer.dtype)
    embeds, pooled = zeros(MAX_SEQUENCE_LENGTH, config["joint_attention_dim"]), zeros(config["pooled_projection_dim"])
    condition = Condition(zeros(tokens, channels + extra), embeds, pooled, 3.5, 1.0, (side, side))
    return zeros(tokens, channels), torch.tensor(0.5), condition
