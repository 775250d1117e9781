"""Several processes: results in order, and a signal that lets what is under way end and nothing begin."""

import os
import signal
import subprocess
import sys
import time

import pytest

from refine_control.errors import InvalidInputError
from refine_control.workers import workers

CODE = """
import sys, time
from pathlib import Path
from refine_control.workers import workers
from refine_control.errors import InterruptedCleanlyError

def work(path):
    (path / "begun").touch()
    time.sleep(2)
    (path / "ended").touch()

if __name__ == "__main__":
    paths = [Path(sys.argv[1]) / str(n) for n in range(12)]
    for path in paths:
        path.mkdir()
    try:
        with workers(2) as in_order:
            list(in_order(work, paths))
    except InterruptedCleanlyError as error:
        print(error)
        sys.exit(error.exit_code)
"""


def negative(number):
    return -number


def test_results_come_in_the_order_of_the_tasks():
    with workers(2) as in_order:
        assert list(in_order(negative, range(20))) == [-n for n in range(20)]
    with workers(1) as in_order:
        assert list(in_order(negative, range(3))) == [0, -1, -2]
    with pytest.raises(InvalidInputError, match="at least 1"), workers(0):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_a_signal_what_runs_ends_and_nothing_begins(number, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(CODE)
    (tmp_path / "tasks").mkdir()
    command = [sys.executable, str(script), str(tmp_path / "tasks")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        end = time.monotonic() + 60
        while not list(tmp_path.glob("tasks/*/begun")) and time.monotonic() < end:
            time.sleep(0.05)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal sends it
        else:
            process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "")
    assert "run the same command to continue" in out
    begun, ended = (len(list(tmp_path.glob(f"tasks/*/{mark}"))) for mark in ("begun", "ended"))
    assert begun == ended <= 2
