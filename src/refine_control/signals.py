"""SIGTERM and SIGINT end a verb with exit code 75 and a sentence, after what is under way is saved.

A long verb runs inside `interruptible()`: the first signal ends it there with InterruptedCleanlyError. Work that must
not be cut in the middle runs inside `held()`: there a signal waits for the end of the block, and a loop may ask whether
one has come. A second signal ends the process at once, by the signal's default action (128 + n in a shell).

A signal that was ignored when the process started (`nohup`, a background job of a script) stays ignored, as POSIX has
it, and a warning says so. Outside the main thread signals stay with their owner, and both blocks do nothing.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from refine_control.errors import InterruptedCleanlyError

logger = logging.getLogger(__name__)

STOPPING = (signal.SIGTERM, signal.SIGINT)
KEPT = "what is finished is kept"


def passed_over(*_: Any) -> None:
    """A handler that does nothing and that `interruptible` and `held` leave: the signal is for another process."""


class _Interrupt(KeyboardInterrupt):
    """Raised by the handler: no `except Exception` of a library stops it."""


class _Signals:
    """The first signal that came, and how many `held` blocks it waits for."""

    def __init__(self) -> None:
        self.first = self.holding = 0

    def handle(self, number: int, frame: Any) -> None:
        if self.first:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.first = number
        if not self.holding:
            raise _Interrupt

    def stopped(self, kept: str) -> InterruptedCleanlyError:
        name = signal.Signals(self.first).name
        return InterruptedCleanlyError(f"stopped by {name}; {kept}: run the same command to continue")


_installed: _Signals | None = None


@contextmanager
def _handlers() -> Iterator[_Signals]:
    """Handles the signals until the outermost block ends."""
    global _installed
    if _installed is not None:
        yield _installed
        return
    signals, previous = _Signals(), {number: signal.getsignal(number) for number in STOPPING}
    try:
        for number, handler in previous.items():
            if handler not in (signal.SIG_IGN, passed_over):
                signal.signal(number, signals.handle)
    except ValueError:  # not the main thread
        yield signals
        return
    if previous[signal.SIGINT] is signal.SIG_IGN:
        logger.warning(
            "SIGINT was ignored when this process started and stays ignored; stop it with SIGTERM: kill %d", os.getpid()
        )
    _installed = signals
    try:
        yield signals
    finally:
        _installed = None
        for number, handler in previous.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, handler)


@contextmanager
def interruptible(kept: str = KEPT) -> Iterator[None]:
    """The first SIGTERM or SIGINT ends the block, or the function that this decorates, with InterruptedCleanlyError.

    `kept` says in that error what the next run of the same command begins with. Blocks may be nested."""
    with _handlers() as signals:
        try:
            yield
        except _Interrupt:
            raise signals.stopped(kept) from None


@contextmanager
def held(kept: str = KEPT) -> Iterator[Callable[[], int]]:
    """A signal waits for the end of the block, which then raises InterruptedCleanlyError.

    Yields a callable that returns the number of the first signal received, or 0: a loop that asks it can save and
    leave early. Works without `interruptible` around it, too."""
    with _handlers() as signals:
        signals.holding += 1
        try:
            if signals.first:
                raise signals.stopped(kept)
            yield lambda: signals.first
        finally:
            signals.holding -= 1
        if signals.first and not signals.holding:
            raise signals.stopped(kept)
