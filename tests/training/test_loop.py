"""Kill it anywhere, run the same command, get the same bytes; and the same batch on any number of processes."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refine_control.config import OptimizerConfig, TrainingConfig, learning_rate_at
from refine_control.errors import DamagedError, InterruptedCleanlyError, InUseError, InvalidInputError, NonFiniteError
from refine_control.storage import only_writer, sha256_file
from refine_control.training import loop
from refine_control.training.checkpoint import load_checkpoint, save_checkpoint
from refine_control.training.loop import Draw, _micro_slots, _reduce
from refine_control.training.optimizer import MasterWeights, Trainable, compute_in

SCRIPT = Path(__file__).with_name("toy_training.py")
_spec = importlib.util.spec_from_file_location("toy_training", SCRIPT)
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

ACCUMULATED = {"steps": 40, "device_batch_size": 2, "dtype": "bfloat16"}


def state_of(run_dir):
    """sha256 of every file of the one checkpoint that is left."""
    (folder,) = (run_dir / "checkpoints").iterdir()
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


def logged(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_time(lines):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def start(run_dir, **options):
    words = [f"{k}={json.dumps(v)}" for k, v in options.items()]
    return subprocess.Popen([sys.executable, str(SCRIPT), str(run_dir), *words], stderr=subprocess.PIPE, text=True)


def wait_for_lines(process, run_dir, count, seconds=120):
    path, until = run_dir / "metrics.jsonl", time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"the run wrote no {count} lines: {process.communicate()[1]}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    toy.train(run_dir, **ACCUMULATED)
    return run_dir


def test_the_host_waits_for_a_mean_in_its_memory_only_to_save_it_and_at_the_end(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(MasterWeights, "settle", lambda self: waits.append(self))
    toy.train(tmp_path, offload="mean")
    assert 4 <= len(waits) <= 5  # space for a checkpoint, 4 and 8 and 12 steps, the end


def test_a_run_killed_in_mid_step_and_run_again_has_the_same_bytes(tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    process = start(run_dir, pause=0.01, **ACCUMULATED)
    wait_for_lines(process, run_dir, 9)
    with pytest.raises(InUseError), only_writer(run_dir):
        pass
    time.sleep(random.random() * 0.1)  # anywhere in a step, or in a save
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with only_writer(run_dir):  # the lock died with the process
        pass
    reached = len(logged_whole(run_dir))
    assert 9 <= reached < 40
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 39, "los')  # as a writer leaves it that dies in mid-line
    (run_dir / "checkpoints" / ".step_00000012.1.tmp").mkdir()  # as one leaves it that dies in mid-save
    assert load_checkpoint(run_dir, "fingerprint").step in range(8, reached + 1, 4)
    toy.train(run_dir, **ACCUMULATED)
    assert state_of(run_dir) == state_of(uninterrupted)
    assert [line["step"] for line in logged(run_dir)] == list(range(1, 41))
    assert without_time(logged(run_dir)) == without_time(logged(uninterrupted))


def logged_whole(run_dir):
    return [line for line in (run_dir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def test_a_termination_saves_and_leaves_with_75(tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    process = start(run_dir, pause=0.05, save_every=0, **{k: v for k, v in ACCUMULATED.items() if k != "save_every"})
    wait_for_lines(process, run_dir, 3)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 75, message
    assert time.monotonic() - asked < 30
    assert "run the same command" in message
    step = load_checkpoint(run_dir, "fingerprint").step
    assert step == len(logged(run_dir)) < 40
    toy.train(run_dir, **ACCUMULATED)
    assert state_of(run_dir) == state_of(uninterrupted)


def test_a_signal_in_the_last_save_waits_for_it(tmp_path, uninterrupted, monkeypatch):
    def save(run_dir, step, *rest):
        if step == ACCUMULATED["steps"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return save_checkpoint(run_dir, step, *rest)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    with pytest.raises(InterruptedCleanlyError, match="everything is saved"):
        toy.train(tmp_path, **ACCUMULATED)
    assert state_of(tmp_path) == state_of(uninterrupted)
    toy.train(tmp_path, **ACCUMULATED)


def test_a_finished_run_is_left_as_it_is(uninterrupted):
    before = state_of(uninterrupted), without_time(logged(uninterrupted))
    fitted = toy.train(uninterrupted, **ACCUMULATED)
    assert (state_of(uninterrupted), without_time(logged(uninterrupted))) == before
    (folder,) = (uninterrupted / "checkpoints").iterdir()
    saved = load_file(folder / "state.safetensors")
    assert all(torch.equal(value, saved[f"ema/{name}"]) for name, value in fitted.weights.items())
    assert not torch.equal(saved["ema/weight"], saved["weights/weight"])


SEVERAL = {"steps": 6, "save_every": 2}
LOST = {"SIGKILL": 25, "SIGSTOP": 4, "read": 4}
"""How a process is lost, and the patience of the others in seconds."""
UNCONNECTED = {"before 0": [-9, 71], "before 1": [71, -9], "watched 1": [71, -9]}
"""Which process is lost before it connects, and the exit codes."""


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Runs of 2 and 4 processes, of 2 that never connect, and of 2 that lose one and are started again: (folder, exit
    codes, what they said)."""
    root = tmp_path_factory.mktemp("several")

    def run(name, processes=2, **options):
        return {"processes": processes, "run_dir": str(root / name), "options": {**SEVERAL, **options}}

    whole = [run(str(count), count, notes=str(root / f"{count}.jsonl")) for count in (2, 4)]
    lost = [
        run(how, lost=str(root / "pipe") if how == "read" else how, patience=patience) for how, patience in LOST.items()
    ]
    lost += [run(how, lost=how, patience=4) for how in UNCONNECTED]
    (root / "plan.json").write_text(json.dumps([whole, lost, [run(how) for how in LOST]]))
    command = [sys.executable, str(SCRIPT), "several", str(root / "plan.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert ended.returncode == 0, ended.stderr
    codes = json.loads(ended.stdout)
    assert [code for run in (*codes[:2], *codes[-len(LOST) :]) for code in run] == [0] * 12, ended.stderr
    return root, dict(zip([*LOST, *UNCONNECTED], codes[2:], strict=False)), ended.stderr


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_draw_what_one_draws_and_learn_the_same(tmp_path, several, count):
    root, _, _ = several
    alone = toy.train(tmp_path / "one", notes=tmp_path / "one.jsonl", **SEVERAL)

    def notes(*paths):
        return sorted(line for path in paths for line in path.read_text().splitlines())

    parts = [root / f"{count}.jsonl.{rank}" for rank in range(count)]
    assert {len(notes(part)) for part in parts} == {24 // count}
    assert notes(tmp_path / "one.jsonl") == notes(*parts)
    for a, b in zip(logged(tmp_path / "one"), logged(root / str(count)), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["parts/01"] == pytest.approx(a["parts/01"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    checkpoint = load_checkpoint(root / str(count), "fingerprint")
    for name, value in alone.weights.items():
        torch.testing.assert_close(checkpoint.tensors[f"ema/{name}"], value, rtol=1e-4, atol=1e-6)


def test_processes_that_lose_one_end_with_71_and_continue_to_the_same_bytes(several):
    root, codes, said = several
    assert codes == {"SIGKILL": [71, -9], "SIGSTOP": [71, -9], "read": [71, 71], **UNCONNECTED}
    assert said.count("process 0 of 2 lost another one while computing the gradients of step 3") == 1
    assert said.count("process 1 of 2 has made no progress for 4 s, last seen") == 4
    assert said.count("process 0 of 2 has made no progress for 4 s, last seen starting") == 1
    assert said.count("last seen reading the samples of step 3") >= 1
    assert said.count("run the same command to continue") == 6
    for how in LOST:
        assert state_of(root / how) == state_of(root / "2")


class TwoProcesses:
    """An accelerator whose other process sends `other`."""

    num_processes = 2

    def __init__(self, other):
        self.other = other

    def reduce(self, tensor, reduction):
        assert reduction == "mean"
        return (tensor + self.other) / 2


@pytest.mark.parametrize("asked", [(False, False), (True, False), (False, True)])
def test_a_signal_to_one_process_stops_all_of_them_after_the_same_step(asked):
    grads = [torch.ones(2, 3), torch.full((4,), 2.0)]
    other = torch.cat([torch.full((6,), 3.0), torch.zeros(4), torch.tensor([float(asked[1])])])
    assert _reduce(TwoProcesses(other), grads, asked[0]) == any(asked)
    assert torch.equal(grads[0], torch.full((2, 3), 2.0))
    assert torch.equal(grads[1], torch.ones(4))


@pytest.mark.parametrize(("batch", "device"), [(8, 2), (6, 4)], ids=["even", "with a smaller rest"])
def test_accumulated_gradients_are_those_of_the_big_batch(tmp_path, batch, device):
    whole = toy.train(tmp_path / "whole", batch_size=batch)
    parts = toy.train(tmp_path / "parts", batch_size=batch, device_batch_size=device, unchecked=True)
    for name, value in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], value, rtol=1e-4, atol=1e-6)
    for a, b in zip(logged(tmp_path / "whole"), logged(tmp_path / "parts"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["parts/00"] == pytest.approx(a["parts/00"], rel=1e-4)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_slots_of_all_processes_are_the_batch(processes):
    training = TrainingConfig(batch_size=24, device_batch_size=4)
    slots = [s for rank in range(processes) for micro in _micro_slots(training, rank, processes) for s in micro]
    assert slots == list(range(24))
    assert max(len(m) for m in _micro_slots(training, 0, processes)) <= 4
    with pytest.raises(InvalidInputError, match="not a multiple"):
        _micro_slots(training, 0, 5)


def test_values_that_are_not_finite_end_the_run_and_never_reach_a_checkpoint(tmp_path):
    with pytest.raises(NonFiniteError, match="step 8"):
        toy.train(tmp_path, broken_step=6, log_every=100)
    checkpoint = load_checkpoint(tmp_path, "fingerprint")
    assert checkpoint.step == 4
    assert all(bool(torch.isfinite(t).all()) for t in checkpoint.tensors.values())
    with pytest.raises(NonFiniteError, match="step 3 "):
        toy.train(tmp_path / "logged", broken_step=2)


def test_samples_that_are_not_finite_are_named_though_they_came_steps_ago(tmp_path):
    with pytest.raises(DamagedError, match="sample toy-7 of toy_cache; ") as error:
        toy.train(tmp_path, broken_sample=7, log_every=100, save_every=5, device_batch_size=2)
    assert error.value.exit_code == 65
    assert "toy-" not in str(error.value).replace("toy-7", "")
    assert load_checkpoint(tmp_path, "fingerprint") is None
    with pytest.raises(NonFiniteError, match="all inputs are"):
        toy.train(tmp_path / "diverged", broken_step=2)


def test_the_learning_rate_is_a_function_of_the_step(uninterrupted):
    expected = [float(f"{learning_rate_at(step, toy.OPTIMIZER, 40):.6g}") for step in range(40)]
    assert [line["learning_rate"] for line in logged(uninterrupted)] == expected
    assert len(set(expected)) > 30


def test_every_epoch_is_a_new_order_of_all_samples():
    batches = toy.CacheBatches(toy.ToyCache(), 4)
    rows = [row for step in range(10) for row in batches.rows(Draw(0, "toy", step, range(4))).tolist()]
    assert sorted(rows[:20]) == sorted(rows[20:]) == list(range(20))
    assert rows[:20] != rows[20:]
    assert batches.rows(Draw(0, "toy", 1, range(4))).tolist() == rows[4:8]
    assert batches.rows(Draw(0, "other", 0, range(4))).tolist() != rows[:4]
    across = toy.CacheBatches(toy.ToyCache(), 12)
    assert across.rows(Draw(0, "toy", 1, range(12))).tolist() == rows[12:24]


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    save_checkpoint(tmp_path, 3, {"weights/a": torch.ones(2)}, "fingerprint")
    with pytest.raises(InvalidInputError, match="another recipe"):
        load_checkpoint(tmp_path, "other")
    assert load_checkpoint(tmp_path / "none", "fingerprint") is None


def two_checkpoints(run_dir):
    """As left by a writer killed between publishing the new one and deleting the old."""
    old = save_checkpoint(run_dir, 3, {"weights/a": torch.full((2,), 3.0)}, "fingerprint")
    shutil.copytree(old, run_dir / "kept")
    new = save_checkpoint(run_dir, 5, {"weights/a": torch.full((2,), 5.0)}, "fingerprint")
    assert not old.exists()
    (run_dir / "kept").rename(old)
    assert load_checkpoint(run_dir, "fingerprint").step == 5
    return old, new


def cut(folder):
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder):
    data = bytearray((folder / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "state.safetensors").write_bytes(bytes(data))


def unmanifest(folder):
    (folder / "manifest.json").unlink()


def half_manifest(folder):
    (folder / "manifest.json").write_text('{"files": ')


@pytest.mark.parametrize("damage", [cut, flip, unmanifest, half_manifest])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_whole_one(tmp_path, damage):
    old, new = two_checkpoints(tmp_path)
    damage(new)
    found = load_checkpoint(tmp_path, "fingerprint")
    assert found.step == 3
    assert torch.equal(found.tensors["weights/a"], torch.full((2,), 3.0))
    damage(old)
    with pytest.raises(DamagedError, match="step_00000003"):
        load_checkpoint(tmp_path, "fingerprint")


def test_saving_clears_what_a_killed_writer_left(tmp_path):
    (tmp_path / "checkpoints" / ".step_00000002.99.tmp").mkdir(parents=True)
    final = save_checkpoint(tmp_path, 3, {"a": torch.ones(1)}, "fingerprint")
    assert list(final.parent.iterdir()) == [final]


def test_tiny_updates_of_bf16_weights_add_up():
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    master = MasterWeights(Trainable.of([("w", parameter)]), OptimizerConfig(betas=(0.0, 0.0)))
    for step in range(100):
        (1000 * parameter.sum()).backward()
        master.accumulate()
        assert parameter.grad is None
        master.step(1e-4, step)
        if step == 0:
            assert bool((parameter == 1).all())  # smaller than a step of bf16
    torch.testing.assert_close(master.masters[0].detach(), torch.full((4,), 0.99), rtol=1e-4, atol=0)
    assert torch.equal(parameter.detach(), torch.full((4,), 0.99).bfloat16())
    assert bool((parameter < 1).all())


def test_the_masters_are_what_the_weights_were_before_they_were_cast():
    given = torch.nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in given.named_parameters()}
    trainable = compute_in(given, torch.bfloat16)
    assert {p.dtype for p in given.parameters()} == {torch.bfloat16}
    master = MasterWeights(trainable, OptimizerConfig())
    for name, values in trainable.masters.items():
        assert torch.equal(values, before[name])
        assert not torch.equal(values, master.named[name].float())
    given(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    master.accumulate()
    master.step(0.0, 0)
    assert all(torch.equal(p, before[name].bfloat16()) for name, p in given.named_parameters())


def test_the_gradient_is_clipped_and_its_norm_told():
    parameter = torch.nn.Parameter(torch.zeros(4))
    master = MasterWeights(Trainable.of([("w", parameter)]), OptimizerConfig(betas=(0.0, 0.0), eps=1.0))
    (3 * parameter.sum()).backward()
    assert master.step(1.0, 0, max_grad_norm=0.6).item() == pytest.approx(6)
    torch.testing.assert_close(parameter.detach(), torch.full((4,), -0.3 / 1.3), rtol=1e-4, atol=0)


def test_the_average_warms_up_and_vectors_are_not_decayed():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    master = MasterWeights(
        Trainable.of([("m", matrix), ("v", vector)]), OptimizerConfig(weight_decay=0.5), ema_decay=0.9
    )
    (0 * (matrix.sum() + vector.sum())).backward()
    master.step(0.1, 0)
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.95))
    assert torch.equal(vector.detach(), torch.ones(2))
    torch.testing.assert_close(master.ema_state()["m"], torch.full((2, 2), 0.1 * 1 + 0.9 * 0.95))
