"""Poses: marks of key points. The picture is given."""

from refine_control.conditions.condition import Condition

CONDITION = Condition("pose", "key points drawn as marks")
