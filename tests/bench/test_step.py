"""The bench compares like with like: losses and gradients of a loop over stock diffusers. No time is asserted."""

import copy

import pytest
import torch

from refine_control.bench import step
from refine_control.bench.step import (
    OURS,
    PEERS,
    SCRIPT,
    SCRIPT_TEXT,
    OurStep,
    bench_step,
    comparable,
    make_batch,
    refuse_unequal,
)
from refine_control.bench.stock_step import StockStep
from refine_control.config import Recipe
from refine_control.metrics.cost import FreshRun
from refine_control.recipe_files import load_recipe
from refine_control.storage import write_json
from refine_control.training.assembly import assemble
from refine_control.training.run import new_student


@pytest.fixture(scope="module")
def recipe(tiny_backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_backbone.pipeline.save_pretrained(folder)
    write_json(folder / "refine_control.json", {"max_sequence_length": 0})
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": str(folder),
            "student": {"num_layers": 5, "init": "teacher"},
            "training": {"batch_size": 3, "conditioning_scale": 0.9},
            "sigmas": {"logit_mean": 0.5},
        }
    )


@pytest.mark.slow
def test_every_step_has_the_losses_and_gradients_of_the_plain_loop(recipe, monkeypatch):
    def run_here(three_steps, *arguments, device):
        if SCRIPT_TEXT in arguments:
            three_steps(*arguments)
        return FreshRun(1.0, 1)

    monkeypatch.setattr(step, "run_fresh", run_here)  # tests/metrics/test_cost.py tests it
    report = bench_step(recipe, repeats=1)  # compares losses and gradients
    assert report.loss_difference[SCRIPT] < 1e-6
    assert report.loss_difference[SCRIPT_TEXT] < 1e-6
    assert set(report.seconds) == set(report.fraction_of_floor) == {*PEERS, *report.speedup}
    assert all(set(peers) == set(PEERS) for peers in report.speedup.values())
    assert set(report.peak_memory) == {*PEERS, OURS}
    numbers = [*report.samples_per_second.values(), *report.floor_seconds.values(), *report.peak_memory.values()]
    assert all(number > 0 for number in (report.gflops, report.loss, *numbers))
    assert report.batch_size == 3
    assert f"{OURS} is" in report.text


KINDS = ["balanced_stage1", "ours_stage2", "fc", "one_stage", "ssd", "codi_whole", "end_points", "windows"]


@pytest.mark.parametrize("name", KINDS)
def test_the_plain_loop_has_the_loss_of_the_recipe(recipe, tiny_backbone, name):
    packaged = load_recipe(f"mini/{name}")
    student = recipe.student.model_copy(update={"num_layers": 2, "backbone": packaged.student.backbone})
    training = recipe.training.model_copy(update={"batch_size": 2})
    update = {"objective": packaged.objective, "student": student, "training": training}
    measured, device = comparable(recipe.model_copy(update=update)), torch.device("cpu")

    def load(asked, device):
        backbone = copy.copy(tiny_backbone)
        backbone.transformer = copy.deepcopy(tiny_backbone.transformer)
        return assemble(asked, backbone, *new_student(asked, backbone), device, cpu_kernels=False)

    ours, stock = OurStep(measured, device, "fp32", load), StockStep(measured, device, load)
    batch, draw = make_batch(measured, ours.backbone, device)
    loss = ours.backward(batch, draw)
    assert stock.backward(batch, draw) == pytest.approx(loss, rel=1e-5)
    gradients = [{n: p.grad for n, p in each.parameters.items() if p.grad is not None} for each in (ours, stock)]
    assert step._distance(*gradients) < 1e-3
    ours.update()
    stock.update()
    assert all(parameter.grad is None for each in (ours, stock) for parameter in each.parameters.values())


def test_steps_that_differ_are_refused():
    refuse_unequal("losses", {"ours": 1e-5}, {"ours": 1e-4})
    for wrong in (1e-3, float("nan")):
        with pytest.raises(AssertionError, match="losses differ from those of stock"):
            refuse_unequal("losses", {"ours": wrong}, {"ours": 1e-4})


def test_threads_of_a_recipe_hold_for_its_measurement_alone(recipe, monkeypatch):
    used = []

    def stop():
        used.append(torch.get_num_threads())
        raise InterruptedError

    monkeypatch.setattr("refine_control.bench.step.training_device", stop)
    training = recipe.training.model_copy(update={"threads": 2})
    with pytest.raises(InterruptedError):
        bench_step(recipe.model_copy(update={"training": training}), repeats=1)
    assert (used, torch.get_num_threads()) == ([2], 1)
