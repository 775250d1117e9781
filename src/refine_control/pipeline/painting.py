"""Painting under a condition, and the inpainting pipeline: stock with exact injection, and the mean of the latents."""

# B batch, H W pixels

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3ControlNetInpaintingPipeline

from refine_control import flow
from refine_control.conditions.condition import Shown, control_cond, masked_pixels
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.injection import Injection
from refine_control.models.backbone import Backbone, encode_images, predict_velocity
from refine_control.models.controlnet import Control, SD3ControlNetModel, injected, site_residuals
from refine_control.models.devices import pictures_at_once
from refine_control.models.families import condition_encoding
from refine_control.models.packed import packed
from refine_control.models.prompt_memory import Encode, PromptMemory
from refine_control.pixels import from_images, to_images
from refine_control.progress import Progress
from refine_control.randomness import derive_seed, slot_normals

logger = logging.getLogger(__name__)
_FEW = 8
"""The most steps that are few: where a scheduler wastes one of them, it shows."""


class InpaintingPipeline(StableDiffusion3ControlNetInpaintingPipeline):
    """Stock but for `prepare_image_with_mask`, which uses the posterior's mean instead of a draw (paper.md, trap 3)."""

    def prepare_image_with_mask(
        self,
        image: Any,
        mask: Any,
        width: int,
        height: int,
        batch_size: int,
        num_images_per_prompt: int,
        device: Any,
        dtype: torch.dtype,
        do_classifier_free_guidance: bool = False,
        guess_mode: bool = False,
    ) -> torch.Tensor:
        """Image and mask (1 = inpaint) -> control_cond (B,17,h,w), twice where guidance asks for it."""
        if not isinstance(image, torch.Tensor):
            image = self.image_processor.preprocess(image, height=height, width=width)
        if not isinstance(mask, torch.Tensor):
            mask = self.mask_processor.preprocess(mask, height=height, width=width)
        repeats = batch_size if len(image) == 1 else num_images_per_prompt
        image, mask = (each.repeat_interleave(repeats, dim=0).to(device, dtype) for each in (image, mask))
        cond = control_cond(encode_images(self.vae, masked_pixels(image, mask)), mask).to(dtype)
        return torch.cat([cond] * 2) if do_classifier_free_guidance and not guess_mode else cond


class FreshNoise(FlowMatchEulerDiscreteScheduler):
    """Stock's `stochastic_sampling` with the noise of `sampling_path` in row 0; the pipeline passes no generator."""

    seed = 0

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step x_s = (1 - s) x0_hat + s noise; arguments and result as stock's."""
        noise_seed = derive_seed(self.seed, "fresh noise", self.step_index or 0, 0)
        return super().step(*args, **kwargs, generator=torch.Generator().manual_seed(noise_seed))


def make_pipeline(
    backbone: Backbone,
    controlnet: SD3ControlNetModel,
    injection: Injection = "exact",
    latents_mode: Literal["mean", "sample"] = "mean",
) -> StableDiffusion3ControlNetInpaintingPipeline:
    """The pipeline of a frozen backbone and any ControlNet, sharing all their parameters, on the backbone's device.

    Of the masked latents it takes the mean of the posterior or, as stock does, a `sample`."""
    controlnet.to(backbone.device)  # type: ignore[arg-type]
    components = {**backbone.pipeline.components, "controlnet": injected(controlnet, backbone.num_blocks, injection)}
    kind = InpaintingPipeline if latents_mode == "mean" else StableDiffusion3ControlNetInpaintingPipeline
    pipeline = kind(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _scheduled(pipeline: StableDiffusion3ControlNetInpaintingPipeline, sampler: SamplerConfig) -> Iterator[None]:
    """The pipeline with the scheduler of a sampler: its own, or one with fresh noise in every step."""
    usual = pipeline.scheduler
    if sampler.stochastic:
        pipeline.scheduler = cast(Any, FreshNoise.from_config(usual.config, stochastic_sampling=True))
        pipeline.scheduler.seed = sampler.seed
    try:
        yield
    finally:
        pipeline.scheduler = usual


@torch.no_grad()
def run_pipeline(
    pipeline: StableDiffusion3ControlNetInpaintingPipeline,
    backbone: Backbone,
    image: np.ndarray,
    mask: np.ndarray,
    prompt: str,
    sampler: SamplerConfig,
    progress: Progress | None = None,
) -> np.ndarray:
    """One picture through the pipeline: image (H,W,3) uint8, mask (H,W) bool True = inpaint -> (H,W,3) uint8.

    `progress` counts the steps."""

    def advance(_pipeline: Any, step: int, _timestep: Any, changed: dict[str, Any]) -> dict[str, Any]:
        if progress:
            progress(step + 1, sampler.num_inference_steps, "paint")
        return changed

    (height, width), factor = mask.shape, pipeline.vae_scale_factor
    shape = (pipeline.transformer.config["in_channels"], height // factor, width // factor)
    noise = slot_normals(shape, [0], sampler.seed, "initial noise")
    dtype = pipeline.transformer.dtype
    text: dict[str, torch.Tensor] = {}  # by itself the pipeline would encode where the transformer is
    for kind, words in {"": prompt, **({"negative_": ""} if sampler.guidance_scale > 1 else {})}.items():
        embeds, pooled = backbone.encode_prompts([words])
        text |= {f"{kind}prompt_embeds": embeds.to(dtype), f"{kind}pooled_prompt_embeds": pooled.to(dtype)}
    unshifted = flow.even_sigmas(sampler.num_inference_steps)[:-1].tolist()
    with _scheduled(pipeline, sampler):
        result = cast(Any, pipeline)(
            **text,
            control_image=from_images(image[None]),
            control_mask=torch.from_numpy(mask)[None, None].float(),
            height=height,
            width=width,
            num_inference_steps=sampler.num_inference_steps,
            sigmas=unshifted if sampler.sigmas == "even" else None,
            guidance_scale=sampler.guidance_scale,
            controlnet_conditioning_scale=sampler.conditioning_scale,
            latents=noise,
            max_sequence_length=backbone.max_sequence_length,
            callback_on_step_end=advance,
            output_type="pt",
        ).images[0]
    return (result.float().cpu() * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


@torch.inference_mode()
def paint(
    backbone: Backbone,
    controlnet: SD3ControlNetModel,
    shown: Shown,
    prompts: Sequence[str],
    sampler: SamplerConfig,
    *,
    others: Sequence[Control[Shown]] = (),
    first: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> np.ndarray:
    """Paints N pictures by what the ControlNet is shown and by prompts -> (N,H,W,3) uint8, uncomposited.

    `others` paint with it: each is shown N pictures of the same size, and its residuals are added.

    With a region the pictures of `InpaintingPipeline` but for rounding; the VAE and the steps are in fp32. The noise of
    picture i is a function of (sampler.seed, first + i) alone (fresh noise: of the step, too), so models, batch sizes
    and subsets are compared on the same noise. Moves ControlNets to the backbone's device. Raises InvalidInputError
    for `sample`."""
    if sampler.latents != "mean":
        raise InvalidInputError("sampler.latents is sample; batches take the posterior's mean: set it to mean")
    controls = [Control(controlnet, shown, sampler.conditioning_scale), *others]
    for control in controls:
        control.controlnet.to(backbone.device)  # type: ignore[arg-type]
    encode, guided = _encoder(backbone), asks_twice(backbone, sampler)
    height, width = shown.pictures.shape[1:3]
    total, out = len(shown.pictures), []
    count = pictures_at_once(backbone.device, height, width, batch_size)
    for a in range(0, total, count):
        b = min(a + count, total)
        cond, *more = (_encoded(backbone, control, slice(a, b)) for control in controls)
        rows, shape = range(first + a, first + b), (backbone.latent_channels, *cond.seen.shape[2:])
        noise = slot_normals(shape, rows, sampler.seed, "initial noise")
        text, empty = encode(prompts[a:b]), encode([""] * (b - a)) if guided else None
        latents = complete_latents(backbone, controlnet, cond.seen, text, empty, sampler, noise, rows, others=more)
        out.append(to_images(backbone.decode_latents(latents)))
        if progress:
            progress(b, total, "paint")
    return np.concatenate(out)


def _encoded(backbone: Backbone, control: Control[Shown], rows: slice) -> Control[torch.Tensor]:
    """Some of the samples as the ControlNet reads them."""
    pixels, mask = control.seen.take(rows).tensors()
    latents = backbone.encode_condition(pixels, condition_encoding(control.controlnet.config)).float()
    cond = control_cond(latents, None if mask is None else mask.to(latents.device))
    return Control(control.controlnet, cond, control.scale)


def _encoder(backbone: Backbone) -> Encode:
    """`Backbone.encode_prompts` that does not encode twice: on a GPU each distinct prompt, on the CPU the last batches.

    On the CPU the last digits of an embedding depend on its batch, so batches stay together."""
    if backbone.device.type != "cpu":
        return PromptMemory(backbone.encode_prompts)
    remembered = lru_cache(maxsize=2)(backbone.encode_prompts)
    return lambda prompts: remembered(tuple(prompts))


@torch.no_grad()
def complete_latents(
    backbone: Backbone,
    controlnet: SD3ControlNetModel,
    cond: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor],
    empty: tuple[torch.Tensor, torch.Tensor] | None,
    sampler: SamplerConfig,
    noise: torch.Tensor,
    rows: Sequence[int] | None = None,
    others: Sequence[Control[torch.Tensor]] = (),
) -> torch.Tensor:
    """The end of `sampling_path`: what a ControlNet paints, in latents (B,16,h,w)."""
    path = sampling_path(backbone, controlnet, cond, text, empty, sampler, noise, rows, others)
    return deque(path, maxlen=1)[0]


def asks_twice(backbone: Backbone, sampler: SamplerConfig) -> bool:
    """Whether each step is guided by a second pass, of the empty prompt (classifier-free guidance)."""
    return sampler.guidance_scale > 1 and not backbone.embeds_guidance


def sampling_sigmas(backbone: Backbone, sampler: SamplerConfig, size: Sequence[int] = ()) -> torch.Tensor:
    """The noise levels of a sampler, (steps + 1,) from 1 to 0, on the backbone's device.

    FLUX's are even, shifted by the `size` h w of the latents; stock's pipelines never ask its scheduler for others."""
    if sampler.sigmas == "even" or backbone.is_flux:
        return flow.even_sigmas(sampler.num_inference_steps, backbone.shift_at(size)).to(backbone.device)
    scheduler = backbone.pipeline.scheduler.__class__.from_config(backbone.pipeline.scheduler.config)
    scheduler.set_timesteps(sampler.num_inference_steps, device=backbone.device)
    return scheduler.sigmas


def warn_wasted_steps(backbone: Backbone, sampler: SamplerConfig) -> None:
    """Logs a warning where the scheduler spaces few steps badly: its shift is applied twice (diffusers#13243), so that
    the last step does almost nothing."""
    steps, shift = sampler.num_inference_steps, backbone.shift
    if sampler.sigmas == "scheduler" and not backbone.is_flux and 1 < steps <= _FEW and shift > 1:
        levels = ", ".join(f"{sigma:.2g}" for sigma in sampling_sigmas(backbone, sampler).tolist())
        text = "%s applies its shift %g twice (diffusers#13243), so the last of the %d steps is wasted, at the noise "
        text += "levels %s; choose evenly spaced ones, `--sigmas even` or `sampler.sigmas: even` in a recipe"
        logger.warning(text, type(backbone.pipeline.scheduler).__name__, shift, steps, levels)


def sampling_path(
    backbone: Backbone,
    controlnet: SD3ControlNetModel,
    cond: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor],
    empty: tuple[torch.Tensor, torch.Tensor] | None,
    sampler: SamplerConfig,
    noise: torch.Tensor,
    rows: Sequence[int] | None = None,
    others: Sequence[Control[torch.Tensor]] = (),
) -> Iterator[torch.Tensor]:
    """Yields the latents after each step on `sampling_sigmas`, the clean ones last, on the backbone's device.

    A step is Euler's, or x_s = (1 - s) x0_hat + s noise for a stochastic sampler (LCM), its noise a function of
    (sampler.seed, step, row); `rows` are the samples' numbers, 0 to B - 1 by default. `cond` is what
    `control_cond` gives, noise (B,16,h,w) -> latents (B,16,h,w). `text` and `empty` are
    (prompt_embeds, pooled_prompt_embeds) of B samples, `empty` None unless `asks_twice`. The residuals of `others` are
    added (`site_residuals`)."""
    device = backbone.device
    controls = [Control(controlnet, cond, sampler.conditioning_scale), *others]
    controls = [each._replace(seen=each.seen.to(device)) for each in controls]
    latents, guided = noise.to(device), asks_twice(backbone, sampler)
    assert empty is not None or not guided
    prompts = [[part.to(device) for part in pair] for pair in (text, empty) if pair is not None][: 1 + guided]
    together = guided and packed(backbone.transformer) is not None  # a call that small costs little more with 2 B rows
    passes = [[torch.cat(parts) for parts in zip(*prompts, strict=True)]] if together else prompts

    def velocity(at: torch.Tensor, sigma: torch.Tensor, embeds: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        times = (len(embeds) // len(at), 1, 1, 1)
        at, around = at.repeat(times), [each._replace(seen=each.seen.repeat(times)) for each in controls]
        asked = at, sigma.expand(len(at)), embeds, pooled
        residuals = site_residuals(around, *asked, backbone.num_sites, sampler.injection, sampler.guidance_scale)
        return predict_velocity(backbone.transformer, *asked, residuals, guidance=sampler.guidance_scale).float()

    for step, (sigma, following) in enumerate(pairwise(sampling_sigmas(backbone, sampler, noise.shape[-2:]))):
        v, *v_empty = torch.cat([velocity(latents, sigma, *each) for each in passes]).split(len(latents))
        if v_empty:
            v = flow.guided(v, v_empty[0], sampler.guidance_scale)
        if sampler.stochastic:
            fresh = slot_normals(noise.shape[1:], rows or range(len(noise)), sampler.seed, "fresh noise", step)
            clean = flow.clean_latents(latents, v, sigma[None])
            latents = flow.interpolate(clean, fresh.to(device), following[None])
        else:
            latents = flow.euler_step(latents, v, sigma[None], following[None])
        yield latents
