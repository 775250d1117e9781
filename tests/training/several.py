"""Runs of several processes, forked from a script that has imported everything once.

python SCRIPT several PLAN.json, where the plan is a list of rounds, and a round a list of runs that go on together:
{"processes": 2, "run_dir": FOLDER, "copy": FOLDER, "options": {NAME: VALUE}}. Prints each run's exit codes as JSON.
"""

import json
import os
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path


def start(count, work):
    """Forks `count` processes that torch.distributed can connect; `work()` is what each exits with."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        connected = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            code = 1
            try:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                os.environ |= connected | {name: str(value) for name, value in numbers.items()}
                code = work()
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return children


def wait(children):
    """Exit codes of processes that end by themselves; one that is stopped is killed once those before it ended."""
    codes = []
    for child in children:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WSTOPPED | os.WNOWAIT).si_code == os.CLD_STOPPED:
            os.kill(child, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes


def main(train):
    """Runs the plan; `train(run_dir, **options)` returns an exit code."""
    codes = []
    for runs in json.loads(Path(sys.argv[2]).read_text()):
        started = []
        for run in runs:
            if "copy" in run:
                shutil.copytree(run["copy"], run["run_dir"])
            options = run.get("options", {})
            started.append(start(run["processes"], lambda run=run, options=options: train(run["run_dir"], **options)))
        codes += [wait(children) for children in started]
    print(json.dumps(codes))
