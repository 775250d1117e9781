"""A model without its weights: networks of its configs on the meta device, where shapes can be counted.

A folder's configs are read as the loader reads them; those of SD3, FLUX and their inpainting teachers are known here,
so that a run can be planned before gigabytes are fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
)

from refine_control.folders import A_CONTROLNET, refuse_other_kind
from refine_control.models.backbone import Backbone
from refine_control.models.card import CARD
from refine_control.models.components import read_config, read_json
from refine_control.models.controlnet import ADDED_OPTIONS, join
from refine_control.models.families import Config, flux
from refine_control.models.fit import check_controlnet
from refine_control.models.flux import MAX_SEQUENCE_LENGTH, FluxInpaintingControlNet
from refine_control.models.loading import SD3_MAX_SEQUENCE_LENGTH, controlnet_class, read_index, resolve

SD3, SD3_TEACHER = "stabilityai/stable-diffusion-3-medium-diffusers", "alimama-creative/SD3-Controlnet-Inpainting"
FLUX, FLUX_TEACHER = "black-forest-labs/FLUX.1-dev", "alimama-creative/FLUX.1-dev-Controlnet-Inpainting-Beta"
SD35M, SD35M_TEACHER = "stabilityai/stable-diffusion-3.5-medium", "tensorart/SD3.5M-Controlnet-Canny"
_FLUX_WIDTHS: Config = {
    "patch_size": 1,
    "in_channels": 64,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
_WIDTHS: Config = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
_MEDIUM: Config = {**_WIDTHS, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": range(13)}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2}
_CLIP_L = {
    **_CLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_G = {
    **_CLIP,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_T5 = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_SD3: dict[str, Config] = {
    "scheduler": {"shift": 3.0},
    "vae": _VAE,
    "text_encoder": _CLIP_L,
    "text_encoder_2": _CLIP_G,
    "text_encoder_3": _T5,
}
PUBLISHED: dict[str, dict[str, Config]] = {
    SD3: {**_SD3, "transformer": {**_WIDTHS, "num_layers": 24}},
    SD3_TEACHER: {"controlnet": {**_WIDTHS, "num_layers": 23, "extra_conditioning_channels": 1}},
    SD35M: {**_SD3, "transformer": {**_MEDIUM, "num_layers": 24}},
    SD35M_TEACHER: {"controlnet": {**_MEDIUM, "num_layers": 23}},
    FLUX: {
        "scheduler": {"shift": 3.0, "use_dynamic_shifting": True},
        "transformer": {**_FLUX_WIDTHS, **flux.BLOCKS},
        "vae": {**_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _T5,
    },
    FLUX_TEACHER: {
        "controlnet": {**_FLUX_WIDTHS, "num_layers": 6, "num_single_layers": 0, "extra_condition_channels": 4}
    },
}
"""By hub id and component, the options of the published configs."""


def read_configs(name: str | Path) -> Mapping[str, Config]:
    """The configs of a model's components: as published, or as its folder has them."""
    if str(name) in PUBLISHED:
        return PUBLISHED[str(name)]
    folder = resolve(name)
    _, index = read_index(folder)
    files = {"scheduler": "scheduler_config.json"}
    configs = {
        part: read_json(folder / part / files.get(part, "config.json"), "fetch or copy the whole model")
        for part, component in index.items()
        if component and not part.startswith("tokenizer")
    }
    card = folder / CARD
    length = read_json(card, "").get("max_sequence_length") if card.is_file() else None
    return {**configs, **({"card": {"max_sequence_length": length}} if length is not None else {})}


def _controlnet(name: str | Path) -> Config:
    """The config of a ControlNet named by a hub id or a folder."""
    if str(name) in PUBLISHED and "controlnet" in PUBLISHED[str(name)]:
        return PUBLISHED[str(name)]["controlnet"]
    folder = resolve(name)
    refuse_other_kind(folder, A_CONTROLNET)
    return dict(read_config(controlnet_class(folder), folder))


def _text_encoder(config: Config, packed: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    if "d_model" in config:
        return T5EncoderModel(T5Config(**config))
    return (CLIPTextModel if packed else CLIPTextModelWithProjection)(CLIPTextConfig(**config))


def skeleton(
    model: str | Path,
    teacher: str | Path | None = None,
    controlled: bool = True,
    device: torch.device | str = "meta",
) -> Backbone:
    """The frozen parts of a model on the meta device, with the teacher's ControlNet or its own; unless `controlled`
    with none. It has no tokenizers. On another `device` the weights, but those of the text encoders, are drawn at
    random in torch's default type.

    Raises what the loaders raise for configs that are not there or do not fit."""
    configs = read_configs(model)
    control = _controlnet(teacher) if teacher else configs.get("controlnet")
    packed = flux.matches(configs["transformer"])
    pipeline: Any = FluxControlNetPipeline if packed else StableDiffusion3ControlNetInpaintingPipeline
    component: Any = FluxTransformer2DModel if packed else SD3Transformer2DModel
    suffixes, parts = ("", "_2") if packed else ("", "_2", "_3"), dict[str, Any]()
    with torch.device("meta"):
        for name in (f"text_encoder{suffix}" for suffix in suffixes):
            parts[name] = _text_encoder(configs[name], packed) if name in configs else None
    with torch.device(device):
        parts["transformer"] = component.from_config(dict(configs["transformer"]))
        parts["vae"] = AutoencoderKL.from_config(dict(configs["vae"]))
        parts["controlnet"] = None
        if controlled and control is not None:
            check_controlnet(control, parts["transformer"].config, teacher or model)
            wide = control.get("extra_condition_channels")
            kind: Any = (FluxInpaintingControlNet if wide else FluxControlNetModel) if packed else SD3ControlNetModel
            parts["controlnet"] = kind.from_config(dict(control))
            added = {key: control[key] for key in ADDED_OPTIONS if control.get(key) is not None}
            parts["controlnet"].register_to_config(**added)
            join(parts["controlnet"], parts["transformer"])
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_config(dict(configs["scheduler"]))
    parts |= {f"tokenizer{suffix}": None for suffix in suffixes}
    usual = MAX_SEQUENCE_LENGTH if packed else SD3_MAX_SEQUENCE_LENGTH
    return Backbone(pipeline(**parts), configs.get("card", {}).get("max_sequence_length", usual))


def text_tokens(backbone: Backbone) -> int:
    """T, tokens of a prompt as the transformer reads them: T5's or the zeros in their place, in SD3 after CLIP's."""
    clip = 0 if backbone.is_flux else backbone.pipeline.text_encoder.config.max_position_embeddings
    return clip + backbone.max_sequence_length
