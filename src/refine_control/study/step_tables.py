"""Tables and curves of a study of steps: what was trained once, sampled with one step, two, four and more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from refine_control.study.curves import Curve
from refine_control.study.plan import Budget, Row, Sampling
from refine_control.study.summary import ModelSummary, Summary
from refine_control.study.tables import Table

STEP_METRICS = {"both": ("both obeyed %", ".1f"), "scene_frechet": ("scene Fréchet (less)", ".2f")}
"""Metrics that blur does not improve, with the heading and the decimal places of each."""


class _Line(NamedTuple):
    """What was trained, and whether it is sampled with guidance or in another special way."""

    title: str
    calls: int
    """Passes of ControlNet and transformer in a step."""


def _lines(summary: Summary, rows: Mapping[str, Row], budget: Budget) -> dict[_Line, dict[int, ModelSummary]]:
    """The models of each line by number of steps; the teacher of the other tables has the budget's steps."""
    out: dict[_Line, dict[int, ModelSummary]] = {}
    for key, model in summary.models.items():
        way = rows[key].sampling or Sampling(budget.num_inference_steps, budget.guidance_scale > 1, stock=True)
        title = rows[key].title.removesuffix(f", {way.describe()}")
        special = way._replace(steps=1).describe().removeprefix("1 step")
        line = _Line(title + special, 1 + way.guided)
        out.setdefault(line, {})[way.steps] = model
    return out


def step_tables(summary: Summary, rows: Mapping[str, Row], budget: Budget) -> list[Table]:
    """For each metric a row for what was trained and a column for each number of steps; none without such rows."""
    if not any(row.sampling for row in rows.values()):
        return []
    lines = _lines(summary, rows, budget)
    steps = sorted({count for each in lines.values() for count in each})
    out = []
    for metric, (heading, spec) in STEP_METRICS.items():
        if metric not in summary.metrics:
            continue
        cells = [
            [
                line.title,
                str(line.calls),
                *(f"{models[n].mean[metric]:{spec}}" if n in models else "" for n in steps),
            ]
            for line, models in lines.items()
        ]
        columns = ["row", "network calls a step", *(f"{n} step{'s' * (n > 1)}" for n in steps)]
        out.append(
            Table(
                f"{heading} by number of steps",
                columns,
                cells,
                [
                    "A call is one pass of ControlNet and "
                    "transformer; guidance needs two in a step. Noise levels are even but in lines of stock's spacing."
                ],
            )
        )
    return out


def step_curves(summary: Summary, rows: Mapping[str, Row], budget: Budget) -> list[Curve]:
    """The same against seconds a picture, as measured in the evaluation, and against operations a picture."""
    if not any(row.sampling for row in rows.values()):
        return []
    lines, out = _lines(summary, rows, budget), []
    for metric, (heading, _) in STEP_METRICS.items():
        for label in ("seconds a picture", "GFLOP a picture, ControlNet and transformer"):
            points = {}
            for line, models in lines.items():
                costs = [_cost(models[n], n * line.calls, label) for n in sorted(models)]
                points[line.title] = (costs, [models[n].mean[metric].mean for n in sorted(models)])
            if metric in summary.metrics and all(cost for costs, _ in points.values() for cost in costs):
                out.append(Curve(f"{heading} against {label.split(',')[0]}", points, x_label=label))
    return out


def _cost(model: ModelSummary, calls: int, label: str) -> float:
    """Of a picture, a mean over seeds; 0 where it is not known."""
    facts = [result.facts for result in model.results]
    if label.startswith("seconds"):
        return float(np.mean([each.seconds_per_image or 0.0 for each in facts]))
    return calls * (facts[0].gflops_step or 0.0)
