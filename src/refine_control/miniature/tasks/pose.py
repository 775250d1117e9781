"""Scenes from key points: each object is drawn as a skeleton, and the oracle asks how far its centre is off."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from refine_control.miniature import scenes
from refine_control.miniature.obedience import Classifier
from refine_control.miniature.scenes import Objects
from refine_control.miniature.tasks.task import Rendered, Scores, Task, nearest_tones, stored_objects
from refine_control.miniature.vocabulary import SHAPES
from refine_control.records import Photo

LIMBS = {"circle": (), "ring": (0.0, 180.0), "square": (45.0, 135.0, 225.0, 315.0), "triangle": (0.0, 120.0, 240.0),
         "cross": (0.0, 90.0, 180.0, 270.0), "star": (0.0, 72.0, 144.0, 216.0, 288.0)}  # fmt: skip
"""Degrees of the limbs of each shape's skeleton, clockwise from the top."""
WITHIN = 2.0
"""Pixels within which a key point counts as right."""
LOST = 32.0
"""Distance in pixels of an object that is not there."""


def skeletons(objects: Objects) -> np.ndarray:
    """(N,64,64,3) uint8: on black, a white dot in the centre of each object and its limbs in green."""
    out = []
    for i in range(len(objects.present)):
        image = Image.new("RGB", (scenes.SIZE, scenes.SIZE))
        draw = ImageDraw.Draw(image)
        for n in np.flatnonzero(objects.present[i]):
            x, y, reach = objects.x[i, n] - 0.5, objects.y[i, n] - 0.5, 0.9 * objects.radius[i, n]
            for degrees in LIMBS[SHAPES[objects.shape[i, n]]]:
                turn = np.deg2rad(degrees) + objects.angle[i, n]
                draw.line([(x, y), (x + reach * np.sin(turn), y - reach * np.cos(turn))], (60, 220, 60), 2)
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], (255, 255, 255))
        out.append(np.asarray(image))
    return np.stack(out)


def render(seed: int, start: int, count: int) -> Rendered:
    """Objects of distinct colours and shapes; the prompt names everything."""
    truth = scenes.render(seed, start, count, "distinct")
    return Rendered(truth, truth.global_prompts, skeletons(truth.objects))


def centres(images: np.ndarray, objects: Objects) -> np.ndarray:
    """(N,3,2) x and y of the mean of the pixels that are nearest to each object's colour; NaN where there is none.

    images (N,64,64,3) uint8."""
    nearest = nearest_tones(images)
    grid = np.stack(np.meshgrid(np.arange(scenes.SIZE), np.arange(scenes.SIZE)), -1)
    out = np.full((*objects.colour.shape, 2), np.nan)
    for i, n in np.argwhere(objects.present):
        pixels = nearest[i] == objects.colour[i, n]
        if pixels.any():
            out[i, n] = grid[pixels].mean(0)
    return out


def score(photos: Sequence[Photo], painted: np.ndarray, classifier: Classifier) -> Scores:
    """Per cent of the objects whose centre is within WITHIN pixels of the truth's, and the mean distance in pixels."""
    del classifier
    objects = stored_objects(photos)
    away = np.linalg.norm(centres(painted, objects) - centres(np.stack([p.image for p in photos]), objects), axis=-1)
    away = np.minimum(np.nan_to_num(away, nan=LOST), LOST)
    count = objects.present.sum(1)
    right, distance = ((values * objects.present).sum(1) / count for values in (away <= WITHIN, away))
    return {"keypoints": 100.0 * right, "keypoint_distance": distance}


TASK = Task(render, score, {"keypoints": "key points within 2 px %", "keypoint_distance": "key points off px (less)"})
