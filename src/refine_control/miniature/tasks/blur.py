"""Scenes out of focus: the oracle asks whether the answer, blurred again, is the picture that was given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refine_control.conditions.blur import CONDITION, prepare
from refine_control.metrics.image_pairs import psnr
from refine_control.miniature.obedience import Classifier
from refine_control.miniature.tasks.task import Scores, Task, prepared
from refine_control.records import Photo


def score(photos: Sequence[Photo], painted: np.ndarray, classifier: Classifier) -> Scores:
    """PSNR in dB of the blurred answer against the given picture."""
    del classifier
    given = np.stack([photo.cond for photo in photos if photo.cond is not None])
    return {"psnr_blurred": psnr(given, np.stack([prepare(image) for image in painted]))}


TASK = Task(prepared(CONDITION), score, {"psnr_blurred": "PSNR blurred dB"}, reads_scenes=False)
