"""A model that refuses one picture, or fails on it: that costs the picture and not the run.

Whether the picture is at fault is decided by a control: the same work on a plain grey picture. Where the control fails
too, the model does no work at all, and the run ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from refine_control.errors import InvalidInputError, RefineControlError
from refine_control.records import Request

CONTROL_PICTURE = np.full((224, 224, 3), 128, np.uint8)
"""(224, 224, 3) uint8."""
CONTROL = Request((CONTROL_PICTURE,), 'Name the colour of this picture as JSON: {"prompt": "..."}', whole=True)


class Unanswered(NamedTuple):
    """A question without an answer."""

    why: str
    """For `rejects.jsonl`: what the model or its server says."""
    ends_run: RefineControlError | None = None
    """Set where no other question would be answered either; then the question was not the reason."""


def fault_of_picture(error: Exception, name: str, control: Callable[[], object]) -> str:
    """Why the model `name` failed on one picture.

    Raises where `control()`, the same work on a plain picture, fails as well: InvalidInputError for a lack of memory,
    `error` itself for anything else."""
    why = "out of memory" if _out_of_memory(error) else " ".join(f"{type(error).__name__}: {error}".split())[:200]
    try:
        control()
    except Exception as again:  # libraries of models raise nearly anything
        if _out_of_memory(again):
            raise InvalidInputError(
                f"{name} does not fit into the memory, not even with one small picture; use a smaller model, or free "
                "some memory"
            ) from None
        raise error from None
    return f"{name} failed on this picture ({why})"


def _out_of_memory(error: Exception) -> bool:
    """torch.OutOfMemoryError by its name, so that torch need not be loaded here."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
