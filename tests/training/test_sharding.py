"""Several processes train the student that one process trains, and continue what another number of them began."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refine_control.cache.building import write_cache
from refine_control.errors import InterruptedCleanlyError, InvalidInputError, WorkerDiedError
from refine_control.miniature.scene_shards import scene_photos
from refine_control.records import LABELED
from refine_control.training import launch as launching
from refine_control.training.checkpoint import load_checkpoint
from refine_control.training.launch import Nodes, launch

SCRIPT = Path(__file__).with_name("shared_training.py")
spec = importlib.util.spec_from_file_location("shared_training", SCRIPT)
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)


@pytest.fixture(scope="module")
def cache(tiny_backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / LABELED
    write_cache(list(scene_photos(0, 0, 6)), folder, tiny_backbone, LABELED, source={})
    return folder


@pytest.fixture(scope="module")
def alone(tiny_backbone, tiny_student, cache, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone")
    return shared.train(tiny_backbone, tiny_student(3), cache, run_dir)[0], logged(run_dir)


def logged(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def several(cache, tmp_path_factory):
    """Runs of 2 and 4 processes; the folder `stopped` is of 2 that got a signal, and `continued` of 4 after them."""
    root = tmp_path_factory.mktemp("several")

    def run(name, processes, **options):
        return {"processes": processes, "run_dir": str(root / name), "options": {"cache": str(cache), **options}}

    stopped = run("stopped", 2, engine="fsdp2", stop=1, device_batch_size=1)
    continued = run("continued", 4, engine="fsdp2") | {"copy": str(root / "stopped")}
    plan = [[stopped], [continued], [run("ddp", 4, engine="ddp")]]
    (root / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, str(SCRIPT), "several", str(root / "plan.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [[75] * 2, [0] * 4, [0] * 4], ended.stderr
    return root


def compare(weights, lines, expected):
    for name, value in expected[0].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    assert [line["step"] for line in lines] == [line["step"] for line in expected[1]]
    for line, other in zip(lines, expected[1], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_shards_are_continued_by_another_number_of_processes(several, tiny_backbone, tiny_student, cache, alone):
    folder, name = several / "stopped", "weights/pos_embed_input.proj.weight"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000002"]
    files = sorted((folder / "checkpoints" / "step_00000002").glob("*.safetensors"))
    assert [path.name for path in files] == [f"state-0000{part}-of-00002.safetensors" for part in (1, 2)]
    tensors, parts = load_checkpoint(folder, "fingerprint").tensors, [load_file(path) for path in files]
    assert tensors[name].shape == alone[0][name.removeprefix("weights/")].shape
    assert 0 < len(parts[1][name]) < len(tensors[name])
    weights, _ = shared.train(tiny_backbone, tiny_student(3), cache, folder)
    compare(weights, logged(folder), alone)


@pytest.mark.parametrize("name", ["continued", "ddp"])
def test_four_processes_train_the_student_of_one(several, alone, name):
    compare(load_file(several / name / "student.safetensors"), logged(several / name), alone)


def test_the_others_end_where_one_process_is_killed(tmp_path):
    code = "import os, time, signal\nos.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(600)"
    with pytest.raises(WorkerDiedError, match="process 1 of 2 was ended by SIGKILL"):
        launch(2, ["-c", code])


def test_a_process_that_is_stopped_goes_when_another_one_misses_it(monkeypatch):
    monkeypatch.setattr(launching, "_LATE", 0.0)
    monkeypatch.setattr(launching, "_PATIENCE", 1e9)
    code = "import os, sys, signal\nsys.exit(71) if os.environ['RANK'] == '0' else os.kill(os.getpid(), signal.SIGSTOP)"
    assert launch(2, ["-c", code]) == 71


def test_the_cause_is_the_process_that_ended_not_those_that_lost_it():
    assert [launching._cause(codes) for codes in ([71, -9], [71, 74], [-15, -9], [1, -9])] == [1, 1, 0, 1]
    assert [launching._cause(codes) for codes in ([71, None], [None, 0], [0, 0])] == [0, None, None]


def test_each_machine_starts_its_part_of_the_processes(tmp_path, monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    read = f"[os.environ[name] for name in {names}]"
    code = f"import os, json\nopen(os.environ['RANK'], 'w').write(json.dumps({read}))"
    monkeypatch.chdir(tmp_path)
    assert launch(2, ["-c", code], Nodes(3, 1, "node-0:29500")) == 0
    written = [json.loads(Path(name).read_text()) for name in sorted(os.listdir())]
    assert written == [[rank, local, "6", "2", "node-0", "29500"] for rank, local in (("2", "0"), ("3", "1"))]


@pytest.mark.parametrize(
    ("nodes", "refusal"),
    [
        (Nodes(2, 2, "a:1"), "--node-rank 2 is not below --nodes 2"),
        (Nodes(1, 1), "not below --nodes 1"),
        (Nodes(2, 0), "--nodes needs --master"),
        (Nodes(2, 0, "host"), "--master host is not HOST:PORT"),
        (Nodes(2, 0, "host:"), "not HOST:PORT"),
    ],
)
def test_machines_that_cannot_find_each_other_are_refused(nodes, refusal):
    with pytest.raises(InvalidInputError, match=refusal):
        launch(1, ["-c", "raise SystemExit(1)"], nodes)


def test_the_exit_code_and_words_of_the_process_that_fails(capfdbinary):
    code = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('no such thing')\ntime.sleep(600)"
    assert launch(2, ["-c", code]) == 1
    assert b"no such thing" in capfdbinary.readouterr().err


def test_a_signal_is_passed_on_to_all(tmp_path):
    code = (
        "import os, signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(75))\n"
        f"open(os.path.join({str(tmp_path)!r}, os.environ['RANK']), 'w').close()\ntime.sleep(600)"
    )
    waiting = (
        "import os, signal, time\n"
        f"while len(os.listdir({str(tmp_path)!r})) < 2: time.sleep(0.01)\nos.kill({os.getpid()}, 15)"
    )
    with subprocess.Popen([sys.executable, "-c", waiting]), pytest.raises(InterruptedCleanlyError):
        launch(2, ["-c", code])
