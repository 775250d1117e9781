"""How many threads torch computes with on a CPU, and how they wait for each other.

libgomp, the OpenMP runtime of torch's Linux wheels, lets a thread spin before it sleeps. On an idle machine that is
the fastest way to wait. Where other processes want the same cores, a spinning thread holds the core that the thread
it waits for needs, and everybody gets slower by orders of magnitude. libgomp spins 100 times only while it manages
more threads than there are CPUs; `watch` brings that about, with threads that sleep, for as long as this process
queues for cores. The number of threads that compute never depends on the load: results depend on it in the last bits.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SPIN_COUNT = "30000"
"""Turns a thread spins before it sleeps, about 2 ms: as fast as libgomp's own 300,000 on an idle machine."""
PERIOD = 0.25
"""Seconds between two looks at the queues."""
CROWDED, FREE = 0.4, 0.15
"""Threads of this process that wait for a core, on average over a period: above, sleep early; below, spin again."""
REST = (5.0, 60.0)
"""Seconds of early sleep before a look at whether spinning is possible again: at first, and after many vain looks."""

ADAPTIVE = "spinning, and asleep while other processes need the cores"
SETTINGS_READ = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables that say how libgomp's threads wait."""


class Threads(NamedTuple):
    """What was chosen for torch's threads on the CPU, and why."""

    count: int
    count_from: str
    """`OMP_NUM_THREADS`, `CPU quota` or `CPU affinity`."""
    waiting: str
    """How threads wait for each other: ADAPTIVE, as the user set it, or as the library does."""

    def __str__(self) -> str:
        return f"{self.count}, from {self.count_from}; they wait {self.waiting}"


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs that the control group of this process may use, inf where nothing limits it."""
    try:
        if (limit := root / "cpu.max").is_file():
            quota, period = limit.read_text().split()
        else:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no control groups, or "max"
        return math.inf


def choose(environ: Mapping[str, str], cpus: int, quota: float, *, adaptive: bool) -> Threads:
    """What torch is to compute with: the user's settings first, then the `cpus` and the `quota` of this process.

    `adaptive` is whether this system counts the seconds that threads queue."""
    # a parent process of this program sets SPIN_COUNT for its children
    chosen = (
        f"as {name}={environ[name]} says"
        for name in SETTINGS_READ
        if name in environ and (name, environ[name]) != ("GOMP_SPINCOUNT", SPIN_COUNT)
    )
    waiting = next(chosen, ADAPTIVE if adaptive else "as the OpenMP library does by default")
    if environ.get("OMP_NUM_THREADS", "").isdigit():
        return Threads(int(environ["OMP_NUM_THREADS"]), "OMP_NUM_THREADS", waiting)
    if quota < cpus:
        return Threads(max(1, math.ceil(quota)), "CPU quota", waiting)
    return Threads(cpus, "CPU affinity", waiting)


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def set_up() -> Threads:
    """Chooses, sets what libgomp reads when torch loads it, and starts `watch`; once, at the start of a process.

    The command line and its worker processes call it; a program of yours calls it before it imports torch."""
    threads = choose(os.environ, usable_cpus(), cpu_quota(), adaptive=seconds_queued() is not None)
    if threads.count_from == "CPU quota":
        os.environ["OMP_NUM_THREADS"] = str(threads.count)
    if threads.waiting == ADAPTIVE:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
        if threads.count > 1:
            threading.Thread(target=watch, args=(threading.Event(),), daemon=True, name="watch").start()
    return threads


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes with `count` threads inside and with as many as before after it; 0 changes nothing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_queued() -> float | None:
    """Seconds that the threads of this process have waited for a core, all together; None where Linux keeps no count.

    https://docs.kernel.org/scheduler/sched-stats.html"""
    total = 0
    try:
        for task in os.scandir("/proc/self/task"):
            try:
                total += int(Path(task.path, "schedstat").read_bytes().split()[1])
            except (FileNotFoundError, ProcessLookupError):  # a thread that has ended
                continue
    except (OSError, IndexError, ValueError):
        return None
    return total / 1e9


def loaded_libgomp() -> Path | None:
    """The libgomp that this process has loaded."""
    match = re.search(r"/.*/libgomp[^/\n]*\.so[^/\n]*$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return Path(match[0]) if match else None


class Crowd:
    """More OpenMP threads than CPUs, all asleep: while it is there, libgomp's waiting threads spin 100 times only.

    https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html"""

    def __init__(self, libgomp: Path, size: int):
        self._parallel = ctypes.CDLL(str(libgomp)).GOMP_parallel
        self._size = size
        self._leave = threading.Event()
        self.arrived = threading.Event()
        self.thread = threading.Thread(target=self._stay, daemon=True, name="crowd")
        self.thread.start()

    def _stay(self) -> None:
        # free(NULL) in each thread: OpenMP keeps the team of a thread asleep, until that thread ends
        self._parallel(ctypes.CDLL(None).free, None, self._size, 0)
        self.arrived.set()
        self._leave.wait()

    def disperse(self) -> None:
        """Ends its threads."""
        self._leave.set()
        self.thread.join()


class Policy:
    """When waiting threads sleep early: while they queue for cores, with a look now and then at whether they still do.

    Threads that sleep early queue more under light work beside them than threads that spin, so only a look tells."""

    def __init__(self) -> None:
        self.early = False
        self._changed = -math.inf
        self._rest = REST[0]

    def update(self, queued: float, now: float) -> bool:
        """`early` from now on, by how many threads waited for a core, on average, until `now` in seconds."""
        since = now - self._changed
        if self.early and (queued < FREE or since >= self._rest):
            self.early, self._changed = False, now
        elif not self.early and queued > CROWDED:
            self._rest = min(2 * self._rest, REST[1]) if since < self._rest else REST[0]
            self.early, self._changed = True, now
        return self.early


def watch(stop: threading.Event) -> None:
    """Until `stop` is set, keeps a crowd in libgomp while threads of this process queue for cores."""
    policy, crowd, libgomp = Policy(), None, None
    queued, at = seconds_queued(), time.monotonic()
    while queued is not None and not stop.wait(PERIOD):
        before, since, queued, at = queued, at, seconds_queued(), time.monotonic()
        libgomp = libgomp or (loaded_libgomp() if "torch" in sys.modules else None)
        if queued is None or libgomp is None:
            continue
        early = policy.update((queued - before) / (at - since), at)
        if early and crowd is None:
            crowd = Crowd(libgomp, usable_cpus() + 1)
        elif crowd and not early:
            crowd = crowd.disperse()
    if crowd:
        crowd.disperse()
