"""The part of a photograph that a model paints, and how it is put back: without torch.

Frames: a hole is painted in a square around its bounding box with `context` times the hole's longer side on each side,
at least the model's side in pixels of the photograph; at the photograph's border the square is moved inside, and where
the photograph is smaller it is cut. A frame larger than the model's side is scaled down to it; one smaller, which is a
whole photograph, is scaled up to it; anything else is painted as it is. Holes share a frame where this costs none of
them resolution, so distant holes are painted one after the other, each at full resolution. Sides that are no multiple
of what the model paints are padded by reflection, and the padding is cut off again.

Edges: the painted part replaces the hole and fades out around it within `feather` pixels. Pixels farther away (in rows
or in columns) are not touched at all.
"""

# H W pixels of the photograph, h w pixels of a frame as the model paints it

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from refine_control.errors import InvalidInputError
from refine_control.models.fit import Geometry

CONTEXT = 0.5
"""Width of the surroundings on each side of a hole, as a share of the hole's longer side."""
FEATHER = 1 / 32
"""Width of the faded edge, as a share of the frame's longer side."""
_CELLS = 64
"""Cells along the longer side of the grid on which separate holes are recognised."""

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels, the last column and row excluded, as in PIL."""


class Frame(NamedTuple):
    """A part of a photograph and the size at which it is painted."""

    box: Box
    """Of the photograph."""
    size: tuple[int, int]
    """(w, h) of its content as painted."""
    hole: Box
    """Bounding box of the hole for which it is painted; other holes may reach into the frame."""

    def padded(self, multiple: int) -> tuple[int, int]:
        """(w, h) of the picture that the model paints."""
        return tuple(-(-side // multiple) * multiple for side in self.size)  # type: ignore[return-value]

    def padding(self, multiple: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns to add before and after its content."""
        (width, height), (w, h) = self.padded(multiple), self.size
        return (0, height - h), (0, width - w)


def box_mask(box: Box, width: int, height: int) -> np.ndarray:
    """(H, W) bool: True inside the box. Raises InvalidInputError for a box that is empty or reaches outside."""
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InvalidInputError(
            f"the box {x0},{y0},{x1},{y1} does not lie in the photograph of {width} x {height} pixels; give "
            f"x0,y0,x1,y1 with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
        )
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def bounding_box(mask: np.ndarray) -> Box:
    """Of the True pixels of (H, W) bool, of which there is at least one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def frames(mask: np.ndarray, geometry: Geometry, context: float = CONTEXT, whole: bool = False) -> list[Frame]:
    """(H, W) bool, not empty -> the frames to paint, in reading order; `whole`: the photograph as it is, in one.

    Raises InvalidInputError for a whole photograph that is larger than the model paints."""
    height, width = mask.shape
    if whole:
        frame = Frame((0, 0, width, height), (width, height), bounding_box(mask))
        w, h = frame.padded(geometry.multiple)
        if max(w, h) > geometry.largest:
            raise InvalidInputError(
                f"the photograph of {width} x {height} pixels is too large to be painted whole: this model paints up "
                f"to {geometry.largest} pixels a side; leave out --whole (`whole`) or make it smaller"
            )
        return [frame]
    merged: list[Box] = []
    for box in _holes(mask):
        merged.append(box)
        while (pair := _sharing(merged, geometry.side, context)) is not None:
            first, second = pair
            merged = [each for each in merged if each not in pair] + [_union(first, second)]
    return [_frame(box, width, height, geometry, context) for box in sorted(merged, key=lambda b: (b[1], b[0]))]


def _length(box: Box, side: int, context: float) -> int:
    """Side of the square that a hole is painted in."""
    return max(side, round(max(box[2] - box[0], box[3] - box[1]) * (1 + 2 * context)))


def _union(a: Box, b: Box) -> Box:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _sharing(boxes: list[Box], side: int, context: float) -> tuple[Box, Box] | None:
    """The last box and another whose common square is no larger than the larger one of theirs."""
    *others, last = boxes
    for other in others:
        if _length(_union(other, last), side, context) <= max(_length(each, side, context) for each in (other, last)):
            return other, last
    return None


def _frame(hole: Box, width: int, height: int, geometry: Geometry, context: float) -> Frame:
    length, ends = _length(hole, geometry.side, context), []
    for low, high, most in ((hole[0], hole[2], width), (hole[1], hole[3], height)):
        extent = min(length, most)
        start = min(max(0, (low + high - extent) // 2), most - extent)
        ends.append((start, start + extent))
    (x0, x1), (y0, y1) = ends
    longer = max(x1 - x0, y1 - y0)
    w, h = (max(1, round(extent * geometry.side / longer)) for extent in (x1 - x0, y1 - y0))
    return Frame((x0, y0, x1, y1), (w, h), hole)


def _holes(mask: np.ndarray) -> Iterator[Box]:
    """Bounding boxes of the separate holes: groups of cells of a coarse grid that touch, in reading order."""
    cell = -(-max(mask.shape) // _CELLS)
    starts = [np.arange(0, side, cell) for side in mask.shape]
    occupied = np.logical_or.reduceat(np.logical_or.reduceat(mask, starts[0], 0), starts[1], 1)
    left = set(map(tuple, np.argwhere(occupied).tolist()))
    for seed in sorted(left):
        group, waiting = np.zeros_like(occupied), [seed] if seed in left else []
        left.discard(seed)
        while waiting:
            y, x = waiting.pop()
            group[y, x] = True
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            waiting += near
        if group.any():
            x0, y0, x1, y1 = bounding_box(group)
            cells = group[y0:y1, x0:x1].repeat(cell, 0).repeat(cell, 1)
            part = mask[cell * y0 : cell * y1, cell * x0 : cell * x1]
            a, b, c, d = bounding_box(part & cells[: part.shape[0], : part.shape[1]])
            yield cell * x0 + a, cell * y0 + b, cell * x0 + c, cell * y0 + d


def cut(image: np.ndarray, mask: np.ndarray, frame: Frame, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """image (H, W, 3) uint8 and mask (H, W) bool -> what the model is shown of a frame: (h, w, 3) uint8, (h, w) bool.

    A pixel of the model is in the hole where any pixel of the photograph under it is."""
    (x0, y0, x1, y1), (w, h) = frame.box, frame.size
    hole = mask[y0:y1, x0:x1]
    if frame.size != (x1 - x0, y1 - y0):
        hole = _any_under(_any_under(hole, h, 0), w, 1)
    return cut_picture(image, frame, multiple), np.pad(hole, frame.padding(multiple), "reflect")


def cut_picture(
    image: np.ndarray, frame: Frame, multiple: int, how: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    """image (H, W, 3) uint8 -> a frame of it as the model paints it, (h, w, 3) uint8, resized as `how` says."""
    x0, y0, x1, y1 = frame.box
    part = image[y0:y1, x0:x1]
    if frame.size != (x1 - x0, y1 - y0):
        part = np.asarray(Image.fromarray(part).resize(frame.size, how))
    return np.pad(part, (*frame.padding(multiple), (0, 0)), "reflect")


def _any_under(mask: np.ndarray, count: int, axis: int) -> np.ndarray:
    """A mask with `count` rows or columns, each True where any of those that it overlaps is."""
    side, ends = mask.shape[axis], np.arange(count + 1)
    sides = [(0, 0), (0, 0)]
    sides[axis] = (1, 0)
    total = np.pad(mask.astype(np.int32), sides).cumsum(axis, dtype=np.int32)
    return total.take(-(-ends[1:] * side // count), axis) > total.take(ends[:-1] * side // count, axis)


def uncut(painted: np.ndarray, frame: Frame) -> np.ndarray:
    """What the model painted of a frame, (h, w, 3) uint8 -> the same without padding in the size of the frame's box."""
    (x0, y0, x1, y1), (w, h) = frame.box, frame.size
    content = painted[:h, :w]
    if frame.size == (x1 - x0, y1 - y0):
        return content
    return np.asarray(Image.fromarray(content).resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS))


def opacity(mask: np.ndarray, feather: int) -> np.ndarray:
    """(H, W) bool -> (H, W) float32: 1 in the hole, 0 farther than `feather` pixels from it, and falling between.

    The hole is widened by half the feather and averaged over a square of the same reach."""
    reach = feather // 2
    if not reach:
        return mask.astype(np.float32)
    wide = _box_sums(mask.astype(np.int32), reach) > 0
    return _box_sums(wide.astype(np.int32), reach).astype(np.float32) / np.float32((2 * reach + 1) ** 2)


def _box_sums(values: np.ndarray, reach: int) -> np.ndarray:
    """Sums of (H, W) integers over squares of 2 reach + 1 pixels; beyond the border the last row and column repeat."""
    for axis in (0, 1):
        sides = [(0, 0), (0, 0)]
        sides[axis] = (reach + 1, reach)
        total = np.pad(values, sides, "edge").cumsum(axis, dtype=np.int32)
        count = values.shape[axis]
        ends = np.arange(count) + 2 * reach + 1
        values = total.take(ends, axis) - total.take(ends - 2 * reach - 1, axis)
    return values


def blend(original: np.ndarray, painted: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Both (H, W, C) uint8, weight (H, W) float32 of `painted` -> (H, W, C) uint8; weight 0 keeps the exact value."""
    share = weight[..., None]
    mixed = original + share * (painted.astype(np.float32) - original)
    return np.where(share > 0, mixed.round().clip(0, 255), original).astype(np.uint8)
