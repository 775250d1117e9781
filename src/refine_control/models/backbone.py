"""The frozen parts of SD3 or FLUX: VAE, text encoders, transformer, and the conventions between pixels and latents."""

# B batch, H W pixels, h w latents, T text tokens

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3ControlNetInpaintingPipeline

from refine_control.injection import Injection, expand_residuals
from refine_control.models import flux
from refine_control.models.devices import (
    ENCODED_PIXELS,
    USABLE,
    compute_type,
    first_weight,
    free_bytes,
    missing_bytes,
    pictures_at_once,
)
from refine_control.models.families import Encoding
from refine_control.models.fit import Geometry, geometry
from refine_control.models.packed import packed
from refine_control.models.words import cut_warnings, only_known, unknown_words_warning

logger = logging.getLogger(__name__)
_MOST_PROMPT_WARNINGS = 3
"""For prompts that come in batches; a caller that knows all of them calls `warn_unread` for one warning."""


class Backbone:
    """A stock inpainting pipeline as the functions that training needs, all of its networks frozen.

    Arguments may be on any device; each network runs where it is."""

    def __init__(
        self,
        pipeline: StableDiffusion3ControlNetInpaintingPipeline,
        max_sequence_length: int,
        vocabulary: frozenset[str] | None = None,
    ):
        self.pipeline = pipeline
        self.vocabulary = vocabulary
        self.max_sequence_length = max_sequence_length
        self._examined: set[int] = set()
        self._prompt_warnings = 0
        self.vae, self.transformer = pipeline.vae, pipeline.transformer
        self.is_flux = flux.is_flux(pipeline.transformer)
        for part in (pipeline.vae, pipeline.transformer, *self.text_encoders, pipeline.controlnet):
            if part is not None:
                part.requires_grad_(False).eval()

    def with_transformer(self, transformer: SD3Transformer2DModel) -> Backbone:
        """The same parts, shared, around another transformer: that of a student."""
        other = copy.copy(self)
        other.pipeline = type(self.pipeline)(**{**self.pipeline.components, "transformer": transformer})
        other.transformer = transformer
        return other

    @property
    def text_encoders(self) -> list[Any]:
        encoders = (getattr(self.pipeline, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
        return [encoder for encoder in encoders if encoder is not None]

    @property
    def device(self) -> torch.device:
        """The transformer's."""
        return first_weight(self.transformer).device

    @property
    def geometry(self) -> Geometry:
        """The sizes that it paints."""
        return geometry(self.vae.config, self.transformer.config)

    def to(self, device: torch.device | str, painting: bool = True) -> Backbone:
        """Moves the networks in their types, in place; without `painting` only the VAE and the text encoders.

        Networks, and text encoders after them (T5 has 19 GB in fp32), for which a GPU has no memory left stay and run
        where they are; a warning says so."""
        device = torch.device(device)
        painters = [self.transformer, self.pipeline.controlnet] if painting else []
        first = [part for part in (self.vae, *painters) if part is not None]
        room = USABLE * free_bytes(device)
        for name, parts in (("the networks", first), ("the text encoders", self.text_encoders)):
            needed = missing_bytes(device, parts)
            if needed > room:
                text = "%s has %.1f GB for weights, and %s need %.1f: they stay where they are"
                logger.warning(text, device, room / 1e9, name, needed / 1e9)
                break
            for part in parts:
                part.to(device)
            room -= needed
        return self

    @property
    def num_blocks(self) -> int:
        return len(self.transformer.transformer_blocks)

    @property
    def num_sites(self) -> int:
        """Blocks that take a residual: all but SD3's last one."""
        single = getattr(self.transformer, "single_transformer_blocks", None)
        return self.num_blocks - 1 if single is None else self.num_blocks + len(single)

    @property
    def latent_channels(self) -> int:
        """C of latents (B,C,h,w)."""
        return self.vae.config["latent_channels"]

    @property
    def embeds_guidance(self) -> bool:
        """Whether the transformer is distilled: it reads the guidance scale as a number and has no pass without it."""
        return bool(self.transformer.config.get("guidance_embeds"))

    @property
    def shift(self) -> float:
        """The scheduler's sigma shift."""
        return self.pipeline.scheduler.config["shift"]

    def shift_at(self, size: Sequence[int]) -> float:
        """The scheduler's sigma shift for latents of size h w, where it depends on that (FLUX.1-dev)."""
        config = self.pipeline.scheduler.config
        return flux.shift_at(config, size) if config.get("use_dynamic_shifting") else self.shift

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor, shift: bool = True) -> torch.Tensor:
        """(B,3,H,W) in [-1, 1] -> latents (B,16,h,w): the posterior's mean, normalised (docs/paper.md, trap 3).

        A condition is encoded by `encode_condition`."""
        return by_parts(self.vae, lambda part: encode_images(self.vae, part, shift), pixel_values)

    def encode_condition(self, pixel_values: torch.Tensor, encoding: Encoding) -> torch.Tensor:
        """Latents (B,16,h,w) of condition pictures (B,3,H,W) in [-1, 1], as `families.condition_encoding` says."""
        return self.encode_images(encoding.pixels(pixel_values), encoding.shift)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B,16,h,w) -> pixels (B,3,H,W), about [-1, 1]."""
        decode = partial(decode_latents, self.vae)
        return by_parts(self.vae, decode, latents, self.pipeline.vae_scale_factor)

    def readable(self, prompts: Sequence[str]) -> list[str]:
        """The prompts as this model can read them: a closed vocabulary (the mini model's) drops unknown words."""
        return list(prompts) if self.vocabulary is None else [only_known(p, self.vocabulary) for p in prompts]

    def warn_unread(self, prompts: Sequence[str]) -> None:
        """Logs what of the prompts the model does not read: unknown words, and what its text encoders cut off.

        A prompt is examined once, here or by `encode_prompts`."""
        unexamined = [prompt for prompt in dict.fromkeys(prompts) if hash(prompt) not in self._examined]
        self._examined.update(map(hash, unexamined))
        if not unexamined or self._prompt_warnings >= _MOST_PROMPT_WARNINGS:
            return
        p, limit = self.pipeline, self.pipeline.tokenizer_max_length
        limits = {"": limit, "_2": limit, "_3": self.max_sequence_length}
        if self.is_flux:
            limits = {"": limit, "_2": self.max_sequence_length}
        parts = [(f"text_encoder{s}", getattr(p, f"tokenizer{s}"), most) for s, most in limits.items()]
        encoders = [(name, tokenizer, most) for name, tokenizer, most in parts if getattr(p, name) is not None]
        warnings = cut_warnings(encoders, self.readable(unexamined))
        if self.vocabulary is not None and (ignored := unknown_words_warning(unexamined, self.vocabulary)):
            warnings.append(ignored)
        self._prompt_warnings += bool(warnings)
        ending = " (no more prompts are reported)" if self._prompt_warnings == _MOST_PROMPT_WARNINGS else ""
        for warning in warnings:
            logger.warning("%s%s", warning, ending)

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """B prompts -> prompt_embeds (B,T,D_text) and pooled_prompt_embeds (B,D_pooled), by the pipeline's own code.

        On the transformer's device, wherever the text encoders are. Logs a warning of what is not read."""
        self.warn_unread(prompts)
        with torch.no_grad():
            embeds, pooled = encode_prompts(self.pipeline, self.readable(prompts), self.max_sequence_length)
        return embeds.to(self.device), pooled.to(self.device)


def by_parts(
    vae: Any, apply: Callable[[torch.Tensor], torch.Tensor], pictures: torch.Tensor, side: int = 1
) -> torch.Tensor:
    """`apply` to as many pictures (B,C,H,W) at a time as a GPU takes, without TF32; on the CPU to all of them.

    Each place of `pictures` stands for `side` x `side` pixels."""
    height, width = (side * n for n in pictures.shape[-2:])
    count = pictures_at_once(first_weight(vae).device, height, width, max(1, len(pictures)), ENCODED_PIXELS)
    # cuDNN would round the arguments to TF32's ten bits
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.cat([apply(part) for part in pictures.split(count)])


def encode_images(vae: Any, pixel_values: torch.Tensor, shift: bool = True) -> torch.Tensor:
    """z = (mean - shift_factor) * scaling_factor. Pixels (B,3,H,W) in [-1, 1] -> (B,16,h,w), on the VAE's device.

    Without `shift` shift_factor is 0, as some ControlNets are shown their condition."""
    mean = vae.encode(pixel_values.to(first_weight(vae))).latent_dist.mean
    return (mean - vae.config["shift_factor"] * shift) * vae.config["scaling_factor"]


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """(B,16,h,w) -> pixels (B,3,H,W), about [-1, 1], on the VAE's device; differentiable."""
    latents = latents.to(first_weight(vae))
    return vae.decode(latents / vae.config["scaling_factor"] + vae.config["shift_factor"]).sample


def encoder_features(vae: Any, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """Pixels (B,3,H,W) -> what the VAE's encoder sees after each of its resolutions, (B,C,H',W') each."""
    hidden, features = vae.encoder.conv_in(pixel_values.to(first_weight(vae))), []
    for block in vae.encoder.down_blocks:
        hidden = block(hidden)
        features.append(hidden)
    return features


def encode_prompts(
    pipeline: Any, prompts: Sequence[str], max_sequence_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's `encode_prompt` without guidance: (B,T,D_text), (B,D_pooled); differentiable.

    On the device of the text encoders: by itself the pipeline would look for them where the transformer is."""
    texts, how = list(prompts), {"device": pipeline.text_encoder.device, "max_sequence_length": max_sequence_length}
    if flux.is_flux(pipeline.transformer):
        embeds, pooled, _ = pipeline.encode_prompt(texts, None, **how)
        return embeds, pooled
    embeds, _, pooled, _ = pipeline.encode_prompt(*[texts] * 3, do_classifier_free_guidance=False, **how)
    return embeds, pooled


def predict_velocity(
    transformer: SD3Transformer2DModel,
    noisy_latents: torch.Tensor,
    sigmas: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    residuals: Sequence[torch.Tensor] | None = None,
    injection: Injection | Sequence[int] = "exact",
    guidance: float = 1.0,
) -> torch.Tensor:
    """v(x_t, sigma, prompt, residuals): (B,16,h,w) in the transformer's type; L residuals (B,N,D), injected exactly.

    `injection` as `models.controlnet.injection_of` gives it for the ControlNet that they come from; `guidance` is the
    scale that FLUX embeds."""
    if flux.is_flux(transformer):
        at_sites = residuals
        if residuals is not None and not isinstance(injection, str):
            at_sites = expand_residuals(residuals, len(injection) + 1, injection)[:-1]
        asked = noisy_latents, sigmas, prompt_embeds, pooled_prompt_embeds
        return flux.predict_velocity(transformer, *asked, at_sites, guidance)
    dtype, blocks = compute_type(transformer), len(transformer.transformer_blocks)
    return (packed(transformer) or transformer)(
        hidden_states=noisy_latents.to(dtype),
        timestep=sigmas * 1000,
        encoder_hidden_states=prompt_embeds.to(dtype),
        pooled_projections=pooled_prompt_embeds.to(dtype),
        block_controlnet_hidden_states=None if residuals is None else expand_residuals(residuals, blocks, injection),
        return_dict=False,
    )[0]
