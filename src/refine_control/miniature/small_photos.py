"""Small real photographs with a category and a box each: the mini model's other world.

A folder of WebDataset tars (plain or gzipped) whose samples are KEY.jpg and KEY.json = {"category", "box": [x0, y0, x1,
y1] in pixels}, read by the code of `data build`: photographs are turned as they are shown, and one that cannot be used
is left out with a warning. The box is the mask, the category the local prompt. The part of a photograph is a function
of its KEY alone, so the teacher, the students and the test never share one, whatever is read when.
"""

# N photographs, S side of a picture in pixels

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from refine_control.errors import DamagedError, InvalidInputError
from refine_control.folders import PHOTOGRAPHS, refuse_other_kind
from refine_control.miniature.scene_shards import write_role
from refine_control.photos.decode import decode, on_ground
from refine_control.photos.files import TAR_SUFFIXES, read_bytes, tar_listing
from refine_control.photos.named_files import tar_entries
from refine_control.progress import Progress
from refine_control.randomness import derive_seed
from refine_control.records import (
    LABELED,
    LEFT_OUT,
    TEST,
    UNLABELED,
    Entry,
    Photo,
    Rejected,
    RejectReason,
    make_key,
    with_article,
)
from refine_control.storage import only_writer, sha256_file

logger = logging.getLogger(__name__)

SIDE = 64
AREA = (0.05, 0.6)
"""Boxes that cover less or more of the picture are left out: nothing to paint, or nothing to keep."""
PARTS = {"teacher": 0.70, "student": 0.22, TEST: 0.08}
"""Shares of the photographs: the teacher's own, those that students learn from, and those that nobody sees."""
_WORD = re.compile(r"'s|[^\W\d_]+|\d|[^\s\w]+")
"""CLIP's tokenizer knows words, single digits and runs of other characters: `go-kart` is three of them."""
_SAFE_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_NAMED = 5
"""Files that a warning names."""
_warned: set[tuple[Path, str]] = set()


class SmallPhotos(NamedTuple):
    """Photographs of one part, in the order of their shards."""

    keys: list[str]
    images: np.ndarray
    """(N, S, S, 3) uint8."""
    masks: np.ndarray
    """(N, S, S) bool, True = inpaint."""
    prompts: list[str]
    """`a goldfish`."""

    def photo(self, row: int) -> Photo:
        """One of them, for the shards."""
        key = self.keys[row]
        return Photo(key, self.images[row], self.masks[row], self.prompts[row], "", {"photo": key})


@lru_cache
def small_photos_mark(folder: Path) -> str:
    """The hash of what a folder of them gives: its shards, and how they are divided and chosen."""
    shards = {path.name: sha256_file(path) for path in _shards(folder)}
    return hashlib.sha256(json.dumps([shards, SIDE, AREA, PARTS], sort_keys=True).encode()).hexdigest()


def part_of(key: str) -> str:
    """The part of PARTS that a photograph belongs to."""
    place = derive_seed("small photos", key) / 2**63
    for part, share in PARTS.items():
        if place < share:
            return part
        place -= share
    return TEST


def category_words(folder: Path) -> tuple[str, ...]:
    """Every word that a prompt of these photographs may hold, as CLIP splits them, sorted; with the articles."""
    categories = {str(entry.meta.get("category", "")) for entry in _entries(folder) if entry.problem is None}
    words = {word for name in categories for word in _WORD.findall(with_article(name).lower())}
    return tuple(sorted(words | {"a", "an"}))


def read_small_photos(
    folder: Path, part: str, side: int = SIDE, limit: int | None = None, progress: Progress | None = None
) -> SmallPhotos:
    """The photographs of a part, at most `limit`, as squares of `side` pixels around their centre.

    Raises InvalidInputError without such shards or a photograph of that part, DamagedError for a cut shard."""
    samples: dict[str, tuple[np.ndarray, np.ndarray, str]] = {}
    faults: dict[str, str] = {}
    for entry in _entries(folder):
        left_out = entry.problem is not None and entry.problem[0] in LEFT_OUT
        key = PurePosixPath(entry.image).stem  # without folder and extension: what its part depends on
        if not left_out and part_of(key) != part:
            continue
        try:
            square = _square(entry, side)
        except Rejected as error:
            faults[entry.image] = error.detail
            continue
        if square is None:
            continue
        key = key if _SAFE_KEY.fullmatch(key) and key not in samples else make_key(entry.image, None)
        samples[key] = (*square, with_article(str(entry.meta["category"])))
        if progress and len(samples) % 256 == 0:
            progress(len(samples), limit or len(samples), part)
        if len(samples) == limit:
            break
    _warn(folder, faults)
    if not samples:
        raise InvalidInputError(f"{folder} has no photograph of the part {part} with a box of {AREA} of its picture")
    images, masks, prompts = zip(*samples.values(), strict=True)
    return SmallPhotos(list(samples), np.stack(images), np.stack(masks), list(prompts))


def build_small_photos(
    source: Path, out: Path, *, labeled: int, unlabeled: int, test: int, progress: Progress | None = None
) -> dict[str, int]:
    """Writes `out/labeled`, `out/unlabeled` and `out/test` as `scene_shards.build_scenes` does; counts by role.

    D_sl are the first photographs of the students' part, D_ssl those after them. Finished roles stay. Raises
    InvalidInputError when there are fewer photographs, or `out` holds others."""
    with only_writer(out):
        student = read_small_photos(source, "student", limit=labeled + unlabeled, progress=progress)
        held_back = read_small_photos(source, TEST, limit=test, progress=progress)
        if len(student.keys) < labeled + unlabeled or len(held_back.keys) < test:
            raise InvalidInputError(
                f"{source} has {len(student.keys)} photographs for students and {len(held_back.keys)} for the test; "
                f"the budget asks for {labeled + unlabeled} and {test}"
            )
        for role, photos, start, count in (
            (LABELED, student, 0, labeled),
            (UNLABELED, student, labeled, unlabeled),
            (TEST, held_back, 0, test),
        ):
            rows = range(start, start + count)
            described = {"small_photos": count, "first": photos.keys[rows[0]], "last": photos.keys[rows[-1]]}
            write_role(out / role, map(photos.photo, rows), count, described)
    return {LABELED: labeled, UNLABELED: unlabeled, TEST: test}


def _shards(folder: Path) -> list[Path]:
    refuse_other_kind(folder, PHOTOGRAPHS)
    listed = sorted(folder.iterdir()) if folder.is_dir() else []
    shards = [p for p in listed if p.name.lower().endswith(TAR_SUFFIXES) and not p.name.startswith(".")]
    if not shards:
        raise InvalidInputError(f"{folder} holds no .tar or .tar.gz; give a folder of WebDataset shards")
    return shards


def _entries(folder: Path) -> Iterator[Entry]:
    """What `data build` sees in the shards. Raises DamagedError for a cut shard."""
    for shard in _shards(folder):
        fault = tar_listing(shard).problem
        if fault is not None:
            raise DamagedError(f"{shard} cannot be read to its end: {fault}; get it again")
        yield from tar_entries(folder, shard.name)


def _square(entry: Entry, side: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Picture and mask; None for a box that covers too little or too much. Raises Rejected with the reason."""
    if entry.problem is not None:
        raise Rejected(*entry.problem)
    if not entry.meta.get("category"):
        raise Rejected(RejectReason.NO_PROMPT, "its .json names no `category`")
    x0, y0, x1, y1 = _box(entry)
    picture = on_ground(decode(read_bytes(entry.root, entry.image))[0], "white")
    scale = side / min(picture.size)
    width, height = (max(side, round(scale * length)) for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    image = picture.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))
    x0, y0, x1, y1 = (round(scale * value) for value in (x0, y0, x1, y1))
    mask = np.zeros((side, side), bool)
    mask[max(0, y0 - top) : max(0, y1 - top), max(0, x0 - left) : max(0, x1 - left)] = True
    return (np.asarray(image), mask) if AREA[0] <= mask.mean() <= AREA[1] else None


def _box(entry: Entry) -> tuple[float, float, float, float]:
    """The `box` of an entry's description, which `photos.named_files` has read as a polygon around its last pixels."""
    polygons = entry.segmentation if isinstance(entry.segmentation, list) else []
    if entry.mask is None and len(polygons) == 1 and len(polygons[0]) == 8:
        x0, y0, x1, _, _, y1, *_ = polygons[0]
        if polygons[0] == [x0, y0, x1, y0, x1, y1, x0, y1]:
            return x0, y0, x1 - 1, y1 - 1
    raise Rejected(RejectReason.NO_MASK, "its .json names no `box`")


def _warn(folder: Path, faults: dict[str, str]) -> None:
    """Names the files that are left out, each once in a process."""
    new = {name: why for name, why in faults.items() if (folder, name) not in _warned}
    _warned.update((folder, name) for name in new)
    if new:
        named = "; ".join(f"{name} ({why})" for name, why in itertools.islice(new.items(), _NAMED))
        more = f"; and {len(new) - _NAMED} more" if len(new) > _NAMED else ""
        logger.warning("left out of %s, %d files: %s%s", folder, len(new), named, more)
