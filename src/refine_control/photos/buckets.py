"""Aspect-ratio buckets: the few sizes that samples of about `size`^2 pixels may have, and which of them a photo gets.

`sizes_for` is the list, `nearest` the choice; both are pure functions of whole numbers. A role's shards may hold all
sizes in any order (the index tells each sample's), because the order of the samples is then that of the source as
it is with squares, and nothing changes for who reads a sample by its number or checks a shard's bytes. Whoever needs
samples of one size together, as a batch does, groups them by `grouped`.
"""

# (H, W) pixels everywhere

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import repeat
from typing import Any

from refine_control.errors import InvalidInputError
from refine_control.photos.shards import Shards, ShardWriter
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
    if not isinstance(photos, Shards):
        return (_pair(photo.mask.shape) for photo in photos)
    same = photos.manifest["image_size"]
    return repeat(_pair(same), len(photos)) if same else (_pair(record["shape"]) for record in photos.records)


def _pair(shape: Sequence[int]) -> Size:
    height, width = shape
    return height, width


class BucketWriter(ShardWriter):
    """A ShardWriter for samples of several sizes.

    The manifest says `image_sizes`, [H, W, samples] of each; its `image_size` is null where there are several."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counts = Counter[Size]()

    def add(self, photo: Photo, members: dict[str, bytes] | None = None) -> None:
        """As `ShardWriter.add`, whatever the size of the sample before."""
        self._size = None
        super().add(photo, members)

    def cut(self) -> list[dict[str, Any]]:
        """As `ShardWriter.cut`."""
        published = super().cut()
        self._counts.update(_pair(record["shape"]) for record in published)
        return published

    def adopt(self, records: list[dict[str, Any]]) -> None:
        """As `ShardWriter.adopt`."""
        super().adopt(records)
        self._counts.update(_pair(record["shape"]) for record in records)

    def finish(self, **described: Any) -> dict[str, Any]:
        """As `ShardWriter.finish`."""
        self.cut()
        self._size = next(iter(self._counts)) if len(self._counts) == 1 else None
        sizes = [[*size, count] for size, count in sorted(self._counts.items())]
        return super().finish(**described, image_sizes=sizes)
