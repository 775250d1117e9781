"""Instructed editing: a picture and, as the prompt, what to change in it. The source picture is given."""

from refine_control.conditions.condition import Condition

CONDITION = Condition("edit", "the picture to edit; the prompt is the instruction", photographic=True)
