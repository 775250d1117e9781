"""FLUX's transformer and ControlNets as `backbone` and `controlnet` call those of SD3: latents in, latents out.

Inside, a token is a square of 2 x 2 latent pixels. The residuals of double and single layers are one sequence, double
ones first, as are the blocks that they feed (`families.family.Family.layer_of_site`). Stock diffusers knows no control
input with a mask: `FluxInpaintingControlNet` is the stock ControlNet with a wider first layer.
"""

# B batch, C channels, h w latents, N = h w / 4 image tokens, D width, T text tokens

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from refine_control.models.devices import compute_type
from refine_control.models.families import Config

MAX_SEQUENCE_LENGTH = 512
"""T5 tokens of a prompt, padding included, of FLUX.1-dev."""


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


def position_ids(height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(N,3): zero, row and column of each token of latents of size h x w."""
    sides = (torch.arange(side // 2, device=device) for side in (height, width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()


def is_flux(network: nn.Module) -> bool:
    """Whether a transformer or a ControlNet is one of FLUX's."""
    return isinstance(network, FluxTransformer2DModel | FluxControlNetModel)


def new_controlnet(config: Config, counts: Sequence[int], extra_channels: int) -> FluxControlNetModel:
    """A ControlNet of the sizes of a transformer's or ControlNet's config, untrained, with so many double and single
    layers and channels beside the latents'."""
    component: Any = FluxInpaintingControlNet if extra_channels else FluxControlNetModel
    known = component._get_init_keys(component)
    sizes = {name: value for name, value in dict(config).items() if name in known}
    sizes |= dict(zip(("num_layers", "num_single_layers"), counts, strict=True))
    return component(**sizes | ({"extra_condition_channels": 4 * extra_channels} if extra_channels else {}))


def shift_at(scheduler: Config, size: Sequence[int]) -> float:
    """The sigma shift of a scheduler with dynamic shifting for latents of size h w: the more tokens, the larger."""
    from diffusers.pipelines.flux.pipeline_flux_controlnet import calculate_shift

    ends = [scheduler[f"{which}_{what}"] for what in ("image_seq_len", "shift") for which in ("base", "max")]
    mu = calculate_shift(size[0] * size[1] // 4, *ends)
    return math.exp(mu) if scheduler.get("time_shift_type", "exponential") == "exponential" else mu


def _inputs(
    network: Any,
    noisy_latents: torch.Tensor,
    sigmas: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    guidance: float,
) -> Mapping[str, Any]:
    """The inputs that transformer and ControlNet share; the guidance scale only for a network that embeds it."""
    dtype, device, (batch, _, height, width) = compute_type(network), noisy_latents.device, noisy_latents.shape
    return {
        "hidden_states": pack(noisy_latents).to(dtype),
        "timestep": sigmas,
        "guidance": torch.full((batch,), guidance, device=device) if network.config["guidance_embeds"] else None,
        "encoder_hidden_states": prompt_embeds.to(dtype),
        "pooled_projections": pooled_prompt_embeds.to(dtype),
        "img_ids": position_ids(height, width, device),
        "txt_ids": torch.zeros(prompt_embeds.shape[1], 3, device=device),
        "return_dict": False,
    }


def control_residuals(
    controlnet: Any,
    noisy_latents: torch.Tensor,
    sigmas: torch.Tensor,
    prompt_embeds: torch.Tensor,
    cond: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    conditioning_scale: float = 1.0,
    guidance: float = 1.0,
) -> list[torch.Tensor]:
    """The residuals (B,N,D) after the zero-linears, before injection: of the double layers, then of the single ones.

    `cond` (B,C,h,w) as `control_cond` gives it, `guidance` the scale that a guidance-distilled network reads."""
    double, single = controlnet(
        controlnet_cond=pack(cond).to(compute_type(controlnet)),
        conditioning_scale=conditioning_scale,
        **_inputs(controlnet, noisy_latents, sigmas, prompt_embeds, pooled_prompt_embeds, guidance),
    )
    return [*double, *(single or ())]


def predict_velocity(
    transformer: Any,
    noisy_latents: torch.Tensor,
    sigmas: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    residuals: Sequence[torch.Tensor] | None = None,
    guidance: float = 1.0,
) -> torch.Tensor:
    """v(x_t, sigma, prompt, residuals): (B,C,h,w) in the transformer's type; one residual (B,N,D) for each block, of
    the double blocks alone or of the single ones after them, which every diffusers version injects one-to-one."""
    count = len(transformer.transformer_blocks)
    tokens = transformer(
        controlnet_block_samples=residuals and residuals[:count],
        controlnet_single_block_samples=(residuals and residuals[count:]) or None,
        **_inputs(transformer, noisy_latents, sigmas, prompt_embeds, pooled_prompt_embeds, guidance),
    )[0]
    return unpack(tokens, *noisy_latents.shape[-2:])
