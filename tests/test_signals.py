"""The first signal ends a block with a sentence, a held block at its end, and a second signal the process."""

import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

from refine_control.cli.app import main
from refine_control.errors import InterruptedCleanlyError
from refine_control.signals import held, interruptible

SIGNALS = [signal.SIGTERM, signal.SIGINT]


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def dispositions():
    """Whoever started the tests: both signals have Python's own handlers here, and afterwards those from before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_ends_the_block_whatever_a_library_catches(number):
    @interruptible("three shards are kept")
    def verb():
        try:
            send(number)
        except Exception:
            pytest.fail("a library could stop the signal")

    with pytest.raises(InterruptedCleanlyError, match=f"{number.name}; three shards are kept: run the same") as error:
        verb()
    assert error.value.exit_code == 75


def test_in_a_held_block_a_signal_waits_for_the_end():
    steps = []

    @interruptible("not said")
    def work():
        with held("all is saved") as stopped:
            for step in range(3):
                if step == 1:
                    send(signal.SIGTERM)
                steps.append(stopped())
        steps.append("after")

    with pytest.raises(InterruptedCleanlyError, match="all is saved"):
        work()
    assert steps == [0, signal.SIGTERM, signal.SIGTERM]
    with pytest.raises(InterruptedCleanlyError, match="the outer one"):
        held("the outer one")(work)()
    assert steps[3:] == [0, signal.SIGTERM, signal.SIGTERM, "after"]


def test_an_error_in_a_held_block_is_not_covered_up():
    @held()
    def work():
        send(signal.SIGTERM)
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        interruptible()(work)()


def test_a_signal_that_a_destructor_loses_is_noticed_at_the_next_held_block(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda event: None)

    class Destructor:
        def __del__(self):
            send(signal.SIGTERM)

    @interruptible()
    def verb():
        Destructor()
        held()(lambda: pytest.fail("the work began"))()

    with pytest.raises(InterruptedCleanlyError):
        verb()


@pytest.mark.parametrize(
    ("words", "function"),
    [
        (["train", "mini/fc"], "training.run.train"),
        (["reproduce", "table1"], "study.reproduce.reproduce"),
        (["demo"], "study.demo.run_demo"),
        (["mini", "train"], "miniature.bundle.make_bundle"),
    ],
)
def test_a_verb_that_trains_leaves_with_75_wherever_it_is(monkeypatch, capsys, words, function):
    monkeypatch.setattr(f"refine_control.{function}", lambda *args, **kwargs: send(signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["refine-control", *words])
    assert main() == 75
    assert "run the same command to continue" in capsys.readouterr().err


def test_a_signal_that_was_ignored_stays_ignored_and_a_warning_says_so(caplog):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with caplog.at_level(logging.WARNING), interruptible():
        send(signal.SIGINT)
    assert "SIGINT was ignored" in caplog.text
    assert f"kill {os.getpid()}" in caplog.text


def test_other_threads_leave_signals_alone():
    handlers = []

    def work():
        with interruptible(), held() as stopped:
            handlers.append((stopped(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [(0, signal.SIG_DFL)]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(number):
    code = f"""
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from refine_control.signals import held
with held():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), {int(number)})
    print("still here", flush=True)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (-number, "")
