"""A region as text: COCO's run lengths and polygons <-> a mask.

Run lengths go down the columns: a mask of H x W pixels is read column by column, and the counts say how many pixels
are kept, then inpainted, then kept, and so on; the first may be 0. In compressed form each count from the fourth on is
replaced by its difference to the one two places before, and written as groups of five bits, the lowest first, each in
one character of the range `0` to `o`: bit 5 says that another group follows, and the highest bit of the last group is
the sign.

Polygons lie in COCO's plane, where the pixel in row r and column c covers [c, c + 1] x [r, r + 1].

Not by pycocotools: its polygons differ in 3 % of a region's pixels from the exact rule below, so that built shards
would change, and it returns uninitialised memory for run lengths that do not add up to the mask.
"""

# H W pixels, n counts

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refine_control.errors import InvalidInputError
from refine_control.photos.values import number, shown, whole
from refine_control.records import MAX_PIXELS, Rejected, RejectReason, Row

_GROUPS = 6
"""Five-bit groups of one count: 30 bits with the sign, more than MAX_PIXELS needs."""
_FARTHEST = 1_000_000
"""Coordinates beyond are a mistake."""
_MOST_CROSSINGS = 4_000_000
"""Of a polygon's edges with rows: more is an attack on memory, not an outline."""


def encode_rle(mask: np.ndarray) -> Row:
    """(H, W) bool -> {"size": [H, W], "counts": compressed}, as COCO's own tools write it."""
    if mask.ndim != 2 or mask.dtype != bool or not mask.size:
        raise InvalidInputError(f"a mask is (H, W) bool with at least one pixel, not {mask.shape} {mask.dtype}")
    flat = mask.T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0, 0] if flat[0] else [0]  # the first run is one of kept pixels
    counts = np.diff(np.concatenate([first, changes, [flat.size]]))
    return {"size": [int(side) for side in mask.shape], "counts": _compress(counts)}


def _compress(counts: np.ndarray) -> str:
    """(n,) counts -> their text."""
    steps = counts.astype(np.int64)
    steps[3:] -= counts[1:-2]
    groups = steps[:, None] >> (5 * np.arange(_GROUPS))  # an arithmetic shift: the sign fills from above
    # group k is the last when the rest is nothing but its sign, which its highest bit states already
    last = (groups >> 4 == 0) | (groups >> 4 == -1)
    end, place = last.argmax(1)[:, None], np.arange(_GROUPS)
    signs = (groups & 31) + np.where(place < end, 32, 0) + 48
    return signs[place <= end].astype(np.uint8).tobytes().decode("ascii")


def _decompress(text: str) -> np.ndarray:
    """The text -> (n,) counts, unchecked; Rejected where the text has other characters."""
    try:
        signs = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        signs = np.full(1, -1)
    ends = np.flatnonzero((signs & 32) == 0)
    if not signs.size or signs.min() < 0 or signs.max() > 63 or not ends.size or ends[-1] != signs.size - 1:
        raise _unreadable("`counts` is not the text of COCO's run lengths")
    starts = np.concatenate([[0], ends[:-1] + 1])
    length = ends - starts + 1
    if length.max() > _GROUPS:
        raise _unreadable("`counts` holds a run that is longer than any photo")
    place = np.arange(signs.size) - np.repeat(starts, length)
    steps = np.add.reduceat((signs & 31) << (5 * place), starts)
    steps -= np.where(signs[ends] & 16, np.int64(1) << (5 * length), 0)
    for first in (1, 2):  # differences to the count two places before
        steps[first::2] = np.cumsum(steps[first::2])
    return steps


def decode_rle(segmentation: Row) -> np.ndarray:
    """{"size": [H, W], "counts": compressed text or list of ints} -> (H, W) bool.

    Rejected when it is not that, or when the counts do not add up to H x W: this is known before memory is taken."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    sides = [whole(side) or 0 for side in size] if isinstance(size, list | tuple) else []
    if len(sides) != 2 or min(sides) < 1:
        raise _unreadable(f"`size` is {shown(size)}, not [height, width] in whole pixels")
    height, width = sides
    if height * width >= MAX_PIXELS:
        raise _unreadable(f"{width} x {height} pixels; a photo has fewer than {MAX_PIXELS:,}")
    if isinstance(counts, str | bytes):
        runs = _decompress(counts.decode("ascii", "replace") if isinstance(counts, bytes) else counts)
    else:
        lengths = [whole(count) for count in counts] if isinstance(counts, list) else [None]
        if not all(length is not None and 0 <= length <= MAX_PIXELS for length in lengths):
            raise _unreadable("`counts` is neither text nor a list of whole numbers from 0")
        runs = np.asarray(lengths, np.int64)
    if runs.size and (runs.min() < 0 or runs.max() > MAX_PIXELS):
        raise _unreadable("`counts` holds a run that is negative or longer than any photo")
    if (total := int(runs.sum())) != height * width:
        raise _unreadable(f"the runs add up to {total} pixels, not {width} x {height}")
    flat = np.repeat(np.arange(runs.size) % 2 == 1, runs)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def _unreadable(detail: str) -> Rejected:
    return Rejected(RejectReason.MASK_UNREADABLE, detail)


def polygons_to_mask(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Flat polygons [x0, y0, x1, y1, ...] -> (H, W) bool: the pixels whose centres lie in any of them (even-odd rule).

    A polygon with fewer than three corners holds none. Rejected when one is not a list of pairs of finite numbers."""
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        values = [number(value) for value in polygon] if isinstance(polygon, list | tuple) else [None]
        if len(values) % 2 or not all(value is not None and -_FARTHEST <= value <= _FARTHEST for value in values):
            raise _unreadable(f"a polygon is {shown(polygon)}, not a list [x0, y0, x1, y1, ...] of numbers")
        if len(values) >= 6:
            _fill(mask, np.asarray(values, np.float64).reshape(-1, 2))
    return mask


def _fill(mask: np.ndarray, corners: np.ndarray) -> None:
    """Sets the pixels of `mask` (H, W) whose centres lie in the polygon with `corners` (n, 2) of x and y.

    Drawn here and not by Pillow, which cuts corners to whole pixels and draws the outline half a pixel too far."""
    height, width = mask.shape
    (x, y), (x_next, y_next) = corners.T, np.roll(corners, -1, axis=0).T
    # an edge crosses the centre lines y = r + 0.5 of the rows r from `first` to before `behind`
    first = np.clip(np.ceil(np.minimum(y, y_next) - 0.5), 0, height).astype(np.int64)
    behind = np.clip(np.ceil(np.maximum(y, y_next) - 0.5), 0, height).astype(np.int64)
    crossed = behind - first
    if (total := int(crossed.sum())) > _MOST_CROSSINGS:
        raise _unreadable(f"a polygon's {len(corners):,} edges cross rows {total:,} times")
    if not total:
        return
    edge = np.repeat(np.arange(len(corners)), crossed)
    row = np.arange(total) - np.repeat(np.cumsum(crossed) - crossed, crossed) + first[edge]
    along = (row + 0.5 - y[edge]) / (y_next - y)[edge]
    at = x[edge] + along * (x_next - x)[edge]
    column = np.clip(np.ceil(at - 0.5), 0, width).astype(np.int64)  # from here on the centres lie beyond the edge
    top, bottom = row.min(), row.max() + 1
    inside = np.zeros((bottom - top, width + 1), bool)
    np.logical_xor.at(inside, (row - top, column), True)
    mask[top:bottom] |= np.logical_xor.accumulate(inside, axis=1)[:, :-1]
