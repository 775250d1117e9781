"""Scenes from their depth, which is the order of drawing: the oracle asks which object is in front."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refine_control.miniature import scenes
from refine_control.miniature.obedience import Classifier
from refine_control.miniature.scenes import MAX_OBJECTS, Objects
from refine_control.miniature.tasks.task import Rendered, Scores, Task, silhouettes, stored_objects
from refine_control.miniature.vocabulary import COLOURS
from refine_control.records import Photo

FAR, NEAR = 30, 240
"""Grey of the background and of the object in front."""


def depth_maps(objects: Objects, target: np.ndarray) -> np.ndarray:
    """(N,64,64,3) uint8: objects in the order of drawing, the target last, evenly spaced from far to near."""
    count = objects.present.sum(1)
    canvas = np.full((len(target), scenes.SIZE, scenes.SIZE), float(FAR), np.float32)
    drawn = np.zeros(len(target), int)
    for number in range(MAX_OBJECTS):
        behind = objects.present[:, number] & (target != number)
        drawn += behind
        grey = FAR + (NEAR - FAR) * drawn / count
        alpha = silhouettes(objects, np.full(len(target), number)) * behind[:, None, None]
        canvas += alpha * (grey[:, None, None] - canvas)
    canvas += silhouettes(objects, target) * (NEAR - canvas)
    return np.repeat(canvas.round().astype(np.uint8)[..., None], 3, axis=3)


def render(seed: int, start: int, count: int) -> Rendered:
    """Overlapping objects of distinct colours and shapes; the prompt names everything."""
    truth = scenes.render(seed, start, count, "overlapping")
    return Rendered(truth, truth.global_prompts, depth_maps(truth.objects, truth.target))


def score(photos: Sequence[Photo], painted: np.ndarray, classifier: Classifier) -> Scores:
    """Per cent of the scenes in which the overlap of the target with the object that it covers has its colour."""
    del classifier
    objects, target = stored_objects(photos), np.array([p.meta["target"] for p in photos])
    rows, other = np.arange(len(photos)), (target + 1) % objects.present.sum(1)
    both = np.minimum(silhouettes(objects, target), silhouettes(objects, other)) > 0.5
    palette = np.array(list(COLOURS.values()), np.float32)
    front, back = (palette[objects.colour[rows, each]][:, None, None] for each in (target, other))
    to_front, to_back = (((painted - colour) ** 2).sum(-1) for colour in (front, back))
    nearer = ((to_front < to_back) & both).sum((1, 2)) / np.maximum(1, both.sum((1, 2)))
    return {"depth_order": 100.0 * (nearer > 0.5)}


TASK = Task(render, score, {"depth_order": "depth order %"})
