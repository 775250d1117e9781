"""The same function on many tasks, in this process or in several, with the results in the order of the tasks."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.synchronize import Event
from typing import Protocol, TypeVar

from refine_control.errors import InterruptedCleanlyError, InvalidInputError, WorkerDiedError
from refine_control.signals import interruptible, passed_over
from refine_control.threads import set_up

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

    After SIGINT or SIGTERM no task begins; those under way end. Raises InterruptedCleanlyError then, WorkerDiedError
    when a process dies, InvalidInputError for a count below 1."""
    if count < 1:
        raise InvalidInputError(f"workers is {count}; it must be at least 1")
    with interruptible():
        if count == 1:
            yield map
        else:
            with _pool(count) as in_order:
                yield in_order


@contextlib.contextmanager
def _pool(count: int) -> Iterator[InOrder]:
    """The map over processes of their own."""
    from concurrent.futures.process import BrokenProcessPool

    # a forked child of a process with threads may hang: spawned ones start clean
    spawning = multiprocessing.get_context("spawn")
    stopped = spawning.Event()
    pool = ProcessPoolExecutor(count, spawning, _start, (stopped,))

    def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterator[Result]:
        coming = iter(tasks)
        ahead: deque[Future[Result]] = deque()
        with _interrupts_held():  # these start the workers, and an interrupt would end one that is half awake
            ahead.extend(pool.submit(_do, work, task) for task in itertools.islice(coming, _AHEAD * count))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(_do, work, task) for task in itertools.islice(coming, 1))

    try:
        yield in_order
    except BrokenProcessPool:
        raise WorkerDiedError(
            f"one of {count} worker processes died, most likely for want of memory; what is finished is kept: "
            "run the same command again, with fewer workers"
        ) from None
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():
            os.kill(child.pid or os.getpid(), signal.SIGTERM)  # passed over, except by work that a signal may end
        raise
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """SIGINT waits; processes that are started here have it held until they let it go (`_start`)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_stopped: Event | None = None
"""In a worker: set when no further task is to begin."""


def _do(work: Callable[[Task], Result], task: Task) -> Result:
    if _stopped is not None and _stopped.is_set():
        raise InterruptedCleanlyError("no task begins after a signal")
    return work(task)


def _start(stopped: Event) -> None:
    """In a new worker: signals are the parent's to handle, except in `signals.held`; without the parent it ends."""
    global _stopped  # noqa: PLW0603
    _stopped = stopped
    set_up()
    signal.signal(signal.SIGINT, passed_over)  # a terminal sends it to parent and workers; `held` leaves it so
    signal.signal(signal.SIGTERM, lambda *_: None)  # the parent sends it; `held` takes its place
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()

    def leave() -> None:
        if parent is not None:
            parent.join()  # a parent that is killed cannot send its workers home
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
