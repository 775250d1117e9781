"""FLUX.1 inpainting by a ControlNet that sees the masked picture and its mask, as alimama-creative publishes it.

Published with FLUX.1-dev-Controlnet-Inpainting-Beta: six double blocks and no single ones, trained at 1024 pixels;
control input as in `control_tokens`; 28 Euler steps, embedded guidance 3.5, conditioning scale 0.9 to 1, no true
guidance. Stock diffusers runs the transformer and its ControlNets but knows no control
input with a mask: `FluxInpaintingControlNet` is the stock one with a wider first layer.
"""

# B batch, H W pixels, h w latents, N = h w / 4 image tokens, T text tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from diffusers import FluxControlNetModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from refine_control import flow
from refine_control.conditions.condition import control_cond, masked_pixels
from refine_control.config import SamplerConfig
from refine_control.models.backbone import encode_images

MAX_SEQUENCE_LENGTH = 512
"""T5 tokens of a prompt, padding included."""


class FluxInpaintingControlNet(FluxControlNetModel):
    """A FluxControlNetModel whose control tokens carry `extra_condition_channels` numbers more: the packed mask.

    Loads the published folders as they are; their config names the width so."""

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        extra_condition_channels: int = 4,
    ):
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=list(axes_dims_rope),
        )
        self.controlnet_x_embedder = nn.Linear(in_channels + extra_condition_channels, self.inner_dim)
        nn.init.zeros_(self.controlnet_x_embedder.weight)
        nn.init.zeros_(self.controlnet_x_embedder.bias)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B,C,h,w) -> tokens (B,N,4C): a token is a 2 x 2 square, channel by channel, each row by row."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens (B,N,4C) -> (B,C,h,w): the inverse of `pack`."""
    squares = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return nn.functional.pixel_shuffle(squares, 2)


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


def position_ids(height: int, width: int) -> torch.Tensor:
    """(N,3): zero, row and column of each token of latents of size h x w."""
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()


class Condition(NamedTuple):
    """What a picture's velocity depends on beside its noisy tokens."""

    control: torch.Tensor
    """(B,N,68), of `control_tokens`."""
    prompt_embeds: torch.Tensor
    """(B,T,D_text) of T5."""
    pooled_prompt_embeds: torch.Tensor
    """(B,D_pooled) of CLIP."""
    guidance_scale: float
    """A number that a guidance-distilled network reads."""
    conditioning_scale: float
    size: tuple[int, int]
    """h w of the latents."""


def _inputs(network: Any, tokens: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> Mapping[str, Any]:
    """The inputs that transformer and ControlNet share; the guidance scale only for a network that embeds it."""
    dtype, device, batch = network.dtype, tokens.device, len(tokens)
    guidance = torch.full((batch,), condition.guidance_scale, device=device)
    return {
        "hidden_states": tokens.to(dtype),
        "timestep": sigma.to(device).expand(batch),
        "guidance": guidance if network.config["guidance_embeds"] else None,
        "encoder_hidden_states": condition.prompt_embeds.to(dtype),
        "pooled_projections": condition.pooled_prompt_embeds.to(dtype),
        "img_ids": position_ids(*condition.size).to(device),
        "txt_ids": torch.zeros(condition.prompt_embeds.shape[1], 3, device=device),
        "return_dict": False,
    }


def control_residuals(
    controlnet: FluxInpaintingControlNet, tokens: torch.Tensor, sigma: torch.Tensor, condition: Condition
) -> tuple[Any, Any]:
    """The residuals of the double and of the single blocks (None where the ControlNet has none), each (B,N,D)."""
    return cast(Any, controlnet)(
        controlnet_cond=condition.control.to(controlnet.dtype),
        conditioning_scale=condition.conditioning_scale,
        **_inputs(controlnet, tokens, sigma, condition),
    )


def predict_velocity(pipeline: Any, tokens: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
    """v (B,N,64) in fp32 for noisy tokens (B,N,64) and one sigma for all.

    Residual j of the ControlNet's L feeds the transformer's blocks i with i // ceil(blocks / L) = j: stock diffusers
    does as the published code."""
    double, single = control_residuals(pipeline.controlnet, tokens, sigma, condition)
    inputs = _inputs(pipeline.transformer, tokens, sigma, condition)
    out = pipeline.transformer(controlnet_block_samples=double, controlnet_single_block_samples=single, **inputs)
    return out[0].float()


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
