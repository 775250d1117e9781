"""FLUX.1 inpainting by a ControlNet that sees the masked picture and its mask, as alimama-creative publishes it.

Published with FLUX.1-dev-Controlnet-Inpainting-Beta: six double blocks and no single ones, trained at 1024 pixels;
28 Euler steps, embedded guidance 3.5, conditioning scale 0.9 to 1, no true guidance. The published code draws the
masked picture's latents from the VAE's posterior; here they are its mean.
"""

# B batch, H W pixels, h w latents

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from refine_control.conditions.condition import control_cond, masked_pixels
from refine_control.config import SamplerConfig
from refine_control.models.backbone import Backbone, encode_images, encode_prompts, predict_velocity
from refine_control.models.controlnet import control_residuals, injection_of, join
from refine_control.models.flux import MAX_SEQUENCE_LENGTH
from refine_control.pipeline.painting import complete_latents


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
    backbone = Backbone(pipeline, MAX_SEQUENCE_LENGTH)
    join(pipeline.controlnet, pipeline.transformer)
    if not backbone.embeds_guidance:
        sampler = sampler.model_copy(update={"guidance_scale": 1.0})
    cond = control_cond(encode_images(pipeline.vae, masked_pixels(pixel_values, mask)).float(), mask)
    text = encode_prompts(pipeline, prompts, MAX_SEQUENCE_LENGTH)
    return complete_latents(backbone, pipeline.controlnet, cond, text, None, sampler, noise)


def denoising_step(pipeline: Any, side: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """One pass of the ControlNet, and one step with it, on an empty picture whose latents have `side` rows: what is
    measured."""
    network, controlnet = pipeline.transformer, pipeline.controlnet
    join(controlnet, network)
    channels, config = pipeline.vae.config["latent_channels"], network.config
    zeros = partial(torch.zeros, 1, device=network.device, dtype=network.dtype)
    at = zeros(channels, side, side), torch.tensor([0.5], device=network.device)
    embeds, pooled = zeros(MAX_SEQUENCE_LENGTH, config["joint_attention_dim"]), zeros(config["pooled_projection_dim"])
    cond = control_cond(at[0], zeros(1, side, side))

    def controlled() -> list[torch.Tensor]:
        return control_residuals(controlnet, *at, embeds, cond, pooled)

    def whole() -> torch.Tensor:
        return predict_velocity(network, *at, embeds, pooled, controlled(), injection_of(controlnet))

    return torch.no_grad()(controlled), torch.no_grad()(whole)
