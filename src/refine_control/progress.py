"""How long work reports how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with what is done and what there is in all, and with a short note (a loss, a phase)."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None: ...
