"""The bill of a run: sums, prices, what does not fit, and bytes on the disk."""

import json

import pytest
import torch

from refine_control.bench import bill, machines
from refine_control.bench.bill import Ask, plan
from refine_control.bench.machines import Machine, named_machine
from refine_control.cache.building import completion_sampler, write_cache
from refine_control.cache.stored import Stored, sample_bytes
from refine_control.cli import app as cli
from refine_control.errors import InvalidInputError
from refine_control.miniature.scene_shards import scene_photos
from refine_control.recipe_files import load_recipe
from refine_control.records import LABELED, UNLABELED
from refine_control.training.memory import MemoryPlan

SMALL = MemoryPlan(4, 10, 10, 0, 10, 0, 10, {"student": 10}, 50_000_000_000, 10**12)


@pytest.fixture(autouse=True)
def planned(monkeypatch):
    """Counting takes seconds, and tests/training/test_memory.py does it."""
    monkeypatch.setattr(bill, "plan_memory", lambda *_, **__: SMALL)


def chain(**asked):
    names = ("mini/balanced_stage1", "mini/balanced_stage2", "mini/edge")
    return plan([load_recipe(name) for name in names], Ask("2xH100", chain=True, **asked))


def test_time_and_money_are_operations_over_the_rate():
    recipe = load_recipe("mini/balanced_stage1", ["training.steps=10", "training.precision=bf16"])
    billed = plan([recipe], Ask("2xH100", price=3.0, efficiency=0.5))
    assert billed.operations == 320 * 10**12
    assert 3600 * billed.hours == pytest.approx(320e12 / (2 * 0.5 * 989.4e12))
    assert billed.money == pytest.approx(billed.hours * 2 * 3.0)
    assert "50.0" in billed.text


def test_the_chain_is_linear_in_samples():
    small, twice, thrice = (chain(samples=1000 * n, pairs=10 * n, tested=100 * n) for n in (1, 2, 3))
    for name in ("operations", "hours", "disk"):
        a, b, c = (getattr(each, name) for each in (small, twice, thrice))
        assert b > a
        assert c - b == pytest.approx(b - a)
    assert "mini/balanced_stage1: training.steps=" in small.text
    assert "passes over 500 samples" in small.text
    names = [stage.name for stage in small.stages]
    trained = [f"train mini/{name}" for name in ("balanced_stage1", "balanced_stage2", "edge")]
    caches = [f"cache {name}" for name in ("labeled", "completions of the teacher", "paths of the teacher")]
    assert names == ["data build", *caches, *trained, "evaluate"]


def test_epochs_make_training_linear_in_samples_too():
    small, twice = (chain(samples=16000 * n, pairs=1600 * n, tested=100 * n, epochs=2) for n in (1, 2))
    assert twice.operations == pytest.approx(2 * small.operations)
    trained = {stage.name: stage.samples for stage in small.stages if stage.name.startswith("train")}
    assert trained["train mini/balanced_stage1"] == 2 * 8000
    assert "to set, with training.batch_size" in small.text


def test_what_does_not_fit_is_said_and_leaves_with_2(monkeypatch, capsys):
    monkeypatch.setattr(bill, "too_large", lambda recipe, *_, **__: f"{recipe.name} is too large")
    monkeypatch.setattr("sys.argv", ["refine-control", "plan", "mini/fc", "--machine", "4090"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "does not fit: mini/fc is too large" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["refine-control", "plan", "mini/fc", "--machine", "H200", "--json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["name"] == "train mini/fc"


def test_machines_are_named_with_a_count():
    assert named_machine("8xh100")[:3] == ("H100", 8, 80e9)
    assert named_machine("4090").count == 1
    for wrong in ("GTX 1", "0x4090", ""):
        with pytest.raises(InvalidInputError, match="4090"):
            named_machine(wrong)


def test_the_efficiency_is_read_from_a_bench(tmp_path):
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"fraction_of_floor": {"ours": 0.25}}))
    billed = plan([load_recipe("mini/fc")], Ask("4090", measured=file))
    assert billed.machine.efficiency == 0.25
    file.write_text("{}")
    with pytest.raises(InvalidInputError, match="bench step"):
        bill.read_efficiency(file)


def test_this_machine_is_measured(monkeypatch):
    monkeypatch.setattr(machines, "memory_bytes", lambda device: 10**9)  # too little: no step is made
    billed = plan([load_recipe("mini/fc", ["training.batch_size=2"])], Ask("this"))
    assert isinstance(billed.machine, Machine)
    assert billed.machine.basis == "assumed"
    assert min(billed.machine.bf16, billed.machine.fp32) > 0
    assert billed.problems


@pytest.mark.parametrize("role", [LABELED, UNLABELED])
@pytest.mark.parametrize(
    "stored",
    [
        Stored(),
        Stored(torch.bfloat16, "int8"),
        Stored(torch.float16, "none", posterior="mean_std"),
        Stored(torch.float16, completions=completion_sampler(2, even=True), path=2),
    ],
    ids=["fp32", "int8", "deviation", "path"],
)
def test_a_cache_has_the_bytes_of_the_plan(tiny_backbone, tmp_path, role, stored):
    photos = list(scene_photos(0, 0, 12))
    write_cache(photos, tmp_path / "cache", tiny_backbone, role, source={}, **stored._asdict())
    written = sum(path.stat().st_size - 128 for path in (tmp_path / "cache").glob("*.npy"))
    config, prompts = tiny_backbone.transformer.config, len({photo.prompt for photo in photos}) + 1
    tokens = [(tiny_backbone.pipeline.tokenizer_max_length, config["joint_attention_dim"])]
    shape = config["in_channels"], (8, 8), tokens, config["joint_attention_dim"], config["pooled_projection_dim"]
    text = sample_bytes(stored, role, *shape) - sample_bytes(stored._replace(prompts="none"), role, *shape)
    expected = 12 * (sample_bytes(stored, role, *shape) - text) + prompts * text
    assert written == pytest.approx(expected, rel=0.02)
