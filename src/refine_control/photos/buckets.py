"""Aspect-ratio buckets: the few sizes that samples of about `size`^2 pixels may have, and which of them a photo gets.

`sizes_for` is the list, `nearest` the choice; both are pure functions of whole numbers. Shards keep the samples in the
order of the source; `grouped` gives those of one size together, as batches need them.
"""

# (H, W) pixels everywhere

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import repeat

from refine_control.errors import InvalidInputError
from refine_control.photos.shards import Shards
from refine_control.records import Photo

STEP = 16
"""Pixels of which every side is a multiple: eight of the autoencoder by two of the transformer's patches."""
LARGEST_RATIO = 2
Size = tuple[int, int]
"""(H, W)."""


def sizes_for(size: int) -> list[Size]:
    """The sizes for squares of `size` pixels, from the widest to the tallest.

    For each shorter side from `size` downwards in steps of 16 there is one longer side: the multiple of 16 that
    brings the area nearest to size^2 (of two the shorter), as long as the ratio is at most 2. 64: 80 x 48, 64 x 64,
    48 x 80. 512 has 19, from 720 x 368 to 368 x 720, each area within 1.2 % of 512^2. Raises InvalidInputError unless
    `size` is a multiple of 16."""
    if size < STEP or size % STEP:
        raise InvalidInputError(f"size is {size}; with buckets it must be a multiple of {STEP}")
    square = size // STEP
    wide = []
    for short in range(1, square + 1):
        long = (2 * square * square + short - 1) // (2 * short)  # square^2 / short, to the nearest, half downwards
        if long <= LARGEST_RATIO * short:
            wide.append((short * STEP, long * STEP))
    return wide + [(width, height) for height, width in reversed(wide[:-1])]


def nearest(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """Of `sizes` the one whose aspect ratio is the photo's times the least factor; the first of equal ones."""

    def factor(size: Size) -> Fraction:
        one, other = width * size[0], height * size[1]
        return Fraction(max(one, other), min(one, other))

    return min(sizes, key=factor)


def grouped(sizes: Iterable[Size]) -> dict[Size, array[int]]:
    """The numbers of the samples of each size, in their order; the sizes sorted."""
    by_size: dict[Size, array[int]] = {}
    for number, size in enumerate(sizes):
        by_size.setdefault(size, array("q")).append(number)
    return dict(sorted(by_size.items()))


def sizes_of(photos: Sequence[Photo]) -> Iterator[Size]:
    """The size of each sample; of shards by their index, without decoding any."""
    shapes: Iterable[Sequence[int]] = (photo.mask.shape for photo in photos)
    if isinstance(photos, Shards):
        same = photos.manifest["image_size"]
        shapes = repeat(same, len(photos)) if same else (record["shape"] for record in photos.records)
    return ((height, width) for height, width in shapes)
