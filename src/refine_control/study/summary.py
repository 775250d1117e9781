"""What is said of several models measured on the same samples: means, paired differences and shares of the gap.

Models are rows of a table with their seeds, or the models of one `evaluate`, which have one result each.
"""

# S seeds, N test samples

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from refine_control.conditions.condition import INPAINT
from refine_control.metrics.distances import set_difference, set_interval
from refine_control.metrics.statistics import (
    BOOTSTRAP_SEED,
    Interval,
    gap_closed,
    mean_ratio,
    paired_difference,
    two_level,
)
from refine_control.miniature.tasks.task import all_tasks
from refine_control.study.feature_metrics import SET_METRICS
from refine_control.study.plan import BASELINE, TEACHER
from refine_control.study.row_results import RowResult

OBEYED = ("colour", "shape", "both")
"""What the oracle of inpainting reads in the hole; percentages."""
_TASKS = [task for name, task in all_tasks().items() if name != INPAINT]
HEADLINES = tuple(dict.fromkeys(task.headline for task in _TASKS))
"""By which the oracles of other conditions are named; more is better."""
_ORACLES = tuple(dict.fromkeys(metric for task in _TASKS for metric in task.headings))
ROW_METRICS = (
    *("psnr_region", "psnr", "psnr_kept", "ssim", "sharpness", "lpips", "lpips_kept"),
    *(*OBEYED, *_ORACLES),
    *("clip_local", "clip_global", "clip_other", "scene_perceptual"),
)
"""Metrics per sample of the tables of rows, in the order of their columns."""
GAP_METRICS = ("psnr_region", "both", *HEADLINES)
"""Metrics that a share of the gap is given for."""
Intervals = dict[str, Interval]
"""By metric."""


@dataclass(frozen=True)
class ModelSummary:
    """One model over its seeds; means are computed where they are read."""

    results: Sequence[RowResult]
    per_sample: Sequence[str]
    of_sets: Sequence[str]

    @cached_property
    def mean(self) -> Intervals:
        """Of every metric."""
        means = {m: two_level(self.stacked(m), BOOTSTRAP_SEED) for m in self.per_sample}
        return means | {m: set_interval([r.sets[m] for r in self.results], BOOTSTRAP_SEED) for m in self.of_sets}

    @cached_property
    def spread(self) -> dict[str, float]:
        """Standard deviation of the seeds' means, of metrics per sample; empty for one seed."""
        several = len(self.results) > 1
        return {m: float(self.stacked(m).mean(1).std(ddof=1)) for m in self.per_sample if several}

    def stacked(self, metric: str) -> np.ndarray:
        """(S, N)"""
        return np.stack([r.scores[metric] for r in self.results])

    @property
    def seeds(self) -> list[int]:
        """Its training seeds."""
        return [result.seed for result in self.results]

    @property
    def samples(self) -> int:
        """Test samples of one seed."""
        return max((len(values) for values in self.results[0].scores.values()), default=0)

    @property
    def trained(self) -> bool:
        """False for the teacher and for baselines."""
        return self.results[0].steps > 0


@dataclass(frozen=True)
class Summary:
    """Several models on the same samples."""

    metrics: list[str]
    """Those that every model has, per sample first."""
    models: dict[str, ModelSummary]
    differences: dict[tuple[str, str], Intervals]
    """(left, right): left - right, paired by sample and seed."""
    gap_closed: dict[str, Intervals] = field(default_factory=dict)
    """By model, then metric of GAP_METRICS: share of the gap between fc and the teacher. The ends are infinite (not
    bounded) if the gap is not statistically distinguishable from zero; a metric is absent if the teacher's mean is
    not above fc's."""

    @property
    def samples(self) -> int:
        """Test samples of one seed."""
        return next(iter(self.models.values())).samples

    def minus(self, left: str, right: str) -> Intervals | None:
        """The differences left - right, if they were asked for."""
        return self.differences.get((left, right))


def ratio_of_means(results: Sequence[RowResult], reference: Sequence[RowResult], metric: str) -> Interval | None:
    """A metric's mean over that of a reference model, paired by sample and seed: 0.8 of the teacher's sharpness.

    None where a result of either lacks the metric or they share no seed."""
    pair = common_seeds(results, reference)
    if not all(pair) or any(metric not in r.scores for each in pair for r in each):
        return None
    values, reference_values = (_values(each, metric) for each in pair)
    return mean_ratio(values, reference_values, BOOTSTRAP_SEED)


def summarise(
    results: Mapping[str, Sequence[RowResult]],
    metrics: Iterable[str],
    pairs: Iterable[tuple[str, str]],
    shares: Iterable[str] | None = None,
) -> Summary:
    """Summarises every model by those of `metrics` (per sample) and of SET_METRICS that all results have.

    Args: `pairs` of models for differences; models for `shares` of the gap, by default all that are trained but fc.
    Pairs are of the training seeds that both have; a model that is not trained is paired with every seed."""
    everything = [r for each in results.values() for r in each]
    per_sample = [m for m in metrics if m not in SET_METRICS and all(m in r.scores for r in everything)]
    of_sets = [m for m in SET_METRICS if everything and all(m in r.sets for r in everything)]
    models = {key: ModelSummary(each, per_sample, of_sets) for key, each in results.items()}
    differences = {}
    for left, right in pairs:
        one, other = common_seeds(results[left], results[right])
        if not (one and other):
            continue
        pair = {m: paired_difference(_values(one, m), _values(other, m), BOOTSTRAP_SEED) for m in per_sample}
        sets = {m: ([r.sets[m] for r in one], [r.sets[m] for r in other]) for m in of_sets}
        differences[left, right] = pair | {m: set_difference(*both, BOOTSTRAP_SEED) for m, both in sets.items()}
    if shares is None:
        shares = [key for key, model in models.items() if model.trained and key != BASELINE]
    gaps = {TEACHER, BASELINE} <= set(results)
    closed = {key: _gap_closed(results, key, per_sample) for key in shares if gaps and key in results}
    return Summary([*per_sample, *of_sets], models, differences, closed)


def _values(results: Sequence[RowResult], metric: str) -> np.ndarray:
    """(S, N); (N,) of a model with one result."""
    values = np.stack([r.scores[metric] for r in results])
    return values[0] if len(values) == 1 else values


def common_seeds(
    left: Sequence[RowResult], right: Sequence[RowResult]
) -> tuple[Sequence[RowResult], Sequence[RowResult]]:
    """The results of the training seeds that both models have; all if one of them is not trained."""
    if not (left[0].steps and right[0].steps):
        return left, right
    seeds = {r.seed for r in left} & {r.seed for r in right}
    return [r for r in left if r.seed in seeds], [r for r in right if r.seed in seeds]


def _gap_closed(results: Mapping[str, Sequence[RowResult]], key: str, metrics: Sequence[str]) -> Intervals:
    """By metric of GAP_METRICS the share of the gap between fc and the teacher that a model closes."""
    out = {}
    baseline, model = common_seeds(results[BASELINE], results[key])
    for m in GAP_METRICS:
        if m in metrics and model:
            teacher, bottom, middle = (_values(each, m) for each in (results[TEACHER], baseline, model))
            if np.mean(teacher) > np.mean(bottom):
                out[m] = gap_closed(teacher, bottom, middle, seed=BOOTSTRAP_SEED)
    return out


def summarise_rows(results: Mapping[str, Sequence[RowResult]], against: str) -> Summary:
    """The summary of rows: differences of each to the row `against`, and of the teacher to each trained row."""
    pairs = [(key, against) for key in results if key != against and against in results]
    trained = [key for key, each in results.items() if each[0].steps]
    pairs += [(TEACHER, key) for key in trained if TEACHER in results and (TEACHER, key) not in pairs]
    return summarise(results, ROW_METRICS, pairs)


def intervals_json(intervals: Intervals) -> dict[str, object]:
    """As files hold them: an infinite end is null."""
    return {m: interval.as_json() for m, interval in intervals.items()}


def rows_json(summary: Summary, against: str) -> dict[str, object]:
    """A summary of rows as tables.json holds it."""
    rows = {}
    for key, model in summary.models.items():
        row: dict[str, object] = {"seeds": model.seeds, "samples": model.samples}
        row |= {"facts": [r.facts_json() for r in model.results], "mean": intervals_json(model.mean)}
        row |= {"spread": model.spread} if model.spread else {}
        minus, teacher_minus = summary.minus(key, against), summary.minus(TEACHER, key) if model.trained else None
        row |= {"minus": intervals_json(minus)} if minus else {}
        row |= {"teacher_minus": intervals_json(teacher_minus)} if teacher_minus else {}
        rows[key] = row
    shares = {key: intervals_json(each) for key, each in summary.gap_closed.items()}
    return {"metrics": summary.metrics, "against": against, "rows": rows, "gap_closed": shares}
