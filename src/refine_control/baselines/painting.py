"""Repainting by a baseline: the same pictures, masks and prompts as the teacher and the students get.

At the resolution that it was trained for, from noise that is a function of (seed, picture) alone.
"""

# N pictures, B batch, H W pixels of a picture, S s pixels of the model, h w latents, T text tokens

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from refine_control.baselines import flux as flux_inpainting
from refine_control.baselines.models import Baseline
from refine_control.config import Precision, SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.models.words import cut_warnings
from refine_control.pixels import from_images, to_images
from refine_control.progress import Progress
from refine_control.randomness import derive_seed, slot_normals

logger = logging.getLogger(__name__)


def working_size(baseline: Baseline, height: int, width: int) -> tuple[int, int]:
    """The size at which a picture of H x W is repainted: its shorter side is the baseline's, the shape stays."""
    shorter, step = min(height, width), baseline.multiple
    rounded = [round(side * baseline.size / shorter / step) * step for side in (height, width)]
    return rounded[0], rounded[1]


def facts(baseline: Baseline, height: int, width: int, sampler: SamplerConfig) -> dict[str, str]:
    """What `paint` does to pictures of H x W, in words for a report."""
    high, wide = working_size(baseline, height, width)
    resized = f"{height} x {width} pictures are resized to it and back, bicubic; the hole is gray before"
    card = baseline.card
    guidance = f"guidance {sampler.guidance_scale:g}"
    if card.kind == "flux":
        guidance = f"embedded {guidance}, true guidance 1, conditioning scale "
        guidance += f"{sampler.conditioning_scale:g}"
    return {
        "model": f"{card.title} ({card.hub_id})",
        "license": card.license,
        "resolution": f"{high} x {wide}" + ("" if (high, wide) == (height, width) else f"; {resized}"),
        "sampler": f"{type(baseline.pipeline.scheduler).__name__}, {sampler.num_inference_steps} steps, {guidance}, "
        f"seed {sampler.seed}, {sampler.precision}",
        "latents": "mean of the VAE's posterior; uncomposited output",
    }


def model_pixels(images: np.ndarray, masks: np.ndarray, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,H,W,3) uint8 and (B,H,W) bool -> pixels (B,3,S,s) in [-1,1] and mask (B,1,S,s), 1 = inpaint.

    Where the size changes, the hole becomes gray before (so that nothing of it bleeds into its surroundings), and a
    pixel belongs to the hole that any pixel of the hole overlaps."""
    pixels = from_images(images)
    mask = torch.from_numpy(masks)[:, None].float()
    if images.shape[1:3] == (height, width):
        return pixels, mask
    pixels = _resize(torch.where(mask > 0.5, 0.0, pixels), height, width)
    return pixels.clamp(-1, 1), (adaptive_avg_pool2d(mask, (height, width)) > 0).float()


def _resize(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)


def to_pictures(pixels: torch.Tensor, height: int, width: int) -> np.ndarray:
    """Pixels (B,3,S,s), about [-1,1] -> (B,H,W,3) uint8."""
    pixels = pixels.float().cpu().clamp(-1, 1)
    if tuple(pixels.shape[-2:]) != (height, width):
        pixels = _resize(pixels, height, width).clamp(-1, 1)
    return to_images(pixels)


@torch.no_grad()
def paint(
    baseline: Baseline,
    images: np.ndarray,
    masks: np.ndarray,
    prompts: Sequence[str],
    sampler: SamplerConfig,
    *,
    first: int = 0,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> np.ndarray:
    """Repaints N pictures: images (N,H,W,3) uint8, masks (N,H,W) bool True = inpaint -> (N,H,W,3) uint8, uncomposited.

    The noise of picture i is a function of (sampler.seed, first + i) alone, as in `pipeline.inpaint`. In bf16 the
    U-Net, the transformer and the ControlNet compute so; the VAE and the steps are fp32.
    Raises InvalidInputError for `latents: sample` and for a FLUX that was loaded in another precision."""
    if sampler.latents != "mean":
        raise InvalidInputError("sampler.latents is sample; baselines encode by the posterior's mean, set it to mean")
    if baseline.card.kind == "flux" and (held := held_precision(baseline)) != sampler.precision:
        raise InvalidInputError(
            f"{baseline.name} was loaded in {held} and sampler.precision is {sampler.precision}; load it in that"
        )
    _warn_cut(baseline, prompts)
    (high, wide), device, vae = (
        working_size(baseline, *masks.shape[1:]),
        baseline.denoiser.device,
        baseline.pipeline.vae,
    )
    channels, factor = vae.config["latent_channels"], baseline.pipeline.vae_scale_factor
    out = []
    for a in range(0, len(images), batch_size):
        b = min(a + batch_size, len(images))
        pixels, mask = (part.to(device) for part in model_pixels(images[a:b], masks[a:b], high, wide))
        slots = range(first + a, first + b)
        noise = slot_normals((channels, high // factor, wide // factor), slots, sampler.seed, "initial noise")
        given = (baseline.pipeline, pixels, mask, prompts[a:b], sampler, noise.to(device))
        flux = baseline.card.kind == "flux"
        latents = flux_inpainting.complete(*given) if flux else _complete_stable_diffusion(*given, slots)
        latents = latents.float() / vae.config["scaling_factor"] + (vae.config["shift_factor"] or 0)
        out.append(to_pictures(vae.decode(latents).sample, *masks.shape[1:]))
        if progress:
            progress(b, len(images), "inpaint")
    return np.concatenate(out)


def _warn_cut(baseline: Baseline, prompts: Sequence[str]) -> None:
    """Logs which text the baseline's text encoders cut off."""
    pipeline = baseline.pipeline
    encoders = [(f"{baseline.name}'s text_encoder", pipeline.tokenizer, pipeline.tokenizer.model_max_length)]
    if baseline.card.kind == "flux":
        limit = flux_inpainting.MAX_SEQUENCE_LENGTH
        encoders.append((f"{baseline.name}'s text_encoder_2", pipeline.tokenizer_2, limit))
    for warning in cut_warnings(encoders, list(dict.fromkeys(prompts))):
        logger.warning(warning)


def held_precision(baseline: Baseline) -> Precision:
    """The type of the U-Net's or the transformer's weights."""
    return "bf16" if baseline.denoiser.dtype == torch.bfloat16 else "fp32"


def _complete_stable_diffusion(
    pipeline: Any,
    pixel_values: torch.Tensor,
    mask: torch.Tensor,
    prompts: Sequence[str],
    sampler: SamplerConfig,
    noise: torch.Tensor,
    slots: Sequence[int],
) -> torch.Tensor:
    """By the stock pipeline, from pure noise: pixels (B,3,S,s) in [-1,1], mask (B,1,S,s) -> latents (B,4,h,w).

    A scheduler that draws on its way has a generator for each picture."""
    device, (height, width) = pixel_values.device, pixel_values.shape[-2:]
    embeds, empty = pipeline.encode_prompt(list(prompts), device, 1, sampler.guidance_scale > 1)
    seeds = [derive_seed(sampler.seed, "noise of the steps", slot) for slot in slots]
    with torch.autocast(device.type, torch.bfloat16, enabled=sampler.precision == "bf16"):
        return pipeline(
            prompt_embeds=embeds,
            negative_prompt_embeds=empty,
            image=pixel_values / 2 + 0.5,
            mask_image=mask,
            height=height,
            width=width,
            strength=1.0,
            num_inference_steps=sampler.num_inference_steps,
            guidance_scale=sampler.guidance_scale,
            latents=noise,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images


def denoising_step(baseline: Baseline) -> tuple[Callable[[], Any] | None, Callable[[], Any]]:
    """Two functions: one pass of the ControlNet, where there is one, and one denoising step without guidance, on a
    square picture of the baseline's size."""
    network, pipeline = baseline.denoiser, baseline.pipeline
    side = baseline.size // pipeline.vae_scale_factor
    if baseline.card.kind == "flux":
        return flux_inpainting.denoising_step(pipeline, side)
    zeros = partial(torch.zeros, 1, device=network.device, dtype=network.dtype)
    noisy = zeros(network.config["in_channels"], side, side)
    embeds = zeros(pipeline.tokenizer.model_max_length, network.config["cross_attention_dim"])
    return None, torch.no_grad()(lambda: network(noisy, 500, encoder_hidden_states=embeds).sample)
