"""Every row of a table is something else, and all rows share what must be equal."""

import json

import pytest

from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.recipe_files import load_recipe
from refine_control.study.plan import (
    TARGETS,
    TEACHER,
    Sampling,
    anchor_row,
    read_budget,
    read_rows,
    row_recipes,
    select_rows,
    stage_steps,
)

SCALES = ("mini", "sd3")
ROWS = {(scale, key): row for scale in SCALES for key, row in read_rows(scale).items()}
BUDGETS = {"mini": read_budget("long"), "sd3": read_budget("paper", scale="sd3")}
TRAINED = [key for key, row in ROWS.items() if row.stages]


def what_differs(scale: str, key: str) -> str:
    """Everything of a row that training can feel; names and the paper's numbers it cannot."""
    row = ROWS[scale, key]
    recipes = row_recipes(row, BUDGETS[scale], 0).values()
    told = [r.model_dump(mode="json", exclude={"name", "paper"}) for r in recipes]
    return json.dumps(
        [told, row.injection, row.baseline, row.data.model_dump(), str(row.sampling), row.controlnet], sort_keys=True
    )


@pytest.mark.parametrize("scale", SCALES)
def test_no_two_rows_are_the_same_run(scale):
    keys = [key for of, key in ROWS if of == scale]
    assert len({what_differs(scale, key) for key in keys}) == len(keys) >= 12


@pytest.mark.parametrize("scale", SCALES)
def test_every_row_of_the_paper_is_there_and_one_is_the_reference(scale):
    rows = read_rows(scale)
    assert {
        "teacher",
        "fc",
        "ssd",
        "ours",
        "wo_mask",
        "one_stage",
        "sl",
        "wo_cf",
        "dreamshaper8",
        "sd2",
        "flux",
    } <= set(rows)
    assert [key for key, row in rows.items() if row.reference] == [anchor_row(TARGETS["table1"], scale=scale)]
    assert anchor_row(TARGETS["table1"], scale=scale) == {"mini": "inherit", "sd3": "ours"}[scale]


@pytest.mark.parametrize("which", TRAINED)
def test_rows_share_everything_but_what_they_are_about(which):
    scale = which[0]
    row, budget = ROWS[which], BUDGETS[scale]
    recipes = list(row_recipes(row, budget, 3).values())
    reference = next(iter(row_recipes(ROWS[scale, "ours"], budget, 3).values()))
    assert sum(r.training.steps for r in recipes) == round(budget.steps * sum(row.stages.values()))
    longer = row.sampling or which[1].endswith("_long")  # what they are about is how long they train
    assert longer or sum(row.stages.values()) == pytest.approx(1)
    for recipe in recipes:
        assert (recipe.training.batch_size, recipe.training.seed) == (budget.batch_size, 3)
        assert (recipe.model, recipe.teacher) == (reference.model, reference.teacher)
        assert recipe.optimizer == reference.optimizer
        assert recipe.sigmas == reference.sigmas
        if "student.num_layers" not in row.settings:
            assert recipe.student.num_layers == reference.student.num_layers
        dropout = 0.0 if recipe.objective.is_few_step else reference.training.prompt_dropout
        assert recipe.training.prompt_dropout == dropout
        assert recipe.training.precision == budget.precision


def test_a_row_changes_the_student_and_its_loss_and_no_more():
    told = {key for row in ROWS.values() for key in row.settings}
    assert "student.num_layers" in told
    assert all(key.startswith(("student.", "objective.")) for key in told)


@pytest.mark.parametrize("steps", [2, 3, 101])
def test_shares_of_steps_add_up(steps):
    for row in ROWS.values():
        steps = max(steps, 4 * len(row.stages))
        shares = stage_steps(row, steps)
        assert sum(shares.values()) == round(steps * sum(row.stages.values()))
        assert all(n >= 1 for n in shares.values())


def test_without_the_mask_weight_means_a_weight_of_one():
    ours, without = (load_recipe(n).objective.weights for n in ("mini/ours_stage1", "mini/wo_mask"))
    assert without.alpha == 0.5  # J / 2 everywhere, inside the square
    assert without.task * without.alpha**2 == ours.task


def test_a_base_gives_what_a_recipe_does_not_say(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: mini/fc\nname: mine\noptimizer:\n  learning_rate: 2e-4\n")
    mine, base = load_recipe(tmp_path / "mine.yaml"), load_recipe("mini/fc")
    assert mine.optimizer.learning_rate == 2e-4
    assert mine.optimizer.warmup_steps == base.optimizer.warmup_steps
    assert mine.objective == base.objective
    assert base.paper
    assert mine.paper is None


@pytest.mark.parametrize("base", ["3", "no/such", "{loop}"])
def test_a_base_that_is_none_is_refused(tmp_path, base):
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {base.format(loop=path)}\nname: mine\n")
    with pytest.raises(InvalidInputError, match=r"base is|no recipe is named"):
        load_recipe(path)


def test_a_budget_that_does_not_exist_is_refused():
    with pytest.raises(InvalidInputError, match="there is no budget lnog"):
        read_budget("lnog")


def test_a_row_is_measured_in_each_of_its_ways():
    edge = {key: row for key, row in read_rows().items() if key.startswith("edge@")}
    assert set(edge) >= {"edge@1", "edge@2", "edge@4", "edge@8"}
    assert len({json.dumps(row.stages) for row in edge.values()}) == 1
    assert edge["edge@4"].title.endswith(", 4 steps")
    assert edge["edge@4"].sampling == Sampling(4, False)
    chosen = select_rows(TARGETS["steps"], ["edge"])
    assert set(chosen) == {TEACHER, *edge}
    assert "fc" not in select_rows(TARGETS["steps"])


@pytest.mark.parametrize("text", ["4", "20g", "4gs", "2n", "1gsn"])
def test_a_way_of_sampling_reads_as_it_is_written(text):
    assert str(Sampling.parse(text)) == text


def test_a_way_of_sampling_changes_steps_guidance_and_noise_levels():
    sampler = SamplerConfig(num_inference_steps=20, guidance_scale=3.0, seed=5)
    changed = Sampling.parse("4").apply(sampler)
    assert changed == sampler.model_copy(
        update={"num_inference_steps": 4, "guidance_scale": 1.0, "sigmas": "even", "stochastic": False}
    )
    assert Sampling.parse("2gsn").apply(sampler) == sampler.model_copy(
        update={"num_inference_steps": 2, "stochastic": True}
    )


def test_settings_of_an_objective_are_those_of_the_stage_for_few_steps():
    row = ROWS["mini", "lines@4"]
    recipes = row_recipes(row, BUDGETS["mini"], 0)
    assert recipes["mini/end_points"].objective.few_step.points == "line"
    assert (
        recipes["mini/balanced_stage1"]
        == row_recipes(ROWS["mini", "edge@4"], BUDGETS["mini"], 0)["mini/balanced_stage1"]
    )
