"""Tables and curves of a study of steps: what was trained once, sampled with one step, two, four and more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from refine_control.metrics.statistics import Interval
from refine_control.study.curves import Curve
from refine_control.study.plan import TEACHER, Budget, Row, Sampling
from refine_control.study.summary import ModelSummary, Summary, ratio_of_means
from refine_control.study.tables import Table


class StepMetric(NamedTuple):
    """A metric that blur does not improve, as tables show it."""

    metric: str
    heading: str
    spec: str
    relative: bool = False
    """In per cent of the teacher's mean, as the teacher is sampled in the other tables."""

    def value(self, model: ModelSummary, teacher: ModelSummary | None) -> Interval | None:
        """None where the model, or for a ratio the teacher, was measured without it."""
        if not self.relative:
            return model.mean.get(self.metric)
        share = ratio_of_means(model.results, teacher.results, self.metric) if teacher else None
        return share and share.scaled(100)


STEP_METRICS = {
    "obeyed": StepMetric("both", "both obeyed %", ".1f"),
    "obeyed_share": StepMetric("both", "obeyed, % of the teacher's", ".1f", relative=True),
    "frechet": StepMetric("scene_frechet", "scene Fréchet (less)", ".2f"),
    "sharpness": StepMetric("sharpness", "high-pass energy, % of the teacher's", ".0f", relative=True),
}
NOTE = (
    "A call is one pass of ControlNet and transformer; a step with guidance makes two. Noise levels are even, but in "
    "lines of stock's spacing."
)


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
        out.setdefault(_Line(title + special, 1 + way.guided), {})[way.steps] = model
    return out


def step_table(summary: Summary, rows: Mapping[str, Row], budget: Budget, shown: StepMetric) -> Table | None:
    """A row for what was trained and a column for each number of steps; None where no model has the metric."""
    lines, teacher = _lines(summary, rows, budget), summary.models.get(TEACHER)
    steps = sorted({count for each in lines.values() for count in each})
    cells = []
    for line, models in lines.items():
        values = {n: shown.value(model, teacher) for n, model in models.items()}
        texts = [format(value, shown.spec) if (value := values.get(n)) else "" for n in steps]
        seeds = str(max(len(model.seeds) for model in models.values() if model.trained)) if _trained(models) else ""
        cells.append([line.title, seeds, str(line.calls), *texts])
    if not any(text for row in cells for text in row[3:]):
        return None
    columns = ["row", "seeds", "calls a step", *(f"{n} step{'s' * (n > 1)}" for n in steps)]
    return Table(f"{shown.heading}, by number of steps", columns, cells, [NOTE])


def _trained(models: Mapping[int, ModelSummary]) -> bool:
    return any(model.trained for model in models.values())


def step_tables(summary: Summary, rows: Mapping[str, Row], budget: Budget) -> list[Table]:
    """A table for each of STEP_METRICS; none where no row is sampled in a way of its own."""
    if not any(row.sampling for row in rows.values()):
        return []
    tables = (step_table(summary, rows, budget, shown) for shown in STEP_METRICS.values())
    return [table for table in tables if table]


def step_curves(summary: Summary, rows: Mapping[str, Row], budget: Budget) -> list[Curve]:
    """Obedience and Fréchet distance against seconds a picture, as the evaluation measured them, and operations."""
    if not any(row.sampling for row in rows.values()):
        return []
    lines, out = _lines(summary, rows, budget), []
    for shown in (STEP_METRICS["obeyed"], STEP_METRICS["frechet"]):
        if shown.metric not in summary.metrics:
            continue
        for label in ("seconds a picture", "GFLOP a picture, ControlNet and transformer"):
            points = {}
            for line, models in lines.items():
                costs = [_cost(models[n], n * line.calls, label) for n in sorted(models)]
                points[line.title] = (costs, [models[n].mean[shown.metric].mean for n in sorted(models)])
            if all(cost for costs, _ in points.values() for cost in costs):
                out.append(Curve(f"{shown.heading} against {label.split(',')[0]}", points, x_label=label))
    return out


def _cost(model: ModelSummary, calls: int, label: str) -> float:
    """Of a picture, a mean over seeds; 0 where it is not known."""
    facts = [result.facts for result in model.results]
    if label.startswith("seconds"):
        return float(np.mean([each.seconds_per_image or 0.0 for each in facts]))
    return calls * (facts[0].gflops_step or 0.0)
