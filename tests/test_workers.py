"""Several processes: results in order, and a signal that lets what is under way end and nothing begin."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refine_control.errors import InvalidInputError
from refine_control.workers import workers

CODE = """
import signal, sys, time
from pathlib import Path
from refine_control import workers
from refine_control.errors import InterruptedCleanlyError

folder, count, ignored = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "ignored"

def work(number):
    (folder / f"begun-{number}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    (folder / f"ended-{number}").touch()

def shutdown(pool, **options):  # called once no further task begins
    (folder / "stopping").touch()
    return leave(pool, **options)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    leave, workers.ProcessPoolExecutor.shutdown = workers.ProcessPoolExecutor.shutdown, shutdown
    try:
        with workers.workers(count) as in_order:
            list(in_order(work, range(12)))
    except InterruptedCleanlyError as error:
        print(error)
        sys.exit(error.exit_code)
"""


LOOPING = """
import signal, sys, time
from pathlib import Path
from refine_control import signals, workers
from refine_control.errors import InterruptedCleanlyError

folder = Path(sys.argv[1])

def work(number):
    (folder / f"begun-{number}").touch()
    with signals.held("all of it") as stopped:
        while not stopped():
            time.sleep(0.01)
        (folder / f"saved-{number}").touch()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with workers.workers(2) as in_order:
            list(in_order(work, range(6)))
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


def wait_for(process: subprocess.Popen, folder: Path, pattern: str) -> None:
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("disposition", ["default", "ignored"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_a_signal_what_runs_ends_and_nothing_begins(number, count, disposition, tmp_path):
    """SIGINT that was ignored at the start stays ignored, and a warning says so."""
    script, folder = tmp_path / "script.py", tmp_path / "tasks"
    script.write_text(CODE)
    folder.mkdir()
    command = [sys.executable, str(script), str(folder), str(count), disposition]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        try:
            wait_for(process, folder, f"begun-{count - 1}")
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal sends it
            else:
                process.send_signal(number)
            stays = number == signal.SIGINT and disposition == "ignored"
            if count > 1 and not stays:
                wait_for(process, folder, "stopping")
            if count > 1 or stays:
                (folder / "go").touch()
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    begun, ended = (len(list(folder.glob(f"{mark}-*"))) for mark in ("begun", "ended"))
    if stays:
        assert (process.returncode, begun, ended) == (0, 12, 12)
        assert "SIGINT was ignored" in err
        return
    assert process.returncode == 75
    assert "run the same command to continue" in out
    assert (begun, ended) == ((1, 0) if count == 1 else (2, 2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_work_that_asks_for_signals_saves_and_leaves(number, tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "tasks"
    script.write_text(LOOPING)
    folder.mkdir()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(script), str(folder)], **pipes, start_new_session=True) as process:
        try:
            wait_for(process, folder, "begun-1")
            wait_for(process, folder, "begun-0")
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, err
    assert "run the same command to continue" in out
    assert "was ignored" not in err
    assert sorted(path.name for path in folder.iterdir()) == ["begun-0", "begun-1", "saved-0", "saved-1"]
