"""Several processes of a training watch each other: where one hangs or dies, all end within seconds, with its name.

Each process says in the store that connects them what it is doing, how many phases it has begun, and how much it has
computed, read and written. A process hangs where its watch falls silent (it was stopped, or its machine is gone), or
where it is furthest behind and does nothing: those ahead of it may wait for it. So no phase is too long (loading,
compiling, validation, a checkpoint) while it keeps a processor or a disk busy. The watch begins before processes are
connected, so one that never arrives is silent too. A machine of which no process has begun may start later: torch's own
time limit holds for it. What is not seen: a GPU that never finishes, for which its process waits busily; NCCL's own
watch ends that.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from torch import distributed
from torch.distributed.constants import default_pg_timeout

from refine_control.errors import InterruptedCleanlyError, WorkerDiedError

PATIENCE = 25.0
"""Seconds; with the 30 after which launchers kill a process that does not end, less than a minute."""
_ROUNDS = 20
"""Looks at all processes in this time."""
_WORKING = 0.02
"""Of the time, on one processor or on a disk of 1 MB/s: below it, a process does nothing."""


class Note(NamedTuple):
    """What a process says of itself."""

    turn: int
    """Rises while the process runs at all; 0 before it begins, negative once it has left."""
    phase: int
    """Rises with each phase that begins; all processes begin the same phases."""
    doing: str
    work: float
    """Seconds of computing and MB read and written."""


_FIRST = Note(0, 0, "starting", 0.0)
_phase = 0, "starting"


def doing(what: str) -> None:
    """Begins a phase, such as "reading the samples of step 3". All processes must begin the same phases."""
    global _phase  # noqa: PLW0603
    _phase = _phase[0] + 1, what


def _work() -> float:
    """CPU seconds of this process but for this thread's, and MB that it has read and written, where Linux counts."""
    used = time.process_time() - time.thread_time()
    try:
        counts = re.findall(r"(?:char|_bytes): (\d+)", Path("/proc/self/io").read_text())
    except OSError:
        return used
    return used + sum(map(int, counts)) / 2**20


class Judge:
    """Which processes hang, from what all of them say, look after look."""

    def __init__(self, count: int, patience: float, here: int = 0, on_machine: int = 0):
        """`here` is the process that judges, one of `on_machine` with consecutive numbers (0: all) on a machine."""
        self.patience, self.machine, self.here = patience, on_machine or count, here // (on_machine or count)
        self.last, self.marks = [_FIRST] * count, [_FIRST] * count
        self.silent, self.idle = [0.0] * count, [0.0] * count

    def expected(self, notes: Sequence[Note]) -> Set[int]:
        """Processes of other machines of which none has begun."""
        begun = {self.here, *(rank // self.machine for rank, note in enumerate(notes) if note.turn)}
        return {rank for rank in range(len(notes)) if rank // self.machine not in begun}

    def look(self, notes: Sequence[Note], seconds: float) -> list[int]:
        """The numbers of the processes that hang, `seconds` after the last look."""
        expected = self.expected(notes)
        for rank, (note, last, mark) in enumerate(zip(notes, self.last, self.marks, strict=True)):
            self.silent[rank] = 0.0 if note.turn != last.turn or rank in expected else self.silent[rank] + seconds
            moved = note.phase != mark.phase or note.work - mark.work > _WORKING * self.patience
            self.idle[rank] = 0.0 if moved or expected else self.idle[rank] + seconds
            if moved:
                self.marks[rank] = note
        self.last = list(notes)
        running = [rank for rank, note in enumerate(notes) if note.turn >= 0]
        behind = [rank for rank in running if notes[rank].phase == min(notes[each].phase for each in running)]
        if silent := [rank for rank in running if self.silent[rank] >= self.patience]:
            return silent
        return behind if all(self.idle[rank] >= self.patience for rank in behind) else []


def describe(hung: Sequence[int], notes: Sequence[Note], patience: float) -> str:
    """The sentence for people."""
    who = f"process {hung[0]} of {len(notes)} has"
    if len(hung) > 1:
        who = f"processes {', '.join(map(str, hung))} of {len(notes)} have"
    return (
        f"{who} made no progress for {patience:g} s, last seen {notes[hung[0]].doing}, and all were ended; run the "
        "same command to continue from the last checkpoint, with a longer --patience if this was only slow"
    )


class _Watch:
    """Two threads: one tells and asks the store, which may never answer; the other looks at what is known."""

    def __init__(self, patience: float):
        self.rank, self.count, self.patience = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), patience
        self.judge = Judge(self.count, patience, self.rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.period, self.left, self.ended = patience / _ROUNDS, False, threading.Event()
        self.keys = [f"watch/{rank}" for rank in range(self.count)]
        self.notes = [_FIRST] * self.count
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self._exchange, self._look)]
        for thread in self.threads:
            thread.start()

    def end(self, left: bool) -> None:
        """Ends the watch; the others miss this process, unless it `left` with its work done."""
        self.left = left
        self.ended.set()
        for thread in self.threads:
            thread.join(5.0)

    def _connect(self) -> distributed.TCPStore:
        """The store in which processes connect, of process 0 or of torchrun. Waits for it as long as torch does."""
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        shared = {"wait_for_workers": False, "multi_tenant": True}  # with the process group's own
        store = distributed.TCPStore(*address, is_master=serves, timeout=default_pg_timeout, **shared)
        store.set_timeout(timedelta(seconds=60))
        for key in self.keys:
            store.compare_set(key, "", json.dumps(_FIRST))
        return store

    def _exchange(self) -> None:
        try:
            store = self._connect()
        except distributed.DistError:  # nor will the process group connect
            return
        turn = 0
        while not self.ended.is_set() or self.left:
            turn = -1 if self.left else turn + 1
            try:
                store.set(self.keys[self.rank], json.dumps(Note(turn, *_phase, _work())))
                self.notes = [Note(*json.loads(text)) for text in store.multi_get(self.keys)]
            except distributed.DistError:  # the store is gone: `_look` sees that nothing changes
                pass
            if turn < 0:
                return
            self.ended.wait(self.period)

    def _look(self) -> None:
        judge, before = self.judge, time.monotonic()
        while not self.ended.wait(self.period):
            # a pause of the whole machine is not counted
            now = time.monotonic()
            hung, before = judge.look(notes := self.notes, min(now - before, 2 * self.period)), now
            if self.rank in hung and judge.silent[self.rank] >= self.patience:
                # the store of process 0 does not answer
                hung = [0] if notes[0].turn >= 0 and 0 not in judge.expected(notes) else []
            if hung:
                self._leave(hung, notes)

    def _leave(self, hung: Sequence[int], notes: Sequence[Note]) -> None:
        """Ends this process from a thread, because its main thread waits; the first that does not hang speaks."""
        speaker = next((rank for rank in range(self.count) if rank not in hung and notes[rank].turn >= 0), hung[0])
        if self.rank == speaker:
            print(f"refine-control: {describe(hung, notes, self.patience)}", file=sys.stderr, flush=True)
        elif self.ended.wait(2 * self.period):
            return  # the main thread ends: the speaker's leaving woke it
        os._exit(WorkerDiedError.exit_code)


@contextmanager
def watched(patience: float = PATIENCE) -> Iterator[None]:
    """Where several processes are to train, ends them all `patience` seconds after one of them hangs or dies.

    To be entered before they are connected.

    Ends the process with the exit code of WorkerDiedError; raises that where a message between processes fails."""
    if not distributed.is_available() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    watch, left = _Watch(patience), False
    try:
        yield
        left = True
    except InterruptedCleanlyError:
        left = True
        raise
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise WorkerDiedError(
            f"process {watch.rank} of {watch.count} lost another one while {_phase[1]}; "
            "run the same command to continue from the last checkpoint"
        ) from error
    finally:
        watch.end(left)
        if not left and distributed.is_initialized() and distributed.get_backend() == "nccl":
            # NCCL leaves a group together: this process would wait for the others, which wait for it
            distributed.distributed_c10d._abort_process_group()
