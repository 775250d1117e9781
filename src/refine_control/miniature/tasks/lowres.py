"""Super-resolution of scenes: the oracle asks whether the answer, shrunk again, is the picture that was given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refine_control.conditions.lowres import CONDITION, shrink
from refine_control.metrics.image_pairs import psnr
from refine_control.miniature.obedience import Classifier
from refine_control.miniature.tasks.task import Scores, Task, prepared
from refine_control.records import Photo


def score(photos: Sequence[Photo], painted: np.ndarray, classifier: Classifier) -> Scores:
    """PSNR in dB of the shrunk answer against the shrunk truth."""
    del classifier
    small = (np.stack([shrink(image) for image in each]) for each in ([p.image for p in photos], painted))
    return {"psnr_shrunk": psnr(*small)}


TASK = Task(prepared(CONDITION), score, {"psnr_shrunk": "PSNR shrunk dB"}, reads_scenes=False)
