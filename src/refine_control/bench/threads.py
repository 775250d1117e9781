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
from typing import NamedTuple

from refine_control.config import Recipe
from refine_control.errors import MissingError
from refine_control.threads import SETTINGS_READ, set_up, usable_cpus

SETTINGS: dict[str, dict[str, str]] = {
    "chosen": {},
    "library's default": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""What the environment of a training adds; `chosen` is what `threads.set_up` chooses."""
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
            slower = beside._replace(seconds=slowdown)
            rows.append(f"{name:20}{alone!s:>8}{over_best:11.2f}{beside!s:>17}{slower!s:>10}")
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

    `command` is a process that trains by the recipe in its last argument. Raises MissingError where one fails."""
    paces: dict[tuple[str, int], list[Pace]] = {}
    for _ in range(repeats):
        for name, added in settings.items():
            environ = {k: v for k, v in os.environ.items() if k not in SETTINGS_READ} | dict(added)
            for count in (1, 2):
                pace = _measure([*command, recipe.model_dump_json()], environ, count, seconds)
                paces.setdefault((name, count), []).append(pace)
    alone, beside = ({name: statistics.median_high(paces[name, count]) for name in settings} for count in (1, 2))
    best = min(alone.values()).seconds
    results = {
        n: SettingResult(alone[n], beside[n], beside[n].seconds / alone[n].seconds, alone[n].seconds / best)
        for n in settings
    }
    return ThreadsBench(usable_cpus(), str(set_up()), seconds, results)


def _measure(command: Sequence[str], environ: Mapping[str, str], count: int, seconds: float) -> Pace:
    """The slowest pace of `count` trainings that begin their first step together and are stopped after `seconds`."""
    pipe = subprocess.PIPE
    # a session each, as from two terminals: Linux shares the cores out among sessions first
    trainings = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environ, text=True, start_new_session=True)
        for _ in range(count)
    ]
    try:
        for training in trainings:
            if training.stdout and training.stdout.readline() != READY:
                raise MissingError(f"a training failed before its first step: {training.communicate()[1][-300:]}")
        for training in trainings:
            print("go", file=training.stdin, flush=True)
        end = time.monotonic() + seconds
        return max(_read_pace(training, end, seconds) for training in trainings)
    finally:
        for training in trainings:
            training.kill()
            training.wait()


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


def _main(recipe_json: str) -> None:
    """Trains by a recipe, without end, on one random batch; prints the seconds of each step."""
    set_up()  # before torch is imported
    from refine_control.bench.step import OurStep, make_batch, whole_step
    from refine_control.training.run import training_device

    recipe, device = Recipe.model_validate_json(recipe_json), training_device()
    step = OurStep(recipe, device, recipe.training.precision)
    batch, draw = make_batch(recipe, step.backbone, device)
    print(READY, end="", flush=True)
    sys.stdin.readline()
    while True:
        began = time.monotonic()
        whole_step(step, batch, draw)
        print(time.monotonic() - began, flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
