"""Which process hangs, from what all of them say of themselves."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from torch import distributed

from refine_control.errors import WorkerDiedError
from refine_control.training import watch
from refine_control.training.watch import Judge, Note, describe


class Processes:
    """Three processes that a judge with a patience of 10 seconds looks at once a second."""

    def __init__(self):
        self.notes = [Note(1, 5, "computing", 0.0)] * 3
        self.judge = Judge(3, 10)

    def hung(self, seconds, works=(), silent=()):
        """Who hangs after so many seconds in which some work; those that are not silent say that they are there."""
        for _ in range(seconds):
            for rank, note in enumerate(self.notes):
                turn = note.turn if rank in silent or note.turn < 0 else note.turn + 1
                self.notes[rank] = note._replace(turn=turn, work=note.work + 0.03 * (rank in works))
            if hung := self.judge.look(self.notes, 1.0):
                return hung
        return []

    def put(self, rank, **values):
        self.notes[rank] = self.notes[rank]._replace(**values)


def test_a_process_that_falls_silent_hangs_whatever_the_others_do():
    processes = Processes()
    assert processes.hung(9, works=[0, 1, 2]) == []
    assert processes.hung(9, works=[0, 1], silent=[2]) == []
    assert processes.hung(1, works=[0, 1], silent=[2]) == [2]


def test_a_process_that_has_left_is_not_missed():
    processes = Processes()
    processes.put(2, turn=-1)
    assert processes.hung(60, works=[0, 1], silent=[2]) == []
    processes.put(1, turn=-1)
    assert processes.hung(60, works=[0], silent=[1, 2]) == []


@pytest.mark.parametrize("phase", [5, 6], ids=["in the same phase", "in a later phase"])
def test_others_may_wait_for_one_that_works(phase):
    processes = Processes()
    processes.put(1, phase=phase)
    processes.put(2, phase=phase)
    assert processes.hung(60, works=[0]) == []
    assert processes.hung(11) == ([0, 1, 2] if phase == 5 else [0])


def test_the_one_that_is_behind_hangs_where_the_others_are_busy_with_waiting():
    processes = Processes()
    processes.put(0, phase=6)
    processes.put(2, phase=6)
    assert processes.hung(9, works=[0, 2]) == []
    assert processes.hung(3, works=[0, 2]) == [1]


def test_phases_that_pass_are_progress():
    processes = Processes()
    for phase in range(6, 12):
        for rank in range(3):
            processes.put(rank, phase=phase)
        assert processes.hung(9) == []


def test_what_threads_in_the_background_compute_is_no_progress():
    processes = Processes()
    for _ in range(8):
        processes.put(1, work=processes.notes[1].work + 0.02)
        processes.hung(1)
    assert processes.hung(4) == [0, 1, 2]


def test_processes_of_a_machine_that_has_not_started_are_waited_for():
    judge, notes = Judge(4, 10, here=0, on_machine=2), [Note(0, 0, "starting", 0.0)] * 4

    def hung(seconds):
        for _ in range(seconds):
            notes[0] = notes[0]._replace(turn=notes[0].turn + 1)
            if hung := judge.look(notes, 1.0):
                return hung
        return []

    notes[1] = Note(-1, 0, "starting", 0.0)
    assert hung(60) == []
    notes[2] = Note(1, 0, "starting", 0.0)
    assert hung(9) == []
    assert hung(1) == [3], "its machine has begun"
    assert Judge(4, 10, here=2, on_machine=2).expected([Note(0, 0, "", 0.0)] * 4) == {0, 1}


def test_the_sentence_names_the_process_and_its_last_phase():
    notes = [Note(1, 6, "saving", 0.0), Note(1, 5, "reading the samples of step 3", 0.0)]
    assert "process 1 of 2 has made no progress for 25 s, last seen reading the" in describe([1], notes, 25.0)
    assert "processes 0, 1 of 2 have made" in describe([0, 1], notes, 25.0)


def test_computing_and_reading_are_work(tmp_path):
    (tmp_path / "file").write_bytes(bytes(2**21))
    before = watch._work()
    assert (tmp_path / "file").read_bytes()
    assert watch._work() - before > 1.9


@pytest.mark.parametrize("left", [True, False], ids=["done", "with an error"])
def test_a_process_says_that_it_leaves_only_where_its_work_is_done(monkeypatch, left):
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with nullcontext() if left else pytest.raises(KeyError), watch.watched(600.0):
        watch.doing("loading the networks")
        if not left:
            raise KeyError
    turn, _, said, _ = json.loads(store.get("watch/1"))
    assert (turn < 0) == left
    assert said == "loading the networks" or not left
    assert json.loads(store.get("watch/0"))[0] == 0  # not there yet


@pytest.mark.parametrize(("backend", "aborted"), [("nccl", 3), ("gloo", 0)])
def test_a_lost_connection_is_a_process_that_died_and_other_errors_stay(monkeypatch, backend, aborted):
    aborts = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(distributed.distributed_c10d, "_abort_process_group", lambda: aborts.append(1))
    monkeypatch.setattr(watch, "_Watch", lambda patience: SimpleNamespace(rank=0, count=2, end=lambda left: None))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for error in (RuntimeError("[third_party/gloo/pair.cc:1] closed by peer"), distributed.DistBackendError("NCCL")):
        with pytest.raises(WorkerDiedError, match="process 0 of 2 lost another one while"), watch.watched():
            raise error
    with pytest.raises(RuntimeError, match="out of memory"), watch.watched():
        raise RuntimeError("out of memory")
    with watch.watched():
        pass
    assert len(aborts) == aborted  # never where all has gone well
