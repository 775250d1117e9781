"""Pictures of the same scenes by several noise seeds, how much they differ, and a grid of them."""

# K noise seeds, N scenes, H W pixels

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refine_control.conditions.condition import show
from refine_control.config import SamplerConfig
from refine_control.metrics.diversity import feature_spread, pixel_spread
from refine_control.metrics.image_pairs import PerImage
from refine_control.metrics.statistics import mean_ratio, two_level
from refine_control.miniature.obedience import Classifier
from refine_control.miniature.scene_features import scene_features
from refine_control.models.backbone import Backbone
from refine_control.picture_grid import PictureGrid, outlines
from refine_control.pipeline.painting import paint
from refine_control.progress import Progress
from refine_control.records import Photo
from refine_control.study.tables import Table

SEEDS, SCENES, _SHOWN = 8, 64, 4
See = Callable[[NDArray[np.uint8], NDArray[np.bool_]], NDArray[np.floating[Any]]]
"""Pictures (N,H,W,3) uint8 and masks (N,H,W) bool -> features (N,D), such as
`partial(scene_features, load_classifier(BUNDLE))`."""


class Diversity(NamedTuple):
    """Of one model: mean distances between the pictures of each scene, (N,)."""

    features: PerImage | None
    """None without a network."""
    pixels: PerImage
    """Inside the mask, levels of [0, 255]."""


def paint_seeds(
    backbone: Backbone,
    controlnet: Any,
    photos: Sequence[Photo],
    sampler: SamplerConfig,
    seeds: Sequence[int] = range(SEEDS),
    progress: Progress | None = None,
) -> NDArray[np.uint8]:
    """Repaints N photos of one size with the noise of each seed, whatever `sampler.seed` says: (K,N,H,W,3) uint8."""
    shown, prompts, painted = show(photos), [p.prompt for p in photos], []
    for done, seed in enumerate(seeds, 1):
        seeded = sampler.model_copy(update={"seed": seed})
        painted.append(paint(backbone, controlnet, shown, prompts, seeded))
        if progress:
            progress(done, len(seeds), "noise seeds")
    return np.stack(painted)


def diversity(pictures: NDArray[np.uint8], masks: NDArray[np.bool_], see: See | None) -> Diversity:
    """Of pictures (K,N,H,W,3) and masks (N,H,W). Raises InvalidInputError for fewer than two seeds."""
    features = see and feature_spread(np.stack([see(each, masks) for each in pictures]))
    return Diversity(features, pixel_spread(pictures, masks))


class Seeds(NamedTuple):
    """What an evaluation shows of several noise seeds."""

    table: Table
    grid: PictureGrid


def compare_seeds(
    painters: Mapping[str, tuple[Backbone, Any, SamplerConfig]],
    photos: Sequence[Photo],
    count: int,
    classifier: Classifier | None,
    progress: Progress | None = None,
) -> Seeds:
    """Diversity of several models by `count` noise seeds, beside that of the first of them, and pictures of each.

    With the `classifier` of scenes also by its features.
    `painters` are backbone, ControlNet and sampler by name. Takes the first photos that have the size of the first.
    Raises InvalidInputError for fewer than two seeds."""
    see = classifier and partial(scene_features, classifier)
    alike = [photo for photo in photos if photo.mask.shape == photos[0].mask.shape][:SCENES]
    masks = np.stack([photo.mask for photo in alike])
    painted = {
        name: paint_seeds(backbone, controlnet, alike, sampler, range(count), progress)
        for name, (backbone, controlnet, sampler) in painters.items()
    }
    spread = {name: diversity(each, masks, see) for name, each in painted.items()}
    first = next(iter(spread.values()))
    lines = []
    for name, each in spread.items():
        line = [name]
        for values, reference in ((each.pixels, first.pixels), (each.features, first.features)):
            if values is not None and reference is not None:
                line += [f"{two_level(values[None], 0):.2f}", f"{mean_ratio(values, reference, 0).scaled(100):.0f}"]
        lines.append(line)
    columns = ["model", "pixels of the region", "% of the first"]
    columns += ["features of the region", "% of the first"] if see else []
    note = (
        f"Mean distance between the pictures of a scene by {count} noise seeds, over pairs; {len(alike)} scenes, 95 % "
        "bootstrap intervals. Pixels: root mean square in levels of 255."
    )
    title = f"{count} noise seeds"
    grid = seeds_grid(alike[:_SHOWN], {name: each[:, :_SHOWN] for name, each in painted.items()}, title)
    return Seeds(Table("Diversity over noise seeds", columns, lines, [note]), grid)


def seeds_grid(photos: Sequence[Photo], painted: Mapping[str, NDArray[np.uint8]], title: str) -> PictureGrid:
    """A row for each photo and model, a column for each noise seed: `painted` holds (K,N,H,W,3) by model."""
    count = len(next(iter(painted.values())))
    rows = [(photo, [photo.image, *pictures[:, n]]) for n, photo in enumerate(photos) for pictures in painted.values()]
    captions = [f"{name}: {photo.prompt}" for photo in photos for name in painted]
    columns = ["original", *(f"seed {number}" for number in range(count))]
    return PictureGrid(columns, [row for _, row in rows], captions, outlines([photo for photo, _ in rows]), title=title)
