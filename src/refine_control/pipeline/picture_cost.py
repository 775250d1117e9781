"""What a whole picture costs, with everything counted: prompts, VAE, and every call of the networks."""

# B batch, H W pixels

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from refine_control.conditions.condition import control_cond, has_region
from refine_control.config import SamplerConfig
from refine_control.metrics.cost import count_flops
from refine_control.models.backbone import Backbone, predict_velocity
from refine_control.models.controlnet import control_residuals


class PictureCost(NamedTuple):
    """Of one picture, whatever the machine."""

    network_calls: int
    """Passes of ControlNet and transformer: steps, twice with guidance."""
    gflops_picture: float
    """Text encoders, VAE and all network calls; 1 multiply-add = 2 FLOP."""


def network_calls(sampler: SamplerConfig) -> int:
    """Passes of ControlNet and transformer that one picture takes."""
    return sampler.num_inference_steps * (2 if sampler.guidance_scale > 1 else 1)


def painting_parts(backbone: Backbone, controlnet: Any, batch: int = 1) -> dict[str, Callable[[], Any]]:
    """The parts of painting `batch` gray pictures of the model's size as functions: text, encode, call and decode.

    `call` is one pass of ControlNet and transformer."""
    side, device = backbone.geometry.side, backbone.device
    pixels, prompts = torch.zeros(batch, 3, side, side), ["a red circle"] * batch
    with torch.no_grad():
        latents, (embeds, pooled) = backbone.encode_images(pixels).float(), backbone.encode_prompts(prompts)
    latents, sigmas = latents.to(device), torch.ones(1, device=device).expand(batch)
    mask = torch.zeros(batch, 1, side, side, device=device) if has_region(controlnet.config) else None
    cond = control_cond(latents, mask)
    controlnet.to(device)

    @torch.inference_mode()
    def call() -> torch.Tensor:
        residuals = control_residuals(controlnet, latents, sigmas, embeds, cond, pooled)
        return predict_velocity(backbone.transformer, latents, sigmas, embeds, pooled, residuals)

    return {
        "text": torch.inference_mode()(lambda: backbone.encode_prompts(prompts)),
        "encode": torch.inference_mode()(lambda: backbone.encode_images(pixels)),
        "call": call,
        "decode": torch.inference_mode()(lambda: backbone.decode_latents(latents)),
    }


def picture_cost(backbone: Backbone, controlnet: Any, sampler: SamplerConfig) -> PictureCost:
    """Counts each part once; guidance encodes the empty prompt as well."""
    gflops = {name: count_flops(part) / 1e9 for name, part in painting_parts(backbone, controlnet).items()}
    calls, texts = network_calls(sampler), 2 if sampler.guidance_scale > 1 else 1
    fixed = texts * gflops["text"] + gflops["encode"] + gflops["decode"]
    return PictureCost(calls, fixed + calls * gflops["call"])
