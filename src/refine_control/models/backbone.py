"""The frozen SD3 parts: VAE, text encoders, transformer, and the conventions between pixels and latents."""

# B batch, H W pixels, h w latents, T text tokens

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3ControlNetInpaintingPipeline

from refine_control.data.vocabulary import only_known
from refine_control.injection import Injection, expand_residuals


class Backbone:
    """A stock inpainting pipeline seen as the functions that training needs.

    Everything in it is frozen; `velocity` stays in the graph for gradients to residuals."""

    def __init__(
        self,
        pipeline: StableDiffusion3ControlNetInpaintingPipeline,
        max_sequence_length: int,
        closed_vocabulary: bool = False,
    ):
        self.pipeline = pipeline
        self.closed_vocabulary = closed_vocabulary
        self.max_sequence_length = max_sequence_length
        self.vae, self.transformer = pipeline.vae, pipeline.transformer
        for part in (pipeline.vae, pipeline.transformer, *self.text_encoders, pipeline.controlnet):
            if part is not None:
                part.requires_grad_(False).eval()

    @property
    def text_encoders(self) -> list[Any]:
        p = self.pipeline
        return [e for e in (p.text_encoder, p.text_encoder_2, p.text_encoder_3) if e is not None]

    @property
    def num_blocks(self) -> int:
        return len(self.transformer.transformer_blocks)

    @property
    def pooled_width(self) -> int:
        return self.transformer.config["pooled_projection_dim"]

    @property
    def shift(self) -> float:
        """The scheduler's sigma shift."""
        return self.pipeline.scheduler.config["shift"]

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) in [-1, 1] -> latents (B,16,h,w): the posterior's mean, shifted and scaled (PAPER trap 3)."""
        return encode_images(self.vae, pixel_values)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B,16,h,w) -> pixels (B,3,H,W), about [-1, 1]."""
        config = self.vae.config
        return self.vae.decode(latents.to(self.vae.dtype) / config["scaling_factor"] + config["shift_factor"]).sample

    def readable(self, prompts: Sequence[str]) -> list[str]:
        """The prompts as this model can read them: a closed vocabulary (the mini model's) drops unknown words."""
        return [only_known(p) for p in prompts] if self.closed_vocabulary else list(prompts)

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """B prompts -> prompt_embeds (B,T,D_text) and pooled_prompt_embeds (B,D_pooled), by the pipeline's own code."""
        with torch.no_grad():
            return encode_prompts(self.pipeline, self.readable(prompts), self.max_sequence_length)


def encode_images(vae: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """z = (mean - shift_factor) * scaling_factor. Pixels (B,3,H,W) in [-1, 1] -> (B,16,h,w)."""
    mean = vae.encode(pixel_values.to(vae.dtype)).latent_dist.mean
    return (mean - vae.config["shift_factor"]) * vae.config["scaling_factor"]


def encode_prompts(
    pipeline: Any, prompts: Sequence[str], max_sequence_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pipeline's `encode_prompt` without guidance: (B,T,D_text), (B,D_pooled); differentiable."""
    texts = list(prompts)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
    )
    return embeds, pooled


def predict_velocity(
    transformer: SD3Transformer2DModel,
    noisy_latents: torch.Tensor,
    sigmas: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    residuals: Sequence[torch.Tensor] | None = None,
    injection: Injection = "exact",
) -> torch.Tensor:
    """v(x_t, sigma, prompt, residuals): (B,16,h,w) in the transformer's type; L residuals (B,N,D), injected exactly."""
    dtype = transformer.dtype
    blocks = len(transformer.transformer_blocks)
    return transformer(
        hidden_states=noisy_latents.to(dtype),
        timestep=sigmas * 1000,
        encoder_hidden_states=prompt_embeds.to(dtype),
        pooled_projections=pooled_prompt_embeds.to(dtype),
        block_controlnet_hidden_states=None if residuals is None else expand_residuals(residuals, blocks, injection),
        return_dict=False,
    )[0]


def masked_pixels(pixel_values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Pixels (B,3,H,W) in [-1, 1] with the hole set to -1; mask (B,1,H,W), 1 = inpaint."""
    return torch.where(mask > 0.5, -1.0, pixel_values)
