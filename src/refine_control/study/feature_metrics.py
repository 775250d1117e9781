"""Metrics that need a network, and which of them can be computed on this machine.

FID, KID, LPIPS and CMMD need published weights (`metrics.features`); a metric without its weights is left out with a
note, never replaced. The scene distances use the features of the mini model's oracle and have their own names.
"""

# N pictures, H W pixels, D width of a network's features

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from refine_control.conditions.condition import find_condition
from refine_control.errors import MissingError
from refine_control.metrics import features
from refine_control.metrics.distances import (
    Distance,
    Features,
    OfDraws,
    Rows,
    SetScore,
    bias_note,
    cmmd,
    drawn_distance,
    frechet_distance,
    kid,
)
from refine_control.metrics.drawn_sets import cmmd_of_draws, frechet_of_draws, kid_of_draws
from refine_control.metrics.features import weights as published
from refine_control.metrics.features.weights import Published, find_weights, folder_with
from refine_control.metrics.image_pairs import Images, Mask, PerImage, composite
from refine_control.metrics.region_clip import clip_scores, prompts_asked
from refine_control.metrics.statistics import BOOTSTRAP_SEED
from refine_control.miniature import scene_features
from refine_control.miniature.obedience import Classifier, load_classifier
from refine_control.miniature.tasks.task import Oracle, find_oracle
from refine_control.models.card import BUNDLE
from refine_control.models.devices import best_device
from refine_control.records import Photo

KID_SCALE = 1000.0
SCENE, INCEPTION, CLIP = "scene", "inception", "clip"
NETWORK_METRICS: Mapping[str, tuple[Published, ...]] = {
    "fid": (published.INCEPTION,),
    "lpips": (published.ALEXNET, published.LPIPS_HEADS),
    "cmmd": (published.CLIP,),
}
"""One metric of each published network, and the files that it needs."""
Seen = dict[str, NDArray[np.float32]]
"""By network: (N, D)."""


@dataclass(frozen=True)
class FeatureNetworks:
    """The networks that are here; None where one is not."""

    classifier: Classifier | None = None
    """Of the distances between scenes' regions."""
    lpips: features.Lpips | None = None
    inception: features.Inception | None = None
    clip: Any = None
    """CLIP's picture tower."""
    clip_text: features.ClipText | None = None
    missing: dict[str, str] = field(default_factory=dict)
    """By metric: `FID and KID not computed: needs FILE, ...`."""
    oracle: Oracle | None = None
    """What says whether the pictures do as they were asked."""


class SetMetric(NamedTuple):
    """A distance of whole sets, the same of sets drawn from them, and the network whose features it compares."""

    network: str
    distance: Distance
    of_draws: OfDraws


def _scaled_kid(reference: Features, generated: Features) -> float:
    return KID_SCALE * kid(reference, generated).mean


def _scaled_kid_of_draws(left: Features, right: Features, rows: Rows) -> NDArray[np.float64]:
    return KID_SCALE * kid_of_draws(left, right, rows)


SET_METRICS: Mapping[str, SetMetric] = {
    "fid": SetMetric(INCEPTION, frechet_distance, frechet_of_draws),
    "kid": SetMetric(INCEPTION, _scaled_kid, _scaled_kid_of_draws),
    "cmmd": SetMetric(CLIP, cmmd, cmmd_of_draws),
    "scene_frechet": SetMetric(SCENE, frechet_distance, frechet_of_draws),
    "scene_mmd": SetMetric(SCENE, scene_features.scene_mmd, scene_features.scene_mmd_of_draws),
}


def load_networks(
    weights: Path | None = None,
    classifier: Classifier | None = None,
    device: torch.device | str | None = None,
    oracle: Oracle | None = None,
) -> FeatureNetworks:
    """Every network whose weights are in the folder `weights` or else where `features.weights` looks.

    On `device`, the best of this machine by default; the classifier stays where it is.
    Raises DamagedError for a file that is not the published one: a wrong network is worse than none."""
    trunk, heads, inception, clip = (
        folder_with(known, weights)
        for known in (published.ALEXNET, published.LPIPS_HEADS, published.INCEPTION, published.CLIP)
    )
    device = device or best_device()
    loaders: dict[str, tuple[str, Callable[[], Any]]] = {
        "lpips": ("LPIPS", lambda: features.load_lpips(trunk, heads, device)),
        "inception": ("FID and KID", lambda: features.load_inception(inception, device)),
        "clip": ("CMMD", lambda: features.load_clip(clip, device)),
        "clip_text": ("CLIP score", lambda: features.load_clip_text(clip, device)),
    }
    loaded: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, (metric, load) in loaders.items():
        try:
            loaded[name] = load()
        except MissingError as error:
            missing[metric] = f"{metric} not computed: {str(error).partition('not computed: ')[2]}"
    return FeatureNetworks(classifier, missing=missing, oracle=oracle, **loaded)


def scene_networks(condition: str, photos: Sequence[Photo], weights: Path | None = None) -> FeatureNetworks:
    """The networks of `load_networks` and the oracle of a condition; the classifier where photos are scenes with a
    region, which it reads."""
    oracle, region = find_oracle(condition, photos), find_condition(condition).region
    return load_networks(weights, load_classifier(BUNDLE) if oracle and region else None, oracle=oracle)


def not_computed(weights: Path | None = None) -> dict[str, str]:
    """By metric of NETWORK_METRICS whose weights are nowhere: what is missing and where to get it."""
    out = {}
    for metric, files in NETWORK_METRICS.items():
        try:
            for known in files:
                find_weights(known, folder_with(known, weights))
        except MissingError as error:
            out[metric] = str(error)
    return out


def see(networks: FeatureNetworks, images: Images, masks: Mask) -> Seen:
    """What each network that measures sets makes of pictures (N, H, W, 3) uint8 with masks (N, H, W)."""
    out: Seen = {}
    if networks.classifier is not None:
        out[SCENE] = scene_features.scene_features(networks.classifier, images, masks)
    if networks.inception is not None:
        out[INCEPTION] = features.inception_features(networks.inception, images)
    if networks.clip is not None:
        out[CLIP] = features.clip_features(networks.clip, images)
    return out


def pair_scores(
    networks: FeatureNetworks, photos: Sequence[Photo], painted: Images, seen: tuple[Seen, Seen]
) -> dict[str, PerImage]:
    """LPIPS (whole, and of what is kept), the scene distance and CLIP's obedience of each picture, (N,), where their
    networks are.

    `seen` are the features (`see`) of the photos and of the painted pictures, (N, H, W, 3) uint8."""
    out: dict[str, PerImage] = {}
    if networks.lpips is not None:
        reference, masks = np.stack([p.image for p in photos]), np.stack([p.mask for p in photos])
        out["lpips"] = features.lpips(networks.lpips, reference, painted)
        out["lpips_kept"] = features.lpips(networks.lpips, reference, composite(reference, painted, ~masks))
    if networks.classifier is not None:
        out["scene_perceptual"] = scene_features.scene_perceptual(seen[0][SCENE], seen[1][SCENE])
    if networks.clip is not None and networks.clip_text is not None:
        out |= clip_scores(
            networks.clip, networks.clip_text, painted, np.stack([p.mask for p in photos]), prompts_asked(photos)
        )
    return out


def set_scores(reference: Seen, painted: Seen) -> dict[str, SetScore]:
    """Every distance of sets whose network has seen both."""
    return {
        name: drawn_distance(distance, reference[network], painted[network], BOOTSTRAP_SEED, of_draws=of_draws)
        for name, (network, distance, of_draws) in SET_METRICS.items()
        if network in reference
    }


def metric_notes(metrics: Iterable[str], count: int) -> list[str]:
    """The notes under a table on those of `metrics` that need a network, over `count` pictures."""
    notes = {
        ("fid", "kid"): "FID and KID x 1000: Inception of 2015, 2048 features, pictures resized to 299 pixels as "
        f"TensorFlow 1 did (bilinear, no antialias). {bias_note(count)}",
        ("cmmd",): "CMMD: CLIP ViT-L/14 at 336 pixels, largest central square, bicubic, sigma 10, times 1000.",
        ("clip_local",): "CLIP scores: 100 cosines of the square around the mask with the region's own prompt, the "
        "photograph's global one (or all of its regions' own), and that of another of its regions (or, where it has "
        "one alone, of the next photograph); the same CLIP as CMMD's.",
        ("lpips",): "LPIPS: AlexNet, version 0.1, values in [-1, 1], pictures at their own size; kept: with the "
        "original's pixels in the hole, so that only what ought to stay is compared.",
        ("scene_perceptual", "scene_frechet", "scene_mmd"): "Scene distances: the 64 features of the mini model's own "
        f"oracle, of the square around each mask; they are not FID, CMMD or LPIPS. {bias_note(count, width=64)}",
    }
    shown = set(metrics)
    return [note for names, note in notes.items() if shown & {*names}]
