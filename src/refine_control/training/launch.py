"""Several processes of one training on this machine, as torchrun starts them, with their exit code and one voice.

Signals are passed on, so that a run stops after one step on all processes. Where one process ends early the others are
stopped. Of several machines each launches its own processes. (torchrun is not used: it ends with 1 whatever its
processes end with, and kills 30 seconds after a signal those that still save.)
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import IO, NamedTuple

from refine_control.errors import InvalidInputError, WorkerDiedError
from refine_control.signals import held

_PATIENCE = 30.0
"""Seconds that processes get to end by themselves after another one died."""
_POLL = 0.1
_LOST_ANOTHER = WorkerDiedError.exit_code
_LATE = 2.0
"""Seconds that a process has to end with a code of its own after others lost it."""
_PARENT_DEATH = 1  # prctl's PR_SET_PDEATHSIG


class Nodes(NamedTuple):
    """Which of several machines this is."""

    count: int = 1
    number: int = 0
    """Of this machine, from 0."""
    master: str | None = None
    """HOST:PORT of machine 0; may be None where it is the only one."""

    def address(self) -> tuple[str, str]:
        """Host and port. Raises InvalidInputError where there is none, or no such machine."""
        if self.number >= self.count:
            raise InvalidInputError(f"--node-rank {self.number} is not below --nodes {self.count}; count from 0")
        if self.master is None and self.count > 1:
            raise InvalidInputError("--nodes needs --master HOST:PORT, the same on all machines: machine 0's")
        host, _, port = (self.master or f"127.0.0.1:{_free_port()}").rpartition(":")
        if not (host and port.isdigit()):
            raise InvalidInputError(f"--master {self.master} is not HOST:PORT, such as node-0:29500")
        return host, port


def launch(count: int, arguments: Sequence[str], nodes: Nodes = Nodes()) -> int:
    """Runs `python ARGUMENTS` in `count` processes that torch.distributed connects; the exit code of the first to fail.

    The first process speaks; what another one wrote to stderr is shown where it fails first. Raises WorkerDiedError
    when a process is killed, InterruptedCleanlyError when all ended after a signal."""
    threads = max(1, len(os.sched_getaffinity(0)) // count) if hasattr(os, "sched_getaffinity") else 1
    host, port = nodes.address()
    shared = {"MASTER_ADDR": host, "MASTER_PORT": port, "WORLD_SIZE": str(nodes.count * count)}
    shared |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    processes: list[subprocess.Popen[bytes]] = []
    with held("everything is saved") as stopped, tempfile.TemporaryDirectory() as folder:
        outputs = [open(os.path.join(folder, str(rank)), "w+b") for rank in range(1, count)]  # noqa: SIM115
        try:
            for rank in range(count):
                ranked = {**os.environ, **shared, "LOCAL_RANK": str(rank), "RANK": str(nodes.number * count + rank)}
                processes.append(_start(arguments, ranked, outputs[rank - 1] if rank else None))
            return _wait(processes, stopped, outputs)
        finally:
            _end(processes)
            for file in outputs:
                file.close()


def refuse_nested() -> None:
    """Raises InvalidInputError where this process is already one of several."""
    if "RANK" in os.environ:
        raise InvalidInputError("--nproc starts the processes itself; leave it out under torchrun, srun or the like")


def _start(arguments: Sequence[str], environment: dict[str, str], output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """A process whose words go to `output`, or where this one's go; in a session of its own: a terminal's Ctrl-C then
    reaches this process alone, which passes it on once."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], stopped: Callable[[], int], outputs: Sequence[IO[bytes]]
) -> int:
    """The exit code of the first process that fails, 0 where none does; passes a signal on once."""
    passed, since = False, 0.0
    while True:
        if (number := stopped()) and not passed:
            passed = True
            for process in processes:
                process.send_signal(number)
        codes = [process.poll() for process in processes]
        if None not in codes and not any(codes):
            return 0
        failed = _cause(codes)
        if failed is not None:
            since = since or time.monotonic()
            if codes[failed] != _LOST_ANOTHER or None not in codes or time.monotonic() - since > _LATE:
                break
        time.sleep(_POLL)
    code = codes[failed] or 0
    _end([each for each in processes if each.poll() is None], 0.0 if code == _LOST_ANOTHER else _PATIENCE)
    if failed:
        outputs[failed - 1].seek(0)
        sys.stderr.buffer.write(outputs[failed - 1].read())
    if code < 0:
        raise WorkerDiedError(
            f"process {failed} of {len(processes)} was ended by {signal.Signals(-code).name}, and the others were "
            "stopped; run the same command to continue from the last checkpoint"
        )
    return code


def _cause(codes: Sequence[int | None]) -> int | None:
    """The process whose end counts: killed ones first, those that only lost another one last. None: none failed."""
    failed = [rank for rank, code in enumerate(codes) if code]
    return min(failed, key=lambda rank: (codes[rank] == _LOST_ANOTHER, (codes[rank] or 0) > 0), default=None)


def _end(processes: Sequence[subprocess.Popen[bytes]], patience: float = 0.0) -> None:
    """Ends processes that still run: asks, then kills."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    until = time.monotonic() + patience
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(_POLL)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
