"""The bench starts trainings alone and in pairs and reads their pace. No time is asserted."""

import io
import sys

import pytest

from refine_control.bench import threads as bench
from refine_control.bench.step import whole_step
from refine_control.bench.threads import READY, Pace, bench_threads
from refine_control.config import Recipe
from refine_control.errors import MissingError
from refine_control.recipe_files import load_recipe

FAST = "print(1.0); print(0.25); print(0.5, flush=True); time.sleep(60)"
STUCK = "print(4.0, flush=True); time.sleep(60)"


def stand_in(code: str) -> list[str]:
    """A process that follows the protocol of a training and then runs `code`."""
    start = f"import os, sys, time; print({READY!r}, end='', flush=True); sys.stdin.readline(); "
    return [sys.executable, "-c", start + code]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("mini/balanced_stage1", ["training.batch_size=1"])


def test_the_pace_is_a_median_without_the_first_step(recipe):
    result = bench_threads(recipe, repeats=1, seconds=0.4, settings={"a": {}}, command=stand_in(FAST))
    assert result.settings["a"] == (Pace(0.375), Pace(0.375), 1.0, 1.0)
    assert "0.38" in result.text


def test_steps_that_do_not_end_give_a_lower_bound(recipe):
    result = bench_threads(recipe, repeats=1, seconds=0.4, settings={"a": {}}, command=stand_in(STUCK))
    assert result.settings["a"].beside == Pace(0.2, at_least=True)
    assert "> 0.20" in result.text


def test_a_setting_is_the_environment_of_its_trainings(recipe, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "9")
    code = "n = float(os.environ.get('GOMP_SPINCOUNT', 1)); print(n); print(n, flush=True); time.sleep(60)"
    settings = {"none": {}, "four": {"GOMP_SPINCOUNT": "4"}}
    result = bench_threads(recipe, repeats=1, seconds=0.4, settings=settings, command=stand_in(code))
    assert [(r.alone.seconds, r.over_best) for r in result.settings.values()] == [(1, 1), (4, 4)]


@pytest.mark.parametrize(("code", "message"), [("sys.exit('no memory')", "no memory"), ("pass", "stopped")])
def test_a_training_that_ends_is_named(recipe, code, message):
    with pytest.raises(MissingError, match=message):
        bench_threads(recipe, repeats=1, seconds=60, settings={"a": {}}, command=stand_in(code))


def test_a_training_that_does_not_start_is_named(recipe):
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with pytest.raises(MissingError, match="before its first step: no such model"):
        bench_threads(recipe, repeats=1, seconds=60, settings={"a": {}}, command=command)


def test_a_real_training_makes_steps(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    steps = iter(range(2))

    def two_steps(*arguments):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        whole_step(*arguments)

    monkeypatch.setattr("refine_control.bench.step.whole_step", two_steps)
    with pytest.raises(KeyboardInterrupt):
        bench._main(recipe.model_dump_json())
    ready, *durations = capsys.readouterr().out.splitlines()
    assert ready + "\n" == READY
    assert len(durations) == 2
    assert all(float(duration) > 0 for duration in durations)
