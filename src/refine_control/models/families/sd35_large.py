"""SD3.5-large: 38 blocks with query norms. ControlNets of 19 layers of a single stream (stabilityai), or of its own
blocks."""

from __future__ import annotations

from dataclasses import replace

from refine_control.models.families.family import Config, Family
from refine_control.models.families.sd3 import differences, is_sd3, two_streams

__all__ = ["differences", "family", "matches"]
NAME = "SD3.5-large"


def matches(transformer: Config) -> bool:
    """Whether a transformer's config is of this family."""
    dual = bool(transformer.get("dual_attention_layers"))
    return is_sd3(transformer) and not dual and transformer.get("qk_norm") == "rms_norm"


def family(transformer: Config, controlnet: Config) -> Family:
    """The family of a ControlNet on this backbone: a single stream reads no prompt and the transformer's positions."""
    common = two_streams(NAME, transformer, controlnet)
    single = "joint_attention_dim" in controlnet and controlnet["joint_attention_dim"] is None
    return replace(common, text=False, own_positions=False, qk_norm=None) if single else common
