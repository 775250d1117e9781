"""Hyperparameters of the miniature's training stages, and their overrides on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from refine_control.errors import InvalidInputError


class Stage(NamedTuple):
    """Hyperparameters of one stage."""

    steps: int
    batch_size: int
    learning_rate: float
    ema_decay: float


STAGES = {
    "autoencoder": Stage(4000, 16, 1.5e-3, 0.999),
    "base": Stage(3600, 64, 1.2e-3, 0.998),
    "teacher": Stage(1750, 64, 1.2e-3, 0.998),
    "joint": Stage(6000, 64, 8e-4, 0.998),
}
"""Defaults of `mini train`, in the order of training: hours on two cores."""
CONDITION = Stage(2000, 32, 1.0e-3, 0.998)
"""The teacher of a condition, from the bundle's own: half an hour to an hour on one core."""
ORACLE = Stage(800, 64, 2e-3, 0.99)
"""The classifier that measures obedience, which is trained last."""


def named_stages(named: Sequence[str]) -> dict[str, Stage]:
    """The stages of a list such as `["teacher=9000"]`, with their steps; all stages for an empty list.

    Raises InvalidInputError for an unknown stage or an invalid number of steps."""
    chosen = {}
    for text in named:
        name, equals, steps = text.partition("=")
        if name not in STAGES or (equals and not (steps.isdigit() and int(steps) > 0)):
            raise InvalidInputError(f"--stage {text}: expected one of {', '.join(STAGES)}, or NAME=STEPS")
        chosen[name] = STAGES[name]._replace(steps=int(steps)) if equals else STAGES[name]
    return {name: chosen[name] for name in STAGES if name in chosen} if chosen else dict(STAGES)


def condition_stage(named: Sequence[str]) -> Stage:
    """The stage of `mini train --condition`, with the steps of a list such as `["condition=500"]`.

    Raises InvalidInputError for another stage or an invalid number of steps."""
    steps = CONDITION.steps
    for text in named:
        name, _, number = text.partition("=")
        if name != "condition" or not (number.isdigit() and int(number) > 0):
            raise InvalidInputError(f"--stage {text}: a condition is trained in one stage; give condition=STEPS")
        steps = int(number)
    return CONDITION._replace(steps=steps)
