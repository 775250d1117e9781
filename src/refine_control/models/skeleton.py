"""A model without its weights: networks of its configs on the meta device, where shapes can be counted.

A folder's configs are read as the loader reads them; those of SD3 and its published teacher are known here, so that a
run can be planned before gigabytes are fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
)

from refine_control.folders import A_CONTROLNET, refuse_other_kind
from refine_control.models.backbone import Backbone
from refine_control.models.card import CARD
from refine_control.models.components import read_config, read_json
from refine_control.models.controlnet import ADDED_OPTIONS, join
from refine_control.models.families import Config
from refine_control.models.fit import check_controlnet
from refine_control.models.loading import SD3_MAX_SEQUENCE_LENGTH, read_index, resolve

SD3, SD3_TEACHER = "stabilityai/stable-diffusion-3-medium-diffusers", "alimama-creative/SD3-Controlnet-Inpainting"
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
PUBLISHED: dict[str, dict[str, Config]] = {
    SD3: {
        "scheduler": {"shift": 3.0},
        "transformer": {**_WIDTHS, "num_layers": 24},
        "vae": _VAE,
        "text_encoder": {
            **_CLIP,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
        "text_encoder_2": {
            **_CLIP,
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
        },
        "text_encoder_3": {
            "vocab_size": 32128,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
        },
    },
    SD3_TEACHER: {"controlnet": {**_WIDTHS, "num_layers": 23, "extra_conditioning_channels": 1}},
}
"""By hub id and component, the options of the published configs."""


def read_configs(name: str | Path) -> Mapping[str, Config]:
    """The configs of a model's components: as published, or as its folder has them."""
    if str(name) in PUBLISHED:
        return PUBLISHED[str(name)]
    folder = resolve(name)
    index = read_index(folder)
    parts = ["scheduler", "transformer", "vae", *(f"text_encoder{each}" for each in ("", "_2", "_3")), "controlnet"]
    files = {"scheduler": "scheduler_config.json"}
    configs = {
        part: read_json(folder / part / files.get(part, "config.json"), "fetch or copy the whole model")
        for part in parts
        if index[part]
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
    return dict(read_config(SD3ControlNetModel, folder))


def _text_encoder(name: str, config: Config) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    if name == "text_encoder_3":
        return T5EncoderModel(T5Config(**config))
    return CLIPTextModelWithProjection(CLIPTextConfig(**config))


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
    names = (f"text_encoder{suffix}" for suffix in ("", "_2", "_3"))
    with torch.device("meta"):
        encoders = {name: _text_encoder(name, configs[name]) if name in configs else None for name in names}
    with torch.device(device):
        transformer: Any = SD3Transformer2DModel.from_config(dict(configs["transformer"]))
        vae = AutoencoderKL.from_config(dict(configs["vae"]))
        controlnet: Any = None
        if controlled and control is not None:
            check_controlnet(control, transformer.config, teacher or model)
            controlnet = SD3ControlNetModel.from_config(dict(control))
            controlnet.register_to_config(
                **{key: control[key] for key in ADDED_OPTIONS if control.get(key) is not None}
            )
            join(controlnet, transformer)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(configs["scheduler"]))
    tokenizers: dict[str, Any] = dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    parts: dict[str, Any] = {"scheduler": scheduler, "transformer": transformer, "vae": vae, "controlnet": controlnet}
    pipeline = StableDiffusion3ControlNetInpaintingPipeline(**parts, **encoders, **tokenizers)
    length = configs.get("card", {}).get("max_sequence_length", SD3_MAX_SEQUENCE_LENGTH)
    return Backbone(pipeline, length)


def text_tokens(backbone: Backbone) -> int:
    """T, tokens of a prompt as the transformer reads them: CLIP's, and those of T5 or the zeros in their place."""
    return backbone.pipeline.text_encoder.config.max_position_embeddings + backbone.max_sequence_length
