"""How many threads torch computes with and how they wait. No speed is asserted: what libgomp does is its manual's."""

import math
import os
import subprocess
import sys
import threading

import pytest
import torch

from refine_control import threads
from refine_control.threads import ADAPTIVE, CROWDED, FREE, SPIN_COUNT, Crowd, Policy, Threads, choose, cpu_quota


def test_the_users_environment_comes_first():
    assert choose({}, 4, math.inf, adaptive=True) == Threads(4, "CPU affinity", ADAPTIVE)
    assert choose({}, 4, 1.5, adaptive=True)[:2] == (2, "CPU quota")
    assert choose({"OMP_NUM_THREADS": "3"}, 4, 1.5, adaptive=True)[:2] == (3, "OMP_NUM_THREADS")
    assert "by default" in choose({}, 4, math.inf, adaptive=False).waiting
    for name, value in {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "7"}.items():
        assert choose({name: value}, 4, math.inf, adaptive=True).waiting == f"as {name}={value} says"


def test_a_child_process_reads_our_setting_as_ours():
    assert choose({"GOMP_SPINCOUNT": SPIN_COUNT}, 2, math.inf, adaptive=True).waiting == ADAPTIVE


def test_quotas_of_both_versions_of_control_groups(tmp_path):
    assert cpu_quota(tmp_path) == math.inf
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cpus in {"-1": math.inf, "250000": 2.5}.items():
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert cpu_quota(tmp_path) == cpus
    for quota, cpus in {"max": math.inf, "50000": 0.5}.items():
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        assert cpu_quota(tmp_path) == cpus


@pytest.mark.parametrize("environ", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}])
def test_set_up_watches_unless_the_user_chose_how_to_wait(environ):
    code = "import threading, os; from refine_control.threads import set_up; assert set_up() is set_up(); "
    code += "print(os.environ.get('GOMP_SPINCOUNT'), [t.name for t in threading.enumerate()].count('watch'))"
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", code]
    env = clean | environ | {"OMP_NUM_THREADS": "2"}
    printed = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    adaptive = not environ and threads.seconds_queued() is not None
    assert printed == [SPIN_COUNT if adaptive else str(environ.get("GOMP_SPINCOUNT")), str(int(adaptive))]


def test_threads_sleep_early_while_they_queue_and_spin_again_when_nobody_does():
    policy = Policy()
    seen = [policy.update(q, now) for now, q in enumerate((0.0, CROWDED, 1.0, 0.2, FREE, FREE / 2, CROWDED))]
    assert seen == [False, False, True, True, True, False, False]


def test_lasting_queues_are_looked_at_less_and_less():
    policy, changes = Policy(), []
    for now in range(200):
        before = policy.early
        if policy.update(1.0, now) != before:
            changes.append(now)
    rests = [end - start for start, end in zip(changes[::2], changes[1::2], strict=False)]
    assert rests[:5] == [5, 10, 20, 40, 60]


def test_a_look_that_finds_free_cores_lasts_and_the_next_queue_is_new():
    policy = Policy()
    assert policy.update(1.0, 0)
    assert not policy.update(1.0, 5)
    assert not policy.update(0.1, 50)
    assert policy.update(1.0, 60)
    assert not policy.update(1.0, 65)


def test_a_crowd_fills_libgomp_and_leaves():
    libgomp = threads.loaded_libgomp()
    assert libgomp is not None, "torch's Linux wheels bring libgomp"
    before = len(os.listdir("/proc/self/task"))
    torch.ones(100_000).sum()
    crowd = Crowd(libgomp, 3)
    crowd.arrived.wait()
    assert len(os.listdir("/proc/self/task")) == before + 3
    crowd.disperse()
    assert not crowd.thread.is_alive()


def test_the_watch_calls_a_crowd_while_threads_queue_and_sends_it_home(monkeypatch):
    events, stop = [], threading.Event()
    queues = iter([0.0, 100.0, 200.0, 200.0, 200.0])

    class Fake:
        def __init__(self, libgomp, size):
            events.append(("come", size > threads.usable_cpus()))

        def disperse(self):
            events.append("go")

    monkeypatch.setattr(threads, "Crowd", Fake)
    monkeypatch.setattr(threads, "PERIOD", 1e-3)
    monkeypatch.setattr(threads, "seconds_queued", lambda: next(queues, None))
    monkeypatch.setattr(threads, "loaded_libgomp", lambda: "libgomp.so.1")
    threads.watch(stop)
    assert events == [("come", True), "go"]


def test_torch_threads_are_restored():
    before = torch.get_num_threads()
    with threads.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with threads.torch_threads(0):
            assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
