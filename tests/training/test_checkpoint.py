"""Checkpoints beside full disks, kills and damaged files."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refine_control import storage
from refine_control.config import TrainingConfig
from refine_control.errors import DamagedError, StorageError
from refine_control.storage import MANIFEST
from refine_control.training.batches import CacheBatches
from refine_control.training.checkpoint import load_checkpoint, remove_others, save_checkpoint
from refine_control.training.loop import _Log, fit

_spec = importlib.util.spec_from_file_location("toy_training", Path(__file__).with_name("toy_training.py"))
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

TENSORS = {"weight": torch.arange(3.0)}


def train(run_dir, **settings):
    training = TrainingConfig(**{"stage": "toy", "steps": 2, "batch_size": 4, "save_every": 1, **settings})
    return fit(toy.ToyObjective(), CacheBatches(toy.ToyCache(), 4), toy.OPTIMIZER, training, run_dir, "mark")


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("settings", [{}, {"save_every": 0}])
def test_a_disk_without_room_for_checkpoints_ends_the_run_before_its_first_step(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: (1000, 1000, 100))
    monkeypatch.setattr(toy.ToyObjective, "losses", None)
    with pytest.raises(StorageError, match=r"saving checkpoints and the result needs .* 0 MB are free"):
        train(tmp_path, **settings)
    monkeypatch.undo()
    assert train(tmp_path).steps == 2
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: (1000, 1000, 0))
    assert train(tmp_path).steps == 2  # nothing is left to be saved


def test_a_disk_that_fills_up_during_training_is_a_storage_error(tmp_path):
    code = """
import pathlib, resource, sys
import torch
from refine_control.errors import StorageError
from refine_control.training.batches import CacheBatches
from refine_control.training.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_checkpoint(pathlib.Path(sys.argv[1]), 1, {"weight": torch.zeros(1000)}, "mark")
except StorageError as error:
    sys.exit(error.exit_code)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=False)
    assert run.returncode == 74, run.stderr.decode()
    assert names(tmp_path) == []


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_nothing_behind(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, TENSORS, "mark")

    def killed(path, **options):
        if path.name.startswith(".step_00000001") and path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(storage.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, TENSORS, "mark")
    monkeypatch.undo()
    assert load_checkpoint(tmp_path, "mark").step == 2
    remove_others(tmp_path, 2)
    assert names(tmp_path) == ["step_00000002"]


def test_a_resumed_run_removes_older_checkpoints_even_where_it_saves_no_more(tmp_path):
    train(tmp_path)
    old = tmp_path / "checkpoints" / "step_00000001"
    old.mkdir()
    (tmp_path / "checkpoints" / ".step_00000001.7.tmp").mkdir()
    train(tmp_path)
    assert names(tmp_path) == ["step_00000002"]


@pytest.mark.parametrize("key", ["fingerprint", "step"])
def test_a_checkpoint_whose_manifest_lacks_a_key_is_damaged(tmp_path, key):
    path = save_checkpoint(tmp_path, 1, TENSORS, "mark") / MANIFEST
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(DamagedError, match=f"has no '{key}'"):
        load_checkpoint(tmp_path, "mark")


def test_garbage_in_the_log_does_not_stop_a_resumed_run(tmp_path):
    lines = b'{"step": 1, "loss": 0.123457}\n\xff\xfe}\n{garbage}\n{"loss": 1}\n[1]\n{"step": 9, "loss": 1}\n{"ste'
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    log = _Log(tmp_path, 4)
    log.write(5, {"loss": 0.5})
    log.close()
    expected = ['{"step": 1, "loss": 0.123457}', '{"step": 5, "loss": 0.5}']
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == expected
