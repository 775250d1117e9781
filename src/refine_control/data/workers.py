"""The same function on many tasks, in this process or in several, with the results in the order of the tasks."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Protocol, TypeVar

from refine_control.errors import InvalidInputError, WorkerDiedError

Task = TypeVar("Task")
Result = TypeVar("Result")
_AHEAD = 4
"""Tasks for each process that are under way or wait for their turn: what is held does not grow with the job."""


class InOrder(Protocol):
    """`in_order(work, tasks)`: the results one by one; several processes need a picklable `work`."""

    def __call__(self, work: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterator[Result]: ...


@contextlib.contextmanager
def workers(count: int) -> Iterator[InOrder]:
    """Yields a map over `count` processes; 1 is this process itself.

    Raises WorkerDiedError when a process dies, InvalidInputError for a count below 1."""
    if count < 1:
        raise InvalidInputError(f"workers is {count}; it must be at least 1")
    if count == 1:
        yield map
        return
    import multiprocessing
    from concurrent.futures.process import BrokenProcessPool

    # a forked child of a process with threads may hang: spawned ones start clean
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _start)

    def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterator[Result]:
        coming = iter(tasks)
        ahead: deque[Future[Result]] = deque(
            pool.submit(work, task) for task in itertools.islice(coming, _AHEAD * count)
        )
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(work, task) for task in itertools.islice(coming, 1))

    try:
        yield in_order
    except BrokenProcessPool:
        raise WorkerDiedError(
            f"one of {count} worker processes died, most likely for want of memory; what is finished is kept: "
            "run the same command again, with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    """In a new worker: an interrupt is the parent's to handle, and without the parent there is nothing to do."""
    import multiprocessing
    import os
    import signal
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def leave() -> None:
        if parent is not None:
            parent.join()  # a parent that is killed cannot send its workers home
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
