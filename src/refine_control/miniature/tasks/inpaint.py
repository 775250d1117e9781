"""Inpainting of scenes: the oracle asks whether the region shows the object of the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refine_control.miniature import scenes
from refine_control.miniature.obedience import Classifier, obedience
from refine_control.miniature.tasks.task import Rendered, Scores, Task
from refine_control.records import Photo


def render(seed: int, start: int, count: int) -> Rendered:
    """Scenes with the prompt of their target."""
    truth = scenes.render(seed, start, count)
    return Rendered(truth, truth.local_prompts)


def score(photos: Sequence[Photo], painted: np.ndarray, classifier: Classifier) -> Scores:
    """Per cent of the regions with the prompt's colour, with its shape, and with both."""
    colour, shape = (np.array([p.meta[name] for p in photos]) for name in ("colour", "shape"))
    obeyed = obedience(classifier, painted, np.stack([p.mask for p in photos]), colour, shape)
    return {name: 100.0 * getattr(obeyed, name) for name in ("colour", "shape", "both")}


TASK = Task(render, score, {"both": "both obeyed %", "colour": "colour obeyed %", "shape": "shape obeyed %"})
