"""Pictures painted by several ControlNets on the same photos, masks, prompts and noise, and their scores."""

# N pictures, H W pixels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.metrics import image_pairs as metrics
from refine_control.metrics.distances import SetScore
from refine_control.miniature.obedience import obedience
from refine_control.models.backbone import Backbone
from refine_control.models.cpu_kernels import in_precision
from refine_control.photos.buckets import grouped
from refine_control.pipeline.painting import inpaint
from refine_control.progress import Progress
from refine_control.records import Photo
from refine_control.study.feature_metrics import FeatureNetworks, Seen, pair_scores, see, set_scores

Scores = dict[str, np.ndarray]
OBEYED = ("colour", "shape", "both")
"""What the oracle reads in the hole; percentages."""


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


def score(
    photos: Sequence[Photo], painted: np.ndarray, networks: FeatureNetworks, seen: tuple[Seen, Seen] | None = None
) -> Scores:
    """All metrics of one model's pictures, painted (N,H,W,3) uint8, against the photos; with an oracle also obedience.

    `seen` are the networks' features of photos and painted pictures; without it they are computed here."""
    reference, masks = np.stack([p.image for p in photos]), np.stack([p.mask for p in photos])
    composited = metrics.composite(reference, painted, masks)
    out = {
        "psnr": metrics.psnr(reference, painted),
        "psnr_region": metrics.psnr(reference, painted, masks),
        "psnr_composited": metrics.psnr(reference, composited),
        "ssim": metrics.ssim(reference, painted),
        "ssim_composited": metrics.ssim(reference, composited),
    }
    if (~masks).any((1, 2)).all():
        out["psnr_kept"] = metrics.psnr(reference, painted, ~masks)
    inner = masks[:, metrics.SSIM_RADIUS : -metrics.SSIM_RADIUS, metrics.SSIM_RADIUS : -metrics.SSIM_RADIUS]
    if inner.any((1, 2)).all():
        out["ssim_region"] = metrics.ssim(reference, painted, masks)
    seen = seen or (see(networks, reference, masks), see(networks, painted, masks))
    out |= pair_scores(networks, photos, painted, seen)
    if networks.classifier is not None:
        colour, shape = (np.array([p.meta[name] for p in photos]) for name in ("colour", "shape"))
        obeyed = obedience(networks.classifier, painted, masks, colour, shape)
        out |= {name: 100.0 * getattr(obeyed, name) for name in OBEYED}
    return out


def compare(
    backbone: Backbone,
    controlnets: Mapping[str, Any],
    photos: Sequence[Photo],
    sampler: SamplerConfig,
    networks: FeatureNetworks | None = None,
    progress: Progress | None = None,
) -> Result:
    """Repaints the photos with every ControlNet by name and scores them; the noise of a picture is the same for all.

    With `networks` also the metrics that need one; distances of sets only from two pictures on.
    Transformer and ControlNets are cast to `sampler.precision` and put on the backbone's device in place: measure costs
    before."""
    import time

    in_precision(sampler.precision, backbone, *controlnets.values())
    numbers = list(grouped(p.mask.shape for p in photos).values())  # pictures of one size are painted together
    groups = [_Group(photos, each) for each in numbers]
    networks = networks or FeatureNetworks()
    references = [see(networks, group.images, group.masks) for group in groups]
    result = Result({}, {}, {}, {})
    for number, (name, controlnet) in enumerate(controlnets.items()):
        began, done, painted = time.perf_counter(), 0, []
        for group in groups:

            def report(now: int, total: int, word: str = "", before: int = number * len(photos) + done) -> None:
                if progress:
                    progress(before + now, len(controlnets) * len(photos), name)  # noqa: B023

            prompts = [p.prompt for p in group.photos]
            painted.append(
                inpaint(backbone, controlnet, group.images, group.masks, prompts, sampler, first=done, progress=report)
            )
            done += len(group.photos)
        result.seconds[name] = (time.perf_counter() - began) / len(photos)
        seen = [see(networks, each, group.masks) for each, group in zip(painted, groups, strict=True)]
        scores = [
            score(group.photos, each, networks, (before, after))
            for group, each, before, after in zip(groups, painted, references, seen, strict=True)
        ]
        result.images[name] = painted[0] if len(groups) == 1 else _in_order(painted, numbers)
        result.scores[name] = _joined(scores, numbers)
        result.sets[name] = set_scores(_joined(references, numbers), _joined(seen, numbers))
    return result


class _Group:
    """Pictures of one size."""

    def __init__(self, photos: Sequence[Photo], numbers: Sequence[int]):
        self.photos = [photos[number] for number in numbers]
        self.images, self.masks = np.stack([p.image for p in self.photos]), np.stack([p.mask for p in self.photos])


def _in_order(groups: Sequence[Any], numbers: Sequence[Sequence[int]]) -> list[Any]:
    """The items of all groups, each at its number."""
    by_number = {
        n: item for each, items in zip(numbers, groups, strict=True) for n, item in zip(each, items, strict=True)
    }
    return [by_number[number] for number in sorted(by_number)]


def _joined(groups: Sequence[Mapping[str, np.ndarray]], numbers: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """By name, the rows of all groups in the order of the pictures; names that every group has."""
    if len(groups) == 1:
        return dict(groups[0])
    names = [name for name in groups[0] if all(name in group for group in groups)]
    return {name: np.stack(_in_order([group[name] for group in groups], numbers)) for name in names}


def read_test(folder: Path) -> list[Photo]:
    """The photos of a folder of shards. Raises InvalidInputError when it is none or has no pixels in its holes."""
    from refine_control.photos.shards import Shards, open_manifest
    from refine_control.records import UNLABELED

    manifest = open_manifest(folder)
    if manifest["role"] == UNLABELED:
        raise InvalidInputError(f"{folder} has the role unlabeled: there is nothing to compare with; give test shards")
    shards = Shards(folder)
    if len(shards) < 2:
        raise InvalidInputError(f"{folder} holds {len(shards)} sample; intervals need at least 2")
    return [shards[i] for i in range(len(shards))]
