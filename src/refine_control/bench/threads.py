"""`refine-control bench threads`: a training step alone and beside a second training, by how torch's threads wait.

libgomp reads its settings when it is loaded, so every measurement starts new processes. Each makes steps for a fixed
time: where two processes hold each other up for minutes, the result is a lower bound."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from refine_control.config import Recipe
from refine_control.errors import MissingError
from refine_control.threads import set_up, usable_cpus

CHOSEN = "chosen"
SETTINGS: dict[str, dict[str, str]] = {
    CHOSEN: {},
    "library's default": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""What the environment of a training adds; `chosen` is what `threads.set_up` chooses."""
_CLEARED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
READY = "ready\n"
"""What a training prints before its first step; it then waits for a line."""


class Pace(NamedTuple):
    """Seconds a step: the median after the first step, or a lower bound where fewer than two steps ended in time."""

    seconds: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"{'> ' if self.at_least else ''}{self.seconds:.2f}"


class SettingResult(NamedTuple):
    """Of one setting."""

    alone: Pace
    beside: Pace
    """The slower of two trainings that run at the same time."""
    slowdown: float
    """`beside` over `alone`; 2 is a fair share of the cores. A lower bound where `beside` is one."""
    over_best: float
    """`alone` over the fastest `alone` of all settings."""


class ThreadsBench(NamedTuple):
    """A training step on this machine by how torch's threads wait for each other."""

    cpus: int
    threads: str
    """What was chosen, and why."""
    seconds: float
    """Time of each measurement."""
    settings: dict[str, SettingResult]

    @property
    def text(self) -> str:
        """As a table."""
        rows = [f"{self.cpus} CPUs; chosen: {self.threads}", "seconds a step"]
        rows += [f"{'':20}{'alone':>8}{'over best':>11}{'beside a second':>17}{'slowdown':>10}"]
        for name, (alone, beside, slowdown, over_best) in self.settings.items():
            slower = f"{'> ' if beside.at_least else ''}{slowdown:.2f}"
            rows.append(f"{name:20}{alone!s:>8}{over_best:11.2f}{beside!s:>17}{slower:>10}")
        return "\n".join(rows)


def bench_threads(
    recipe: Recipe,
    *,
    repeats: int,
    seconds: float,
    settings: Mapping[str, Mapping[str, str]] = SETTINGS,
    command: Sequence[str] = (sys.executable, "-m", "refine_control.bench.threads"),
) -> ThreadsBench:
    """Measures each of `settings` for `seconds`, alone and beside a second process, `repeats` times in turn.

    `command` is a process that trains by the recipe on its stdin. Raises MissingError where one fails."""
    paces: dict[tuple[str, int], list[Pace]] = {}
    for _ in range(repeats):
        for name, added in settings.items():
            environ = {k: v for k, v in os.environ.items() if k not in _CLEARED} | dict(added)
            for count in (1, 2):
                pace = _measure([*command, str(seconds)], recipe.model_dump_json(), environ, count, seconds)
                paces.setdefault((name, count), []).append(pace)
    medians = {key: sorted(values)[len(values) // 2] for key, values in paces.items()}
    best = min(medians[name, 1].seconds for name in settings)
    results = {}
    for name in settings:
        alone, beside = medians[name, 1], medians[name, 2]
        results[name] = SettingResult(alone, beside, beside.seconds / alone.seconds, alone.seconds / best)
    return ThreadsBench(usable_cpus(), str(set_up()), seconds, results)


def _measure(command: Sequence[str], recipe: str, environ: Mapping[str, str], count: int, seconds: float) -> Pace:
    """The slowest pace of `count` trainings that begin their first step together and are stopped after `seconds`."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # a session each, as from two terminals: Linux shares the cores out among sessions first
    pipes |= {"env": environ, "text": True, "start_new_session": True}
    trainings = [subprocess.Popen(command, **pipes) for _ in range(count)]
    try:
        for training in trainings:
            _send(training, recipe)
        for training in trainings:
            assert training.stdout
            if training.stdout.readline() != READY:
                raise MissingError(f"a training failed before its first step: {training.communicate()[1][-300:]}")
        for training in trainings:
            _send(training, "go")
        end = time.monotonic() + seconds
        return max(_read_pace(training, end, seconds) for training in trainings)
    finally:
        for training in trainings:
            training.kill()
            training.wait()


def _send(training: subprocess.Popen[str], line: str) -> None:
    assert training.stdin
    training.stdin.write(line + "\n")
    training.stdin.flush()


def _read_pace(training: subprocess.Popen[str], end: float, seconds: float) -> Pace:
    """What one training printed until `end`, by time.monotonic."""
    try:
        _, errors = training.communicate(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        training.kill()
        durations = [float(line) for line in training.communicate()[0].splitlines()]
        if len(durations) < 2:
            return Pace(seconds / (len(durations) + 1), at_least=True)
        return Pace(statistics.median(durations[1:]))
    raise MissingError(f"a training stopped by itself: {errors[-300:]}")


def _main() -> None:
    """Trains by the recipe on stdin, without end, on one random batch; prints the seconds of each step."""
    set_up()  # before torch is imported
    from refine_control.bench.step import OurStep, make_batch, whole_step
    from refine_control.training.run import training_device

    recipe, device = Recipe.model_validate_json(sys.stdin.readline()), training_device()
    step = OurStep(recipe, device, recipe.training.precision)
    batch, draw = make_batch(recipe, step.backbone, device)
    print(READY, end="", flush=True)
    sys.stdin.readline()
    while True:
        began = time.monotonic()
        whole_step(step, batch, draw)
        print(time.monotonic() - began, flush=True)


if __name__ == "__main__":
    _main()
