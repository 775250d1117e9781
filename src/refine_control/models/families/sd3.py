"""SD3-medium: 24 blocks, no dual attention, no query norms. ControlNets of 23 (alimama), 12 and 6 layers (InstantX).

Also what all backbones of diffusers' SD3 classes have in common."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from refine_control.injection import diffusers_layer_of_block
from refine_control.models.families.family import Config, Family, Sites

NAME = "SD3-medium"


def is_sd3(transformer: Config) -> bool:
    """Whether a config is that of an SD3Transformer2DModel."""
    return "num_layers" in transformer and "num_single_layers" not in transformer


def matches(transformer: Config) -> bool:
    """Whether a transformer's config is of this family."""
    return is_sd3(transformer) and not transformer.get("qk_norm") and not transformer.get("dual_attention_layers")


def _stock(num_blocks: int, num_layers: int) -> list[int]:
    """The last block reads no residual."""
    return diffusers_layer_of_block(num_layers, num_blocks)[: num_blocks - 1]


def reads_pooled(controlnet: Config) -> bool:
    """Whether a ControlNet reads the prompt's pooled projection. Stock's inpainting pipeline feeds zeros; the other,
    for ControlNets that are shown no mask, does where the config has `force_zeros_for_pooled_projection`."""
    forced = controlnet.get("force_zeros_for_pooled_projection", True)
    return not forced and not controlnet.get("extra_conditioning_channels")


def takes_shift(controlnet: Config) -> bool:
    """Whether the VAE's shift is taken off the condition's latents: stock's inpainting pipeline does, the other where
    the pooled projection is read. A `condition_shift` in the config says it of a ControlNet that stock knows not."""
    stock = reads_pooled(controlnet) or bool(controlnet.get("extra_conditioning_channels"))
    return bool(controlnet.get("condition_shift", stock))


def two_streams(name: str, transformer: Config, controlnet: Config) -> Family:
    """The family of a ControlNet whose layers are the transformer's own blocks."""
    num_blocks = transformer["num_layers"]
    return Family(
        name,
        (Sites("transformer_blocks", num_blocks - 1, partial(_stock, num_blocks)),),
        pooled=reads_pooled(controlnet),
        shift=takes_shift(controlnet),
        dual_attention_layers=tuple(transformer.get("dual_attention_layers") or ()),
        qk_norm=transformer.get("qk_norm"),
    )


def differences(family: Family, controlnet: Config) -> list[str]:
    """What a ControlNet does that none known of `family`, one of SD3's classes, does, as parts of a sentence."""
    dual, norm = controlnet.get("dual_attention_layers") or (), controlnet.get("qk_norm") or None
    table, extra = controlnet.get("use_pos_embed", True), controlnet.get("extra_conditioning_channels", 0)
    outside = any(layer not in range(controlnet["num_layers"]) for layer in dual)
    facts = {
        "has single layers beside double ones": "num_single_layers" in controlnet,
        "reads no prompt": family.text and controlnet["joint_attention_dim"] is None,
        f"has {'a' if table else 'no'} table of positions": table != family.own_positions,
        f"normalises queries by {norm}": family.text and norm != family.qk_norm,
        f"has dual attention in layers {list(dual)}": outside or (dual and not family.dual_attention_layers),
        f"reads {extra} channels beside the latents": extra not in ((0, 1) if family.text else (0,)),
    }
    return [text for text, differs in facts.items() if differs]


def family(transformer: Config, controlnet: Config) -> Family:
    """The family of a ControlNet on this backbone. Finished students have even groups, so they stay so."""
    common = two_streams(NAME, transformer, controlnet)
    even = tuple(replace(sites, even=True) for sites in common.sites)
    return replace(common, sites=even, conditioning_scale=0.95)
