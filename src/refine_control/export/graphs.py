"""The networks of a pipeline as functions of named tensors: what each graph of an export computes.

The conventions of the pipeline are inside: the posterior's mean and its normalisation, the layer that feeds each
injection site, and the pooled projection or zeros that a ControlNet reads. `runtime/` only joins the text encoders'
results and steps along the noise levels.
"""

# B batch, H W pixels, h w latents, T text tokens, N image tokens, D width, L control layers

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from refine_control.injection import Injection
from refine_control.models.backbone import Backbone, decode_latents, encode_images, predict_velocity
from refine_control.models.controlnet import ControlNet, control_residuals, equal_layer_of_site, injection_of
from refine_control.models.families import Encoding, condition_encoding

CONTROLNET_INPUTS = (
    "noisy_latents",
    "control_cond",
    "prompt_embeds",
    "pooled_prompt_embeds",
    "sigmas",
    "conditioning_scale",
)
"""Of the denoiser, too."""
VELOCITY = "velocity"
DENOISING = ("denoiser", "controlnet", "transformer")
"""The parts that run in every step."""


class Graph(NamedTuple):
    """A network to export."""

    network: nn.Module
    example: Mapping[str, Any]
    """Its inputs by name, of two samples, as tensors or a list of them."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Clip(nn.Module):
    """input_ids (B,T) -> penultimate hidden state (B,T,D), projected pooled state (B,P), as `encode_prompt` does."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = self.encoder(input_ids, output_hidden_states=True)
        return result.hidden_states[-2], result[0]


class T5Graph(nn.Module):
    """input_ids (B,T) -> hidden state (B,T,D)."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_ids)[0]


class _VaeEncoder(nn.Module):
    """Pixels (B,3,H,W) in [-1, 1] -> latents (B,16,h,w) of the condition, in its levels, the shift taken off where it
    is."""

    def __init__(self, vae: nn.Module, encoding: Encoding):
        super().__init__()
        self.vae, self.encoding = vae, encoding

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return encode_images(self.vae, self.encoding.pixels(pixel_values), self.encoding.shift)


class _VaeDecoder(nn.Module):
    """Latents (B,16,h,w) -> pixels (B,3,H,W), about [-1, 1]."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_latents(self.vae, latents)


class ControlNetGraph(nn.Module):
    """-> the L scaled residuals (B,N,D), before injection."""

    def __init__(self, controlnet: ControlNet):
        super().__init__()
        self.controlnet = controlnet

    def forward(
        self,
        noisy_latents: torch.Tensor,
        control_cond: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
        sigmas: torch.Tensor,
        conditioning_scale: Any,
    ) -> tuple[torch.Tensor, ...]:
        for axis in (2, 3):  # or the exporter would carry two heights and two widths through every layer
            torch._check(control_cond.shape[axis] == noisy_latents.shape[axis])
        asked = noisy_latents, sigmas, prompt_embeds, control_cond, pooled_prompt_embeds, conditioning_scale
        return tuple(control_residuals(self.controlnet, *asked))


class _Transformer(nn.Module):
    """-> velocity (B,16,h,w); `residuals` are those of the N - 1 injection sites."""

    def __init__(self, transformer: Any):
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        noisy_latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
        sigmas: torch.Tensor,
        residuals: list[torch.Tensor],
    ) -> torch.Tensor:
        asked = noisy_latents, sigmas, prompt_embeds, pooled_prompt_embeds
        return predict_velocity(self.transformer, *asked, residuals, list(range(len(residuals))))


class Denoiser(nn.Module):
    """One evaluation of ControlNet and transformer -> velocity (B,16,h,w); exact for any number of layers."""

    def __init__(self, controlnet: ControlNet, transformer: Any):
        super().__init__()
        self.control, self.transformer = ControlNetGraph(controlnet), transformer
        self.injection: Injection | Sequence[int] = injection_of(controlnet)

    def forward(
        self,
        noisy_latents: torch.Tensor,
        control_cond: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
        sigmas: torch.Tensor,
        conditioning_scale: Any,
    ) -> torch.Tensor:
        asked = noisy_latents, sigmas, prompt_embeds, pooled_prompt_embeds
        residuals = self.control(
            noisy_latents, control_cond, prompt_embeds, pooled_prompt_embeds, sigmas, conditioning_scale
        )
        return predict_velocity(self.transformer, *asked, residuals, self.injection)


def layers_of_sites(controlnet: ControlNet, backbone: Backbone) -> list[int]:
    """The layer that feeds each injection site of the transformer."""
    injection = injection_of(controlnet)
    if isinstance(injection, list):
        return injection
    return equal_layer_of_site([len(controlnet.controlnet_blocks)], backbone.transformer)


def denoiser(backbone: Backbone, controlnet: ControlNet) -> Denoiser:
    """ControlNet and transformer as one network."""
    return Denoiser(controlnet, backbone.transformer).eval()


def example_inputs(backbone: Backbone, controlnet: ControlNet) -> dict[str, torch.Tensor]:
    """Random inputs of the denoiser, of two samples at the model's own size."""
    config = backbone.transformer.config
    side = backbone.geometry.side // backbone.pipeline.vae_scale_factor
    channels, tokens = config["in_channels"], backbone.pipeline.tokenizer_max_length + backbone.max_sequence_length
    shapes = {
        "noisy_latents": (channels, side, side),
        "control_cond": (channels + controlnet.config["extra_conditioning_channels"], side, side),
        "prompt_embeds": (tokens, config["joint_attention_dim"]),
        "pooled_prompt_embeds": (config["pooled_projection_dim"],),
    }
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(2, *shape, generator=generator) for name, shape in shapes.items()}
    return {**drawn, "sigmas": torch.tensor([0.4, 0.9]), "conditioning_scale": torch.tensor(1.0)}


def denoising_graphs(backbone: Backbone, controlnet: ControlNet, separate: bool = False) -> dict[str, Graph]:
    """What runs in every step: one graph, or the ControlNet and the transformer by themselves."""
    example = example_inputs(backbone, controlnet)
    if not separate:
        whole = denoiser(backbone, controlnet)
        return {"denoiser": Graph(whole, example, CONTROLNET_INPUTS, (VELOCITY,))}
    control, layers = ControlNetGraph(controlnet).eval(), layers_of_sites(controlnet, backbone)
    with torch.no_grad():
        residuals = control(**example)
    text = ("noisy_latents", "prompt_embeds", "pooled_prompt_embeds", "sigmas")
    given = {**{name: example[name] for name in text}, "residuals": [residuals[layer].clone() for layer in layers]}
    names = tuple(f"residual_{site}" for site in range(len(layers)))
    return {
        "controlnet": Graph(control, example, CONTROLNET_INPUTS, names[: len(residuals)]),
        "transformer": Graph(_Transformer(backbone.transformer).eval(), given, (*text, *names), (VELOCITY,)),
    }


def frame_graphs(backbone: Backbone, controlnet: ControlNet) -> dict[str, Graph]:
    """What runs once for each picture: text encoders and VAE."""
    pipeline, side = backbone.pipeline, backbone.geometry.side
    ids = torch.zeros(2, pipeline.tokenizer_max_length, dtype=torch.int64)
    graphs = {
        name: Graph(_Clip(getattr(pipeline, name)), {"input_ids": ids}, ("input_ids",), ("hidden", "pooled"))
        for name in ("text_encoder", "text_encoder_2")
    }
    if pipeline.text_encoder_3 is not None:
        example = {"input_ids": torch.zeros(2, backbone.max_sequence_length, dtype=torch.int64)}
        graphs["text_encoder_3"] = Graph(T5Graph(pipeline.text_encoder_3), example, ("input_ids",), ("hidden",))
    pixels = torch.linspace(-1, 1, 2 * 3 * side * side).reshape(2, 3, side, side)
    latents = example_inputs(backbone, controlnet)["noisy_latents"]
    encoder = _VaeEncoder(backbone.vae, condition_encoding(controlnet.config))
    graphs["vae_encoder"] = Graph(encoder, {"pixel_values": pixels}, ("pixel_values",), ("latents",))
    graphs["vae_decoder"] = Graph(_VaeDecoder(backbone.vae), {"latents": latents}, ("latents",), ("pixel_values",))
    return {name: graph._replace(network=graph.network.eval()) for name, graph in graphs.items()}
