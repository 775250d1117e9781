"""Tables by number of steps: each result in the cell of its steps, ratios to the teacher, curves over cost."""

import numpy as np
import pytest

from refine_control.metrics.distances import SetScore
from refine_control.study.plan import read_budget, read_rows
from refine_control.study.row_results import RowFacts, RowResult
from refine_control.study.step_tables import STEP_METRICS, step_curves, step_table, step_tables
from refine_control.study.summary import summarise

BUDGET, ROWS = read_budget("steps"), read_rows()
OBEYED = {"teacher": 100, "few_teacher@4g": 90, "few_teacher@4gs": 70, "edge@1": 95, "edge@4": 97}
SHARPNESS = {"teacher": 2.0, "edge@4": 1.5}


def result(key: str, seed: int = 0, sharp: bool = True) -> RowResult:
    trained = 10 if key.startswith("edge") else 0
    scores = {"both": np.full(8, float(OBEYED[key]))}
    scores |= {"sharpness": np.full(8, SHARPNESS.get(key, 1.0))} if sharp else {}
    sets = {"scene_frechet": SetScore(20.0, np.full(3, 20.0))}
    facts = RowFacts(num_layers=12, gflops_step=0.5, seconds_per_image=0.25)
    return RowResult(key, seed, "", scores, sets, facts, trained, 2)


def study(keys=tuple(OBEYED), sharp=True):
    results = {key: [result(key, seed, sharp) for seed in range(2 if key.startswith("edge") else 1)] for key in keys}
    return summarise(results, ["both", "sharpness"], ()), {key: ROWS[key] for key in keys}


def cells(table) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}


def test_each_result_stands_in_the_column_of_its_steps():
    table = step_table(*study(), BUDGET, STEP_METRICS["obeyed"])
    assert table.columns == ["row", "seeds", "calls a step", "1 step", "4 steps", "20 steps"]
    rows = cells(table)
    assert len(rows) == 3
    assert rows["edge, 12 layers"]["1 step"].startswith("95.0 ")
    assert rows["edge, 12 layers"]["4 steps"].startswith("97.0 ")
    assert (rows["edge, 12 layers"]["seeds"], rows["edge, 12 layers"]["calls a step"]) == ("2", "1")
    guided, stock = rows["teacher, 23 layers, guided"], rows["teacher, 23 layers, guided, stock's spacing"]
    assert (guided["4 steps"].split()[0], guided["calls a step"], guided["seeds"]) == ("90.0", "2", "")
    assert (stock["4 steps"].split()[0], stock["20 steps"].split()[0]) == ("70.0", "100.0")


def test_ratios_are_to_the_teacher_of_the_other_tables():
    share = cells(step_table(*study(), BUDGET, STEP_METRICS["obeyed_share"]))
    assert share["edge, 12 layers"]["4 steps"].split()[0] == "97.0"
    sharp = cells(step_table(*study(), BUDGET, STEP_METRICS["sharpness"]))
    assert sharp["edge, 12 layers"]["4 steps"].split()[0] == "75"
    assert step_table(*study(sharp=False), BUDGET, STEP_METRICS["sharpness"]) is None
    assert len(step_tables(*study(), BUDGET)) == 4
    assert len(step_tables(*study(sharp=False), BUDGET)) == 3


def test_other_studies_have_neither():
    summary, rows = study(["teacher"])
    assert step_tables(summary, rows, BUDGET) == step_curves(summary, rows, BUDGET) == []


@pytest.mark.parametrize(("title", "cost"), [("seconds a picture", 0.25), ("GFLOP a picture", 2.0)])
def test_curves_are_over_the_cost_of_a_picture(title, cost):
    curves = {curve.title: curve for curve in step_curves(*study(), BUDGET)}
    assert len(curves) == 4
    costs, values = curves[f"both obeyed % against {title}"].series["edge, 12 layers"]
    assert (costs[-1], values) == (cost, [95.0, 97.0])
