"""SD3-medium: 24 blocks, neither dual attention nor query norms. ControlNets of 23 (alimama), 12 and 6 (InstantX) layers.

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


def two_streams(name: str, transformer: Config, controlnet: Config) -> Family:
    """The family of a ControlNet whose layers are the transformer's own blocks.

    Stock's inpainting pipeline feeds zeros for the pooled projection and takes the VAE's shift off; the other reads
    `force_zeros_for_pooled_projection`, which means zeros and no shift. A config may state `condition_shift`."""
    num_blocks, zero = transformer["num_layers"], controlnet.get("force_zeros_for_pooled_projection", True)
    inpaints = bool(controlnet.get("extra_conditioning_channels"))
    return Family(
        name,
        (Sites("transformer_blocks", num_blocks - 1, partial(_stock, num_blocks)),),
        pooled=not zero and not inpaints,
        shift=controlnet.get("condition_shift", inpaints or not zero),
        dual_attention_layers=tuple(transformer.get("dual_attention_layers") or ()),
        qk_norm=transformer.get("qk_norm"),
    )


def differences(family: Family, controlnet: Config) -> list[str]:
    """How a ControlNet differs from all that are known of SD3's classes and `family`, as parts of a sentence."""
    layers, dual = controlnet["num_layers"], controlnet.get("dual_attention_layers") or ()
    facts = {
        "reads no prompt": (controlnet["joint_attention_dim"] is not None) != family.text and family.text,
        "reads the prompt": (controlnet["joint_attention_dim"] is not None) != family.text and not family.text,
        "has no table of positions": not controlnet.get("use_pos_embed", True) and family.own_positions,
        "has a table of positions": controlnet.get("use_pos_embed", True) and not family.own_positions,
        f"normalises queries by {controlnet.get('qk_norm')}": family.text
        and (controlnet.get("qk_norm") or None) != family.qk_norm,
        f"has dual attention in layers {list(dual)}": any(layer not in range(layers) for layer in dual)
        or bool(dual and not family.dual_attention_layers),
        f"reads {controlnet.get('extra_conditioning_channels')} channels beside the latents": controlnet.get(
            "extra_conditioning_channels", 0
        )
        not in ((0, 1) if family.text else (0,)),
    }
    return [text for text, differs in facts.items() if differs]


def family(transformer: Config, controlnet: Config) -> Family:
    """The family of a ControlNet on this backbone. Finished students have even groups, so they stay so."""
    found = two_streams(NAME, transformer, controlnet)
    return replace(found, sites=tuple(replace(sites, even=True) for sites in found.sites))
