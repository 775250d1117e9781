"""Options in the config of a ControlNet that stock diffusers does not know and leaves alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refine_control.records import INPAINT

CONDITION = "condition"
"""The kind of condition that it takes, where it is not inpainting."""


def own_condition(controlnet: Mapping[str, Any]) -> str | None:
    """The kind of condition that a ControlNet of this config takes; None where it does not say."""
    return controlnet.get(CONDITION) or (INPAINT if controlnet["extra_conditioning_channels"] == 1 else None)
