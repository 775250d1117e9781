"""The proposed region of a photograph under a point: what a click selects."""

# H W pixels

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from refine_control.errors import InvalidInputError
from refine_control.records import Proposal

SIDE = 1024
"""Longer side of the copy in which regions are sought: proposals of a large photograph would fill the memory."""


def segment_at(
    image: np.ndarray, point: tuple[int, int], propose: Callable[[np.ndarray], list[Proposal]] | None = None
) -> np.ndarray:
    """(H, W, 3) uint8 and a point (x, y) -> (H, W) bool: of the proposed regions that hold the point the best.

    They are proposed by `propose`, by default without weights (`offline_masks`). Raises InvalidInputError for a point
    outside the photograph or in no region, MissingError where what proposes is not there."""
    if propose is None:
        from refine_control.annotation.offline_masks import propose_felzenszwalb as propose
    (x, y), (height, width) = point, image.shape[:2]
    if not (0 <= x < width and 0 <= y < height):
        raise InvalidInputError(f"the point {x},{y} is not in the photograph of {width} x {height} pixels")
    small = Image.fromarray(image)
    small.thumbnail((SIDE, SIDE))
    row, column = y * small.height // height, x * small.width // width
    region = next((each.mask for each in propose(np.asarray(small)) if each.mask[row, column]), None)
    if region is None:
        raise InvalidInputError(f"no region is proposed at the point {x},{y}; choose another, or give a box or a mask")
    return np.asarray(Image.fromarray(region).convert("L").resize((width, height), Image.Resampling.BILINEAR)) > 127
