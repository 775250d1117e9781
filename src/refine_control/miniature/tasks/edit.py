"""Editing of scenes: `a blue circle` is said over a red one, and the oracle asks for the new colour and the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refine_control.metrics.image_pairs import psnr
from refine_control.miniature import scenes
from refine_control.miniature.obedience import Classifier, obedience
from refine_control.miniature.tasks.task import Rendered, Scores, Task, stored_objects
from refine_control.records import Photo

KEPT = 20.0
"""PSNR in dB from which on the rest counts as kept: a root mean square difference of a tenth of the range."""


def render(seed: int, start: int, count: int) -> Rendered:
    """Pairs that differ in the colour of the target, whose shape no other object has."""
    before, after = (scenes.render(seed, start, count, "distinct", recoloured=new) for new in (False, True))
    return Rendered(after, after.local_prompts, before.images.numpy())


def discs(photos: Sequence[Photo]) -> np.ndarray:
    """(N,64,64) bool: the disc around the edited object of each."""
    objects, rows = stored_objects(photos), np.arange(len(photos))
    target = np.array([p.meta["target"] for p in photos])
    x, y, radius = (getattr(objects, name)[rows, target][:, None, None] for name in ("x", "y", "radius"))
    across, down = np.meshgrid(np.arange(scenes.SIZE) + 0.5, np.arange(scenes.SIZE) + 0.5)
    return (across - x) ** 2 + (down - y) ** 2 < (radius + 1) ** 2


def score(photos: Sequence[Photo], painted: np.ndarray, classifier: Classifier) -> Scores:
    """Per cent of the objects with the new colour and their old shape, that in pictures whose rest is kept, and PSNR in
    dB of the rest with the source."""
    region = discs(photos)
    colour, shape = (np.array([p.meta[name] for p in photos]) for name in ("colour", "shape"))
    edited = obedience(classifier, painted, region, colour, shape).both
    rest = psnr(np.stack([p.cond for p in photos if p.cond is not None]), painted, ~region)
    return {"edited_kept": 100.0 * (edited & (rest >= KEPT)), "edited": 100.0 * edited, "psnr_unedited": rest}


HEADINGS = {"edited_kept": "edited, rest kept %", "edited": "edited %", "psnr_unedited": "PSNR unedited dB"}
TASK = Task(render, score, HEADINGS)
