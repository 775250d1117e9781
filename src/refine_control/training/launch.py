"""Several processes of one training on this machine, as torchrun starts them, with their exit code and one voice.

Signals are passed on, so that a run stops after one step on all processes. Where one process ends early the others are
stopped. (torchrun ends with 1 whatever its processes end with, so it is not used; it serves several machines.)
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
from typing import IO

from refine_control.errors import InvalidInputError, WorkerDiedError
from refine_control.signals import held

_PATIENCE = 30.0
"""Seconds that processes get to end by themselves after another one died."""
_POLL = 0.1
_PARENT_DEATH = 1  # prctl's PR_SET_PDEATHSIG


def launch(count: int, arguments: Sequence[str]) -> int:
    """Runs `python ARGUMENTS` in `count` processes that torch.distributed connects; the exit code of the first to fail.

    Process 0 speaks; what another one wrote to stderr is shown where it fails first. Raises WorkerDiedError when a
    process is killed, InterruptedCleanlyError when all ended after a signal."""
    threads = max(1, len(os.sched_getaffinity(0)) // count) if hasattr(os, "sched_getaffinity") else 1
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    shared |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    processes: list[subprocess.Popen[bytes]] = []
    with held("everything is saved") as stopped, tempfile.TemporaryDirectory() as folder:
        outputs = [open(os.path.join(folder, str(rank)), "w+b") for rank in range(1, count)]  # noqa: SIM115
        try:
            for rank in range(count):
                ranked = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(_start(arguments, ranked, outputs[rank - 1] if rank else None))
            return _wait(processes, stopped, outputs)
        finally:
            _end(processes)
            for file in outputs:
                file.close()


def refuse_nested(count: int) -> None:
    """Raises InvalidInputError where this process is already one of several."""
    if "RANK" in os.environ and count > 1:
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
    passed = False
    while True:
        if (number := stopped()) and not passed:
            passed = True
            for process in processes:
                process.send_signal(number)
        codes = [process.poll() for process in processes]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            break
        if None not in codes:
            return 0
        time.sleep(_POLL)
    _end([each for each in processes if each.poll() is None], _PATIENCE)
    code = codes[failed] or 0
    if failed:
        outputs[failed - 1].seek(0)
        sys.stderr.buffer.write(outputs[failed - 1].read())
    if code < 0:
        raise WorkerDiedError(
            f"process {failed} of {len(processes)} was ended by {signal.Signals(-code).name}, and the others were "
            "stopped; run the same command to continue from the last checkpoint"
        )
    return code


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
