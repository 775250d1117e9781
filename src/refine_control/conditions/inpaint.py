"""Inpainting: a photograph with a hole, which the prompt fills."""

from refine_control.conditions.condition import Condition

CONDITION = Condition("inpaint", "a photograph without the region of its mask", region=True)
