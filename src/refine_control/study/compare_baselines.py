"""Table 2's baselines beside the teacher and the students: the same photos, prompts and metrics, their own sampler."""

# N pictures, H W pixels

from __future__ import annotations

import time
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
from refine_control.study.compare import Result, score
from refine_control.study.feature_metrics import FeatureNetworks, see, set_scores


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
    networks = networks or FeatureNetworks()
    images, masks = np.stack([p.image for p in photos]), np.stack([p.mask for p in photos])
    reference = see(networks, images, masks)
    rows = {}
    for number, (name, source) in enumerate(named.items()):

        def report(done: int, total: int, word: str = "", number: int = number, name: str = name) -> None:
            if progress:
                progress(number * total + done, len(named) * total, name)

        baseline = load_baseline(source, precision=sampler.precision)
        its_sampler, cost = recommended(baseline, sampler), baseline_cost(baseline)
        began = time.perf_counter()
        painted = paint(baseline, images, masks, [p.prompt for p in photos], its_sampler, progress=report)
        result.seconds[name] = (time.perf_counter() - began) / len(photos)
        result.images[name] = painted
        seen = see(networks, painted, masks)
        result.scores[name] = score(photos, painted, networks, (reference, seen))
        result.sets[name] = set_scores(reference, seen)
        how = facts(baseline, masks.shape[1], masks.shape[2], its_sampler)
        rows[name] = BaselineRow(cost, how, baseline.card.paper)
    return rows
