"""The bench compares like with like: losses and gradients of a loop over stock diffusers. No time is asserted."""

import pytest
import torch

from refine_control.bench import step
from refine_control.bench.step import OURS, STOCK, STOCK_OPEN, OurStep, bench_step, make_batch
from refine_control.bench.stock_step import StockStep
from refine_control.config import Recipe
from refine_control.errors import InvalidInputError
from refine_control.metrics.cost import FreshRun
from refine_control.recipe_files import load_recipe
from refine_control.storage import write_json
from refine_control.training.run import fast_precision, make_objective


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
        three_steps(*arguments)
        return FreshRun(1.0, 1)

    monkeypatch.setattr(step, "run_fresh", run_here)  # tests/metrics/test_cost.py tests it
    found = bench_step(recipe, repeats=1)
    bf16 = fast_precision(torch.device(found.device)) == "bf16"
    for name, difference in found.loss_difference.items():
        assert difference < (5e-3 if name == OURS and bf16 else 1e-5), name
    for name, difference in found.gradient_difference.items():
        assert difference < (3e-2 if name == OURS and bf16 else 1e-4), name
    assert set(found.seconds) == {STOCK, STOCK_OPEN, *found.speedup} == {STOCK, *found.speedup}
    assert set(found.peak_memory) == {STOCK, OURS}
    numbers = [*found.samples_per_second.values(), *found.floor_seconds.values(), *found.peak_memory.values()]
    assert all(number > 0 for number in (found.gflops, *numbers))
    assert found.batch_size == 3


@pytest.mark.parametrize("name", ["mini/balanced_stage1", "mini/ours_stage1"])
def test_the_plain_loop_has_the_loss_of_the_recipe(recipe, name):
    measured = recipe.model_copy(update={"objective": load_recipe(name).objective})
    device = torch.device("cpu")
    ours, stock = OurStep(measured, device, "fp32"), StockStep(measured, device)
    batch, draw = make_batch(measured, ours.backbone, device)
    loss = ours.backward(batch, draw)
    assert stock.backward(batch, draw) == pytest.approx(loss, rel=1e-5)
    for parameter in ours.parameters.values():
        parameter.grad = None
    losses = ours.objective.losses(batch, draw)
    train = make_objective(measured.objective, ours.networks).losses(batch, draw)
    assert all(torch.equal(a, b) for a, b in zip(losses, train, strict=True))


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


def test_another_objective_is_refused(recipe):
    other = recipe.model_copy(update={"objective": recipe.objective.model_copy(update={"kind": "from_scratch"})})
    with pytest.raises(InvalidInputError, match="supervised"):
        bench_step(other, repeats=1)
