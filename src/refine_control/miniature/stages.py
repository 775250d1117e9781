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
