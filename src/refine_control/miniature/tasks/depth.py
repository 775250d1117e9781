"""Scenes from their depth, which is the order of drawing: the oracle asks which object is in front."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refine_control.miniature import scenes
from refine_control.miniature.obedience import Classifier
from refine_control.miniature.scenes import MAX_OBJECTS, Objects
from refine_control.miniature.tasks.task import Rendered, Scores, Task, nearest_tones, silhouettes, stored_objects
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
    """Per cent of the scenes in which the target is in front of the object that it covers, and in which it has the
    colour of the prompt.

    The colour of a part is the one that most of its pixels are nearest to. The target is in front where the overlap
    has the colour of the rest of the target, and the visible part of the other object has another one, both of them
    colours of objects: which objects the prompt gives which colour is another question."""
    del classifier
    objects, target = stored_objects(photos), np.array([p.meta["target"] for p in photos])
    rows, count = np.arange(len(photos)), objects.present.sum(1)
    other = (target + 1) % count
    covers = np.stack([silhouettes(objects, np.full(len(photos), n)) > 0.5 for n in range(MAX_OBJECTS)], 1)
    front, back = covers[rows, target], covers[rows, other]
    covers[rows, target] = covers[rows, other] = False
    seen = back & ~front & ~covers.any(1)
    tones = nearest_tones(painted)
    overlap, rest, behind = (_majority(tones, part) for part in (front & back, front & ~back, seen))
    in_front = (overlap == rest) & (behind != rest) & (np.maximum(rest, behind) < len(COLOURS))
    return {"depth_order": 100.0 * in_front, "front_colour": 100.0 * (overlap == objects.colour[rows, target])}


def _majority(tones: np.ndarray, part: np.ndarray) -> np.ndarray:
    """(N,) the most frequent tone of tones (N,64,64) where part (N,64,64) is true."""
    return np.stack([((tones == tone) & part).sum((1, 2)) for tone in range(tones.max() + 1)]).argmax(0)


TASK = Task(render, score, {"depth_order": "depth order %", "front_colour": "colour in front %"})
