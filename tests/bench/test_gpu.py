"""The measurements for a GPU run on a CPU with small networks, outlive each other's failures, and continue."""

import json
import os

import pytest
import torch

from refine_control.bench import gpu
from refine_control.bench.gpu import OURS, RESULTS, Measurement, Outcome, bench_gpu, measure, measure_alone
from refine_control.bench.random_networks import RandomTokens, random_networks
from refine_control.bench.step import PEERS, SCRIPT, SCRIPT_TEXT, STOCK, comparable
from refine_control.config import Recipe
from refine_control.errors import MissingError
from refine_control.metrics.cost import Spread, time_call
from refine_control.storage import write_json
from refine_control.training.memory import MemoryPlan

PLAN = MemoryPlan(2, 1, 1, 0, 1, 0, 1, {}, 50, 10**6)
RATES = {"fp32": 1.0, "bf16": 1.0}
WHOLE = {"batch_size": 2, "device_batch_size": 0, "gradient_checkpointing": False}


@pytest.fixture(scope="module")
def recipe(tiny_backbone, tmp_path_factory):
    """Of the tiny model, whose configs alone are read."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_backbone.pipeline.save_pretrained(folder)
    write_json(folder / "refine_control.json", {"max_sequence_length": 0})
    values = {"name": "tiny", "model": str(folder), "student": {"num_layers": 2}, "training": {"precision": "fp32"}}
    return Recipe.model_validate(values)


def timed_once(call):
    return Spread(*[time_call(call, warmup=0, repeats=1).median] * 3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(gpu, "_timed", timed_once)
    monkeypatch.setattr(gpu, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(gpu, "plan_memory", lambda *_, **__: PLAN)  # tests/training/test_memory.py tests it


def test_the_steps_have_equal_losses_and_the_plan_of_their_memory(recipe):
    outcomes = {name: measure(Measurement(name, WHOLE, name), recipe, RATES) for name in (OURS, SCRIPT)}
    assert {each.problem for each in outcomes.values()} == {""}
    assert [each.loss for each in outcomes.values()] == pytest.approx([outcomes[OURS].loss] * 2, rel=1e-4)
    assert outcomes[OURS].loss > 0.1
    assert all(each.seconds.median > 0 and each.samples == 2 for each in outcomes.values())
    ours = outcomes[OURS]
    assert ours.share == pytest.approx(2 * 10**6 / ours.seconds.median / 1e9)
    assert (ours.planned, outcomes[SCRIPT].planned) == (50, 0)


def test_a_loss_on_decoded_pictures_has_its_vae(recipe):
    objective = {"kind": "codi", "x0_source": "truth", "few_step": {"distance": "pixel"}}
    decoding = Recipe.model_validate({**recipe.model_dump(), "objective": objective})
    assert measure(Measurement(OURS, WHOLE), decoding, RATES).problem == ""


@pytest.mark.slow
def test_compiled_blocks_have_the_loss_of_eager_ones(recipe, monkeypatch):
    compiled, compile_as_usual = [], torch.compile

    def traced(call, **_):
        compiled.append(call)
        return compile_as_usual(call, backend="aot_eager")  # as inductor's graphs, without a compiler

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr("torch._dynamo.config.fail_on_recompile_limit_hit", True)
    eager, other = (measure(Measurement(OURS, {**WHOLE, "compile": on}), recipe, RATES) for on in (False, True))
    assert (eager.problem, other.problem) == ("", "")
    assert other.loss == pytest.approx(eager.loss, rel=1e-5)
    assert len(compiled) == 24 + 23 + 2


def test_prompts_are_encoded_and_pictures_painted_with_random_text_encoders(recipe):
    for each in (
        Measurement(SCRIPT_TEXT, WHOLE, SCRIPT_TEXT),
        Measurement("one step", {}, "", painting=("student", 1, False)),
    ):
        outcome = measure(each, recipe, RATES)
        assert outcome.problem == ""
        assert outcome.seconds.median > 0


def test_random_networks_are_equal_in_both_types(recipe):
    device = torch.device("cpu")
    asked = comparable(recipe)
    bf16 = asked.model_copy(update={"training": asked.training.model_copy(update={"precision": "bf16"})})
    parts = [dict(random_networks(each, device).trainable.masters) for each in (asked, bf16)]
    assert parts[0].keys() == parts[1].keys()
    assert all(torch.equal(parts[0][name].float(), parts[1][name]) for name in parts[0])
    assert all(bool(value.any()) for name, value in parts[0].items() if name.startswith("controlnet_blocks"))
    assert RandomTokens(9, 4)(["a", "b"]).input_ids.shape == (2, 4)


def outcome_of(name, problem=""):
    memory = {OURS: 6, STOCK: 9}.get(name, 12)
    return Outcome(Spread(2.0 if name == OURS else 5.0, 1, 9), 2, 0.5, memory * 10**9, problem=problem)


def test_what_fails_is_a_line_and_the_next_call_continues(recipe, tmp_path, monkeypatch):
    asked = []
    problems = {STOCK: "out of memory", "ours, compiled blocks": "RuntimeError: no compiler"}

    def stand_in(each, *_):
        asked.append(each.name)
        return outcome_of(each.name, problems.get(each.name, ""))

    monkeypatch.setattr(gpu, "measure", stand_in)
    first = bench_gpu(recipe, tmp_path, 10, small=True)
    assert asked == [each.name for each in gpu.measurements(2, 2)]
    assert "not measured: RuntimeError: no compiler" in first.text
    assert f"as fast as {STOCK}" not in first.text
    assert f"ours is 2.50 times as fast as {SCRIPT}, with 0.50 of its peak memory" in first.text
    asked.clear()
    problems.clear()
    again = bench_gpu(recipe, tmp_path, 10, small=True)
    assert asked == ["ours, compiled blocks"]
    assert again.outcomes[STOCK].problem == "out of memory"
    assert json.loads((tmp_path / RESULTS).read_text())["outcomes"][OURS]["peak"] == 6 * 10**9
    asked.clear()
    late = bench_gpu(recipe, tmp_path / "late", 0, small=True)
    assert asked == []
    assert {each.problem for each in late.outcomes.values()} == {"no time was left"}
    bench_gpu(recipe.model_copy(update={"name": "other"}), tmp_path, 10, small=True)
    assert len(asked) == len(late.outcomes)


def die(each, recipe, rates):
    del recipe, rates
    if each.name == "dies":
        os._exit(9)
    return Outcome(samples=3)


def test_a_process_that_dies_is_a_line(recipe, monkeypatch):
    monkeypatch.setattr(gpu.multiprocessing, "get_context", lambda _: gpu.multiprocessing)  # a fork has the stand-in
    monkeypatch.setattr(gpu, "measure", die)
    assert measure_alone(Measurement("lives", {}), recipe, RATES, 60) == Outcome(samples=3)
    assert measure_alone(Measurement("dies", {}), recipe, RATES, 60).problem == "its process died with code 9"
    assert measure_alone(Measurement("lives", {}), recipe, RATES, 0).problem in ("", "no time was left")


def test_without_a_gpu_a_sentence_says_so(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "best_device", lambda: torch.device("cpu"))
    with pytest.raises(MissingError, match="sees no GPU"):
        bench_gpu(recipe, tmp_path, 10)
    assert set(PEERS) < {each.name for each in gpu.measurements(2, 8)}


def test_calls_are_timed_for_as_long_as_there_is_time(monkeypatch):
    monkeypatch.undo()
    calls = []
    assert gpu._timed(lambda: calls.append(0)).median >= 0
    assert len(calls) == 1 + 20
    monkeypatch.setattr(gpu, "_LONG", 0.0)
    gpu._timed(lambda: calls.append(0))
    assert len(calls) == 21 + 1 + 2


def test_memory_that_is_full_is_named(recipe, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "random_networks", full)
    assert measure(Measurement(OURS, WHOLE), recipe, RATES).problem == "out of memory"


def test_settings_that_save_memory_have_the_loss_of_the_step_without_them(recipe):
    listed = {each.name: each for each in gpu.measurements(2, 2)}
    names = [f"ours, {name}" for name, *_ in gpu._MEMORY]
    assert [listed[name].optimizer for name in names if "AdamW" in name] == ["adamw8bit"]
    offloaded, int8 = (measure(listed[name], recipe, RATES) for name in (names[4], names[1]))
    assert (offloaded.problem, int8.problem) == ("", "")
    assert 0 < abs(int8.loss / offloaded.loss - 1) < 0.01
