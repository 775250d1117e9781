"""SD3.5-medium: 24 blocks, dual attention in the first 13, query norms. ControlNets of 23 layers (tensorart)."""

from __future__ import annotations

from dataclasses import replace

from refine_control.models.families.family import Config, Family
from refine_control.models.families.sd3 import differences, is_sd3, two_streams

__all__ = ["differences", "family", "matches"]
NAME = "SD3.5-medium"


def matches(transformer: Config) -> bool:
    """Whether a transformer's config is of this family."""
    dual = bool(transformer.get("dual_attention_layers"))
    return is_sd3(transformer) and dual and transformer.get("qk_norm") == "rms_norm"


def family(transformer: Config, controlnet: Config) -> Family:
    """The family of a ControlNet on this backbone."""
    return replace(two_streams(NAME, transformer, controlnet), conditioning_scale=0.8)
