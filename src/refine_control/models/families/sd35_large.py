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
    return replace(common, text=False, own_positions=False, qk_norm=None) if is_single_stream(controlnet) else common


def is_single_stream(controlnet: Config) -> bool:
    """Whether a ControlNet reads no prompt."""
    return "joint_attention_dim" in controlnet and controlnet["joint_attention_dim"] is None


def levels(controlnet: Config) -> tuple[float, float]:
    """What the VAE is given for black and white of the condition picture: -1 and 1, but for edges of a single stream
    x * 255 / 2 + 1 / 2 of x in [0, 1], which stabilityai's canny ControlNet was trained with (its model card)."""
    return (0.5, 128.0) if is_single_stream(controlnet) and controlnet.get("condition") == "canny" else (-1.0, 1.0)
