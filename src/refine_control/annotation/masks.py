"""Selection of proposed regions for inpainting: cleaned, filtered by size, place and connectivity, the best of a photo.

Pure functions of arrays and integers. A region is rejected when it is too small or too large, when it is scattered,
when it touches all four borders (then it is background), or when it overlaps one that was selected before it.
`augment` covers a region with a box or with brush strokes, so that the outline of the mask does not reveal the object.
"""

# H W pixels of the photo, y x in pixels, (0, 0) the upper left one

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull

from refine_control.errors import InvalidInputError
from refine_control.randomness import derive_seed, uniforms
from refine_control.records import Proposal

TOO_SMALL, TOO_LARGE = "too_small", "too_large"
ALL_BORDERS = "all_borders"
SCATTERED = "scattered"
OVERLAPS = "overlaps"
SPARE = "spare"
"""Suitable, but `per_photo` better ones were selected before."""
Shape = Literal["none", "box", "brush"]


@dataclass(frozen=True)
class Selection:
    """Which regions are selected in a photo, and how many; the command line checks the ranges."""

    min_area: float = 0.05
    """Smallest and largest share of the photo."""
    max_area: float = 0.40
    min_connected: float = 0.85
    """Smallest share of the region that its largest connected part holds."""
    max_borders: int = 3
    """How many of the photo's four borders a region may touch."""
    per_photo: int = 2
    max_overlap: float = 0.3
    """Largest IoU of two regions of one photo."""
    cleaned: float = 0.02
    """Holes and islands up to this share of the region are filled and removed before it is judged."""

    def __post_init__(self) -> None:
        if self.min_area > self.max_area:
            raise InvalidInputError(
                f"min_area {self.min_area} is above max_area {self.max_area}; no region could be both"
            )


class Chosen(NamedTuple):
    """A region to inpaint and what speaks for it."""

    mask: np.ndarray
    """(H, W) bool, cleaned."""
    scores: dict[str, float]
    """predicted_iou, stability_score, area_fraction, border_fraction, connected, solidity; each 0 to 1."""
    source: str
    """The finder, as the proposal names it."""


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(H, W) bool, not empty -> y0, x0, y1, x1 of the smallest box that holds it, the last two one past it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks; 0 where both are empty."""
    return float(np.count_nonzero(a & b) / max(1, np.count_nonzero(a | b)))


def keep_best(overlaps: np.ndarray, scores: np.ndarray, limit: float) -> list[int]:
    """Non-maximum suppression: the indices to keep, best score first; of equal scores the first is better.

    An index is dropped when its overlap, (N, N), with a better one that is kept is above `limit`."""
    left, keep = np.ones(len(scores), bool), []
    for i in np.argsort(-scores, kind="stable"):
        if left[i]:
            keep.append(int(i))
            left &= overlaps[i] <= limit
    return keep


def clean(mask: np.ndarray, share: float) -> np.ndarray:
    """Fills holes and removes islands of at most `share` of the mask's area; its largest part always stays.

    A hole is ground that no path along pixels' sides leads out of; one at the photo's border is open."""
    limit = share * np.count_nonzero(mask)
    if limit < 1:
        return mask.copy()
    parts, sizes = _parts(mask)
    stays = sizes > limit
    stays[np.argmax(sizes)] = True
    mask = stays[parts]
    ground, sizes = _parts(~mask)
    closed = (sizes > 0) & (sizes <= limit)
    closed[np.concatenate([ground[0], ground[-1], ground[:, 0], ground[:, -1]])] = False
    return mask | closed[ground]


def _parts(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The connected parts, numbered from 1, and the pixels of each; number 0 is what lies outside and counts none."""
    parts = np.empty(mask.shape, np.int32)
    ndimage.label(mask, output=parts)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts, sizes


def dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask grown by a disc: every pixel no farther than `pixels` from one of its own."""
    grown = mask.copy()
    if pixels > 0 and mask.any():
        y0, x0, y1, x1 = box_of(mask)
        window = np.s_[max(0, y0 - pixels) : y1 + pixels, max(0, x0 - pixels) : x1 + pixels]
        grown[window] = np.asarray(ndimage.distance_transform_edt(~mask[window])) <= pixels
    return grown


def connected(mask: np.ndarray) -> float:
    """The share of the mask that its largest connected part holds; 0 for an empty mask."""
    sizes = _parts(mask)[1]
    return float(sizes.max() / max(1, sizes.sum()))


def solidity(mask: np.ndarray) -> float:
    """The mask's area over that of its convex hull, pixels taken as squares: 1 for a box."""
    rows = np.flatnonzero(mask.any(1))
    first, last = mask[rows].argmax(1), mask.shape[1] - mask[rows][:, ::-1].argmax(1)
    corners = [np.stack([x, y], 1) for x in (first, last) for y in (rows, rows + 1)]
    return float(np.count_nonzero(mask) / ConvexHull(np.concatenate(corners)).volume)  # in the plane: the area


def borders(mask: np.ndarray) -> int:
    """How many of the photo's four borders the mask touches."""
    return sum(bool(line.any()) for line in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))


def border_fraction(mask: np.ndarray) -> float:
    """Share of the photo's outermost pixels that are masked."""
    frame = np.ones(mask.shape, bool)
    frame[1:-1, 1:-1] = False
    return float(mask[frame].mean())


def select(proposals: Sequence[Proposal], selection: Selection, fell: Counter[str] | None = None) -> list[Chosen]:
    """The best regions of one photo, best first.

    The order is that of predicted IoU times stability score, equal ones as proposed; each is taken unless the rules
    refuse it or it overlaps one taken before. `fell` counts the others by reason: chosen + fell = proposals."""
    fell = Counter() if fell is None else fell
    chosen: list[Chosen] = []
    for proposal in sorted(proposals, key=lambda each: -each.predicted_iou * each.stability_score):
        mask, reason = proposal.mask, _wrong_size(proposal.mask, selection)
        if reason is None and len(chosen) == selection.per_photo:
            reason = SPARE
        if reason is None:  # the costly questions last
            mask = clean(mask, selection.cleaned)
            reason = _wrong_size(mask, selection) or _misplaced(mask, selection, chosen)
        if reason is None:
            chosen.append(Chosen(mask, _scores(proposal, mask), proposal.source))
        else:
            fell[reason] += 1
    return chosen


def _misplaced(mask: np.ndarray, selection: Selection, chosen: Sequence[Chosen]) -> str | None:
    if borders(mask) > selection.max_borders:
        return ALL_BORDERS
    if any(iou(mask, other.mask) > selection.max_overlap for other in chosen):
        return OVERLAPS
    return SCATTERED if connected(mask) < selection.min_connected else None


def _wrong_size(mask: np.ndarray, selection: Selection) -> str | None:
    share = mask.mean()
    if share < selection.min_area or not mask.any():
        return TOO_SMALL
    return TOO_LARGE if share > selection.max_area else None


def _scores(proposal: Proposal, mask: np.ndarray) -> dict[str, float]:
    values = {
        "predicted_iou": proposal.predicted_iou,
        "stability_score": proposal.stability_score,
        "area_fraction": float(mask.mean()),
        "border_fraction": border_fraction(mask),
        "connected": connected(mask),
        "solidity": solidity(mask),
    }
    return {name: round(value, 5) for name, value in values.items()}


MAX_MARGIN = 0.15
"""`box`: the largest margin at a side, in shares of the box's length."""
BRUSH = (0.15, 0.30)
"""`brush`: the radius of the strokes, in shares of the square root of the region's area."""
_STROKES = 4096


def augment(mask: np.ndarray, shape: Shape, seed: int, key: str) -> np.ndarray:
    """(H, W) bool -> a mask that covers it, a pure function of (mask, shape, seed, key).

    box: the region's box with margins of its own at each side. brush: round strokes over the region, whose outline
    is the brush's. Either may reach all of a small photo, which `data build` then refuses."""
    if shape == "none" or not mask.any():
        return mask.copy()
    chances = uniforms(derive_seed(seed, "mask", shape, key), np.arange(_STROKES), 2)
    return _box(mask, chances) if shape == "box" else _brush(mask, chances)


def _box(mask: np.ndarray, chances: np.ndarray) -> np.ndarray:
    y0, x0, y1, x1 = box_of(mask)
    tall, wide = MAX_MARGIN * (y1 - y0), MAX_MARGIN * (x1 - x0)
    (up, down), (left, right) = (chances[:2] * [[tall], [wide]]).round().astype(int)
    covered = np.zeros_like(mask)
    covered[max(0, y0 - up) : y1 + down, max(0, x0 - left) : x1 + right] = True
    return covered


def _brush(mask: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """Strokes from a pixel that is not covered yet to the nearest one that was set before, until all is covered."""
    length = np.sqrt(np.count_nonzero(mask))
    covered, left = np.zeros_like(mask), mask.copy()
    set_before = np.empty((0, 2))
    for where, how in chances:
        open_pixels = np.flatnonzero(left)
        if not len(open_pixels):
            return covered
        centre = np.array(divmod(int(open_pixels[int(where * len(open_pixels))]), mask.shape[1]), float)
        near = set_before[np.argmin(((set_before - centre) ** 2).sum(1))] if len(set_before) else centre
        set_before = np.concatenate([set_before, centre[None]])
        radius = max(1.0, length * (BRUSH[0] + how * (BRUSH[1] - BRUSH[0])))
        window, stroke = _stroke(centre, near, radius, mask.shape)
        covered[window] |= stroke
        left[window] &= ~stroke
    return covered | mask  # not even thousands of strokes cover a mask of scattered pixels


def _stroke(
    start: np.ndarray, end: np.ndarray, radius: float, size: tuple[int, ...]
) -> tuple[tuple[slice, slice], np.ndarray]:
    """The pixels no farther than `radius` from the line between two (y, x): a window and the mask within it."""
    low = np.maximum(0, np.floor(np.minimum(start, end) - radius)).astype(int)
    high = np.minimum(size, np.ceil(np.maximum(start, end) + radius) + 1).astype(int)
    y, x = np.mgrid[low[0] : high[0], low[1] : high[1]]
    along = end - start
    place = ((y - start[0]) * along[0] + (x - start[1]) * along[1]) / max(1e-9, float(along @ along))
    place = place.clip(0, 1)
    distance = np.hypot(y - start[0] - place * along[0], x - start[1] - place * along[1])
    return np.s_[low[0] : high[0], low[1] : high[1]], distance <= radius
