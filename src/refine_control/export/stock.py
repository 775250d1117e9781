"""Students as files that stock diffusers and ComfyUI read, and what those programs compute with them.

Both inject the residuals of L layers by rules of their own. Where a rule is not the student's, the file is refused.
It could be expanded exactly: layers that do nothing (gates of zero) between the student's own, one layer for each of
24 blocks. That costs twice a 12-layer student, more than the teacher that it was distilled from, and copies of layers
would be wrong, for layers run one after another. ONNX and OpenVINO graphs are exact for any number of layers.
"""

# B batch, h w latents, D width, L control layers, N transformer blocks

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from refine_control.errors import InvalidInputError
from refine_control.export.format import Velocity, Work
from refine_control.export.graphs import layers_of_sites
from refine_control.export.source import Source
from refine_control.injection import stock_injects_exactly
from refine_control.models.backbone import predict_velocity
from refine_control.models.controlnet import ControlNet, control_residuals
from refine_control.models.families import extra_channels
from refine_control.models.families.sd3 import reads_pooled, takes_shift
from refine_control.models.families.sd35_large import is_single_stream
from refine_control.models.loading import stock_warning

_INPUT = "pos_embed_input.proj"


def refuse_shifted(source: Source, program: str) -> None:
    """Raises InvalidInputError where diffusers' rule, which is ComfyUI's for these numbers of layers, is not the
    student's."""
    layers, blocks = len(source.controlnet.controlnet_blocks), source.backbone.num_blocks
    if source.backbone.is_flux:
        return _refuse_flux(source, program)
    if not stock_injects_exactly(layers, blocks, layers_of_sites(source.controlnet, source.backbone)):
        raise InvalidInputError(
            f"{program} injects the {layers} layers of {source.name} into other blocks than it was trained for; export "
            "it with --to onnx, which is exact for any number of layers, or train 1, 2, 3, 4, 6, 8 or 12 layers"
        )


def _refuse_flux(source: Source, program: str) -> None:
    config = source.controlnet.config
    if extra_channels(config):
        raise InvalidInputError(f"{source.name} reads a mask, and {program} has no FLUX pipeline that shows it one")
    if warning := stock_warning(config, source.backbone.num_blocks):
        raise InvalidInputError(f"{source.name}: {warning}")


def comfy_layers(num_layers: int, num_blocks: int) -> list[int]:
    """The layer of each block in ComfyUI's SD3 ControlNets: N // L in a row, the last one less."""
    rows = [layer for layer in range(num_layers) for _ in range(num_blocks // num_layers)]
    return rows[:-1]


def refuse_comfy(source: Source) -> None:
    """As `refuse_shifted`; ComfyUI also feeds every SD3 ControlNet zeros as the pooled projection."""
    refuse_shifted(source, "ComfyUI")
    if reads_pooled(source.controlnet.config) or is_single_stream(source.controlnet.config):
        raise InvalidInputError(
            f"{source.name} is of a kind that ComfyUI does not read from such a file; export it with --to diffusers"
        )


def comfy_warning(source: Source) -> str:
    """What keeps ComfyUI from running a file with the right keys; empty for models of SD3's proportions."""
    config, blocks = source.controlnet.config, source.backbone.num_blocks
    width = config["attention_head_dim"] * config["num_attention_heads"]
    if config["attention_head_dim"] == 64 and width == 64 * blocks:
        return ""
    return (
        "ComfyUI computes SD3 ControlNets with heads of 64 and a width of 64 for each block of the model; this one has "
        f"heads of {config['attention_head_dim']} and a width of {width} for {blocks} blocks: ComfyUI reads the file "
        "but cannot paint with it"
    )


def comfy_state(source: Source) -> dict[str, torch.Tensor]:
    """The student's tensors in fp16 as ComfyUI reads them: by diffusers' names.

    ComfyUI does not take the VAE's shift off the condition. Where the student expects that it is, the bias of the first
    convolution takes it up, exactly, for its kernel is its stride."""
    state = {name: value.detach().clone().float() for name, value in source.controlnet.state_dict().items()}
    if takes_shift(source.controlnet.config):
        channels = source.controlnet.config["in_channels"]
        state[f"{_INPUT}.bias"] -= shift_of(source) * state[f"{_INPUT}.weight"][:, :channels].sum((1, 2, 3))
    return {name: value.half().contiguous() for name, value in state.items()}


def shift_of(source: Source) -> float:
    """The VAE's shift in units of latents."""
    return source.backbone.vae.config["shift_factor"] * source.backbone.vae.config["scaling_factor"]


def unshifted(source: Source, cond: torch.Tensor) -> torch.Tensor:
    """control_cond (B,C,h,w) as ComfyUI feeds it."""
    if not takes_shift(source.controlnet.config):
        return cond
    channels = source.controlnet.config["in_channels"]
    return torch.cat([cond[:, :channels] + shift_of(source), cond[:, channels:]], 1)


def velocity_by(
    work: Work,
    controlnet: ControlNet,
    layers: Sequence[int],
    see: Callable[[torch.Tensor], torch.Tensor] = lambda cond: cond,
    transformer: Any = None,
) -> Velocity:
    """What a program computes with a ControlNet that it has read: `layers` is the layer of each injection site by its
    rule, `see` what it does to control_cond."""
    network = transformer or work.source.backbone.transformer

    def run(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        given = {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}
        text = given["prompt_embeds"], given["pooled_prompt_embeds"]
        asked = given["noisy_latents"], given["sigmas"]
        with torch.inference_mode():
            residuals = control_residuals(
                controlnet, *asked, text[0], see(given["control_cond"]), text[1], float(given["conditioning_scale"])
            )
            return predict_velocity(network, *asked, *text, residuals, list(layers)).float().numpy()

    return run
