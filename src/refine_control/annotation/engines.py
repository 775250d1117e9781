"""Where the parts of a long job are done: in this process, in a pool of processes, or by the actors of a Ray cluster.

A part is picklable and gives the same result in any process, so every engine leaves the same files.
"""

from __future__ import annotations

import itertools
import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, Protocol, TypeVar, cast

from refine_control.errors import MissingError, WorkerDiedError
from refine_control.workers import workers

Part = TypeVar("Part")
MakeWorker = Callable[[], Callable[[Any], Any]]
"""Picklable; called once in every process, where it loads what the work needs."""
_WINDOW = 256
"""So many parts are handed to Ray at a time: the driver's memory does not grow with the job."""


class Engine(Protocol):
    """`engine(parts, make_worker)` -> (part, result) in any order."""

    def __call__(self, parts: Iterator[Part], make_worker: MakeWorker) -> Iterator[tuple[Part, Any]]: ...


_worker: Callable[[Any], Any] | None = None


def _run(make_worker: MakeWorker, part: Any) -> tuple[Any, Any]:
    """In a process of a pool: makes the worker for the first part and keeps it. SIGTERM ends the part under way."""
    global _worker
    between_parts = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if _worker is None:
            _worker = make_worker()
        return part, _worker(part)
    finally:
        signal.signal(signal.SIGTERM, between_parts)


def local(count: int = 1) -> Engine:
    """`count` processes of this machine; 1 is this process itself. Raises WorkerDiedError when one dies."""

    def engine(parts: Iterator[Part], make_worker: MakeWorker) -> Iterator[tuple[Part, Any]]:
        if count == 1:
            make_once = cache(make_worker)
            yield from ((part, make_once()(part)) for part in parts)
            return
        with workers(count) as in_order:
            yield from in_order(partial(_run, make_worker), parts)

    return engine


class _Actor:
    """What Ray keeps alive on a node: one worker."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self.work = make_worker()

    def __call__(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**row, "result": self.work(row["part"])}


def ray_actors(count: int, gpus: float = 0.0) -> Engine:
    """`count` actors of Ray Data with `gpus` GPUs each, on the cluster of RAY_ADDRESS, one that runs, or a new one.

    Raises MissingError without Ray, or when no cluster answers; WorkerDiedError when the work fails."""

    def engine(parts: Iterator[Part], make_worker: MakeWorker) -> Iterator[tuple[Part, Any]]:
        try:
            import ray
            import ray.data
            from ray.exceptions import RayError
        except ImportError:
            raise MissingError(
                "--engine ray needs Ray, which is not installed: pip install 'refine-control[ray]'"
            ) from None
        if not ray.is_initialized():
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise MissingError(f"no Ray cluster answers ({error}); start one with `ray start --head`") from None
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        try:
            while window := list(itertools.islice(parts, _WINDOW)):
                rows = ray.data.from_items([{"part": part} for part in window], override_num_blocks=len(window))
                actors = min(count, len(window))
                done = rows.map(
                    cast(Any, _Actor), fn_constructor_args=(make_worker,), concurrency=actors, num_gpus=gpus or None
                )
                for row in done.iter_rows():
                    yield row["part"], row["result"]
        except RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise WorkerDiedError(
                f"a Ray actor failed: {last}; what is finished is kept: correct it and run the same command again"
            ) from None

    return engine
