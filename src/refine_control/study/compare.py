"""Pictures painted by several models on the same photos, masks and prompts, and their scores."""

# N pictures, H W pixels

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_control.conditions.condition import show
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.metrics import image_pairs as metrics
from refine_control.metrics.distances import SetScore
from refine_control.models.backbone import Backbone
from refine_control.models.cpu_kernels import in_precision
from refine_control.photos.buckets import grouped
from refine_control.photos.shards import Shards, open_manifest
from refine_control.pipeline.painting import paint as paint_pictures
from refine_control.pipeline.painting import warn_wasted_steps
from refine_control.progress import Progress
from refine_control.records import UNLABELED, Photo
from refine_control.study.feature_metrics import FeatureNetworks, Seen, pair_scores, see, set_scores

Scores = dict[str, np.ndarray]


class Result(NamedTuple):
    """Scores, pictures and times of several models."""

    scores: dict[str, Scores]
    """By model, then metric: (N,) values."""
    sets: dict[str, dict[str, SetScore]]
    """By model, then metric: what has no value for each picture."""
    images: dict[str, np.ndarray | list[np.ndarray]]
    """By model: (N,H,W,3) uint8, uncomposited; N of (H,W,3) where there are several sizes."""
    seconds: dict[str, float]
    """By model: per image, of the whole evaluation."""


def score(photos: Sequence[Photo], painted: np.ndarray, networks: FeatureNetworks, seen: tuple[Seen, Seen]) -> Scores:
    """All metrics of one model's pictures, painted (N,H,W,3) uint8, against the photos; with an oracle also its scores.

    `seen` are the networks' features of photos and painted pictures."""
    reference, masks = np.stack([p.image for p in photos]), np.stack([p.mask for p in photos])
    composited = metrics.composite(reference, painted, masks)
    out = {
        "psnr": metrics.psnr(reference, painted),
        "psnr_region": metrics.psnr(reference, painted, masks),
        "psnr_composited": metrics.psnr(reference, composited),
        "ssim": metrics.ssim(reference, painted),
        "ssim_composited": metrics.ssim(reference, composited),
        "sharpness": metrics.high_pass_energy(painted, masks),
    }
    if (~masks).any((1, 2)).all():
        out["psnr_kept"] = metrics.psnr(reference, painted, ~masks)
    inner = masks[:, metrics.SSIM_RADIUS : -metrics.SSIM_RADIUS, metrics.SSIM_RADIUS : -metrics.SSIM_RADIUS]
    if inner.any((1, 2)).all():
        out["ssim_region"] = metrics.ssim(reference, painted, masks)
    out |= pair_scores(networks, photos, painted, seen)
    return out if networks.oracle is None else out | networks.oracle(photos, painted)


class Group:
    """Photos of one size: images (n,H,W,3), masks (n,H,W) and prompts."""

    def __init__(self, photos: Sequence[Photo], first: int):
        self.photos, self.first, self.prompts = photos, first, [p.prompt for p in photos]
        self.images, self.masks = np.stack([p.image for p in photos]), np.stack([p.mask for p in photos])


Paint = Callable[[Group, Progress], np.ndarray]
"""Pictures (n,H,W,3) uint8 of a group."""


class TestSamples:
    """Test photos of any sizes, and the features that the networks see in them."""

    def __init__(self, photos: Sequence[Photo], networks: FeatureNetworks | None):
        self.networks, self.count = networks or FeatureNetworks(), len(photos)
        self.numbers = list(grouped(p.mask.shape for p in photos).values())  # pictures of one size are painted together
        starts = np.cumsum([0, *map(len, self.numbers)])
        self.groups = [
            Group([photos[number] for number in each], int(first))
            for each, first in zip(self.numbers, starts, strict=False)
        ]
        self.references = [see(self.networks, group.images, group.masks) for group in self.groups]

    def add(self, result: Result, name: str, paint: Paint, progress: Progress | None, place: tuple[int, int]) -> None:
        """Paints all photos by one model and adds its pictures, scores and seconds; `place` is its number of how many
        models."""
        number, models = place

        def report(before: int, done: int, total: int, note: str = "") -> None:
            if progress:
                progress(number * self.count + before + done, models * self.count, name)

        began = time.perf_counter()
        painted = [paint(group, partial(report, group.first)) for group in self.groups]
        result.seconds[name] = (time.perf_counter() - began) / self.count
        seen = [see(self.networks, each, group.masks) for each, group in zip(painted, self.groups, strict=True)]
        scores = [
            score(group.photos, each, self.networks, (before, after))
            for group, each, before, after in zip(self.groups, painted, self.references, seen, strict=True)
        ]
        result.images[name] = painted[0] if len(painted) == 1 else self._in_order(painted)
        result.scores[name] = self._joined(scores)
        result.sets[name] = set_scores(self._joined(self.references), self._joined(seen))

    def _in_order(self, groups: Sequence[Any]) -> list[Any]:
        """The items of all groups, each at its number."""
        items = [item for each in groups for item in each]
        return [items[place] for place in np.argsort(np.concatenate(self.numbers))]

    def _joined(self, groups: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """By name, the rows of all groups in the order of the pictures; names that every group has."""
        names = [name for name in groups[0] if all(name in group for group in groups)]
        return {name: np.stack(self._in_order([group[name] for group in groups])) for name in names}


def samplers_by_name(
    sampler: SamplerConfig | Mapping[str, SamplerConfig], names: Iterable[str]
) -> dict[str, SamplerConfig]:
    """The sampler of each model, where one may be given for all."""
    return {name: sampler if isinstance(sampler, SamplerConfig) else sampler[name] for name in names}


def compare(
    backbone: Backbone,
    controlnets: Mapping[str, Any],
    photos: Sequence[Photo],
    sampler: SamplerConfig | Mapping[str, SamplerConfig],
    networks: FeatureNetworks | None = None,
    progress: Progress | None = None,
    own_backbones: Mapping[str, Backbone] | None = None,
) -> Result:
    """Repaints the photos with every ControlNet by name and scores them; the noise of a picture is the same for all.

    `sampler` is one for all, or those of the names with one seed and precision. `own_backbones`: by name, the backbones
    of those that paint with another transformer than `backbone`'s. With `networks` also the metrics that need one;
    distances of sets only from two pictures on.
    Transformer and ControlNets are cast to the samplers' precision and put on the backbone's device in place: measure
    costs before."""
    backbones = {**dict.fromkeys(controlnets, backbone), **(own_backbones or {})}
    samplers = samplers_by_name(sampler, controlnets)
    for each in dict.fromkeys(samplers.values()):
        warn_wasted_steps(backbone, each)
    for name, controlnet in controlnets.items():
        in_precision(samplers[name].precision, backbones[name], controlnet)
    samples, result = TestSamples(photos, networks), Result({}, {}, {}, {})
    for number, (name, controlnet) in enumerate(controlnets.items()):

        def paint(group: Group, report: Progress, name: str = name, controlnet: Any = controlnet) -> np.ndarray:
            given = (show(group.photos), group.prompts, samplers[name])
            return paint_pictures(backbones[name], controlnet, *given, first=group.first, progress=report)

        samples.add(result, name, paint, progress, (number, len(controlnets)))
    return result


def read_test(folder: Path) -> list[Photo]:
    """The photos of a folder of shards. Raises InvalidInputError when it is none or has no pixels in its holes."""
    if open_manifest(folder)["role"] == UNLABELED:
        raise InvalidInputError(f"{folder} has the role unlabeled: there is nothing to compare with; give test shards")
    shards = Shards(folder)
    if len(shards) < 2:
        raise InvalidInputError(f"{folder} holds {len(shards)} sample; intervals need at least 2")
    return [shards[i] for i in range(len(shards))]
