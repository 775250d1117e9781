"""Depth: near is bright. The picture is given; `data build --preparer` makes it by a depth network."""

from refine_control.conditions.condition import Condition

CONDITION = Condition("depth", "a depth map, near is bright")
