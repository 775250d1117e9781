"""Table 2's baselines beside the teacher and the students: the same photos, prompts and metrics, their own sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from refine_control.baselines.cost import BaselineCost, baseline_cost
from refine_control.baselines.models import load_baseline, recommended
from refine_control.baselines.painting import facts, paint
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.progress import Progress
from refine_control.records import Photo
from refine_control.study.compare import Group, Result, TestSamples
from refine_control.study.feature_metrics import FeatureNetworks


class BaselineRow(NamedTuple):
    """What is known of a baseline beside its pictures and scores."""

    cost: BaselineCost
    facts: dict[str, str]
    """How its pictures were sampled."""
    paper: Mapping[str, float]
    """Its row of Table 2; empty for a folder of the user."""


def add_baselines(
    result: Result,
    named: Mapping[str, str],
    photos: Sequence[Photo],
    sampler: SamplerConfig,
    networks: FeatureNetworks | None = None,
    progress: Progress | None = None,
) -> dict[str, BaselineRow]:
    """Repaints the photos with every baseline and adds its pictures, scores and seconds to `result`.

    `named`: name in the tables -> a short name of KNOWN, a folder or a hub id. Each samples with its own steps and
    scales; seed and precision are the sampler's. One baseline is in memory at a time. Raises what `load_baseline`
    raises, and InvalidInputError for a name that `result` has already and for photos of several sizes."""
    if taken := sorted(set(named) & set(result.scores)):
        raise InvalidInputError(f"the name {taken[0]} is given twice; write --baseline NAME=FOLDER with another name")
    if len({p.mask.shape for p in photos}) > 1:
        raise InvalidInputError("baselines paint samples of one size; build the test shards without --buckets")
    samples, rows = TestSamples(photos, networks), {}
    for number, (name, source) in enumerate(named.items()):
        baseline = load_baseline(source, precision=sampler.precision)
        its_sampler, cost = recommended(baseline, sampler), baseline_cost(baseline)

        def repaint(group: Group, report: Progress) -> np.ndarray:
            return paint(baseline, group.images, group.masks, group.prompts, its_sampler, progress=report)  # noqa: B023

        samples.add(result, name, repaint, progress, (number, len(named)))
        height, width = photos[0].mask.shape
        rows[name] = BaselineRow(cost, facts(baseline, height, width, its_sampler), baseline.card.paper)
    return rows
