"""Scenes from their edges: the oracle asks whether the answer has the same edges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import binary_dilation

from refine_control.conditions.canny import CONDITION, edges
from refine_control.miniature.obedience import Classifier
from refine_control.miniature.tasks.task import Scores, Task, prepared
from refine_control.records import Photo

TOLERANCE = 1
"""Pixels between edges that count as the same."""


def edge_f1(reference: np.ndarray, answer: np.ndarray) -> float:
    """F1 of edges (H,W) bool within TOLERANCE pixels, in [0, 1]; 1 where neither has any."""
    if not reference.any() and not answer.any():
        return 1.0
    near = np.ones((2 * TOLERANCE + 1,) * 2, bool)
    precision = (answer & binary_dilation(reference, near)).sum() / max(1, answer.sum())
    recall = (reference & binary_dilation(answer, near)).sum() / max(1, reference.sum())
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def score(photos: Sequence[Photo], painted: np.ndarray, classifier: Classifier) -> Scores:
    """100 x F1 of the edges of the answer against the given ones."""
    del classifier
    given = [photo.cond for photo in photos]
    f1 = [
        edge_f1(cond[..., 0] > 127, edges(each)) for cond, each in zip(given, painted, strict=True) if cond is not None
    ]
    return {"edge_f1": 100 * np.array(f1)}


TASK = Task(prepared(CONDITION), score, {"edge_f1": "edges' F1 %"}, reads_scenes=False)
