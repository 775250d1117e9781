"""The templates for clusters start what the command line offers, and connect all processes of all machines."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from refine_control.cli.app import app

CLUSTER = Path(__file__).parents[2] / "docs" / "cluster"
VERB = """
import json, os, sys
from refine_control.cli import app
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
app._MAIN = '''import json, os, sys
with open(os.environ["RANK"], "w") as file:
    json.dump([[os.environ[name] for name in %r], sys.argv[1:]], file)
sys.exit(int(os.environ["CODE"]))''' % (names,)
sys.exit(app.main())
"""
"""The verb itself, whose processes only write what they were started with."""
PROGRAMS = {
    "refine-control": f'exec {shlex.quote(sys.executable)} -c {shlex.quote(VERB)} "$@"',
    "srun": """[ "$1" = --kill-on-bad-exit=1 ] && shift
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks="$tasks $!"; done
for task in $tasks; do wait $task || code=$?; done
exit ${code:-0}""",
    "scontrol": """[ "$1" = requeue ] && touch requeued
echo 127.0.0.1; echo 127.0.0.2""",
}


@pytest.mark.parametrize(("code", "again"), [(75, True), (2, False)])
def test_slurm_connects_all_machines_and_queues_again_what_can_go_on(tmp_path, code, again):
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"NNODES": 2, "JOB_ID": 60001, "JOB_NODELIST": "node[0-1]", "GPUS_ON_NODE": 1}
    slurm = {f"SLURM_{name}": str(value) for name, value in job.items()}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code)}
    command = ["bash", str(CLUSTER / "slurm.sh")]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    assert (tmp_path / "requeued").exists() == again
    for rank in "01":
        connected, arguments = json.loads((tmp_path / rank).read_text())
        assert connected == [rank, "0", "2", "127.0.0.1", "20001"]
        assert arguments[:2] == ["train", "sd3/balanced_stage1"]
        assert {"data.labeled=runs/cache/labeled", "training.engine=fsdp2", "runs/stage1"} <= set(arguments)


def test_kubernetes_has_a_pod_for_each_machine_with_options_that_exist():
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = [*container["args"][1:], "--node-rank", "1"]
    shown = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert shown.exit_code == 0, shown.output
    recipe = json.loads(shown.stdout)
    assert (recipe["training"]["engine"], recipe["training"]["precision"]) == ("fsdp2", "bf16")
    options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
    assert spec["completions"] == spec["parallelism"] == int(options["nodes"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(options["nproc"])
    name = job["metadata"]["name"]
    assert options["master"].partition(":")[0] == f"{name}-0.{service['metadata']['name']}"
    assert (pod["subdomain"], service["spec"]["selector"]) == (service["metadata"]["name"], {"job-name": name})
    assert (spec["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert {71, 75}.isdisjoint(rule["onExitCodes"]["values"])
