"""Small real photographs with a category and a box each: the mini model's other world.

A folder of WebDataset tars (plain or gzipped) whose samples are KEY.jpg and KEY.json = {"category", "box": [x0, y0, x1,
y1] in pixels}. The box is the mask, the category the local prompt. Which part a photograph belongs to is a function of
its key alone, so the teacher, the students and the test never share one, whatever is read when.
"""

# N photographs, S side of a picture in pixels

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_control.errors import DamagedError, InvalidInputError
from refine_control.photos.shards import ShardWriter
from refine_control.progress import Progress
from refine_control.randomness import derive_seed
from refine_control.records import LABELED, TEST, UNLABELED, Photo, with_article
from refine_control.storage import MANIFEST, only_writer, sha256_file

SIDE = 64
AREA = (0.05, 0.6)
"""Boxes that cover less or more of the picture are left out: nothing to paint, or nothing to keep."""
PARTS = {"teacher": 0.70, "student": 0.22, TEST: 0.08}
"""Shares of the photographs: the teacher's own, those that students learn from, and those that nobody sees."""
_WORD = re.compile(r"'s|[^\W\d_]+|\d|[^\s\w]+")
"""CLIP's tokenizer knows words, single digits and runs of other characters: `go-kart` is three of them."""


class SmallPhotos(NamedTuple):
    """Photographs of one part, in the order of their shards."""

    keys: list[str]
    images: np.ndarray
    """(N, S, S, 3) uint8."""
    masks: np.ndarray
    """(N, S, S) bool, True = inpaint."""
    prompts: list[str]
    """`a goldfish`."""


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
    named = {str(told.get("category", "")) for _, told, _ in _samples(folder)}
    found = {word for name in named for word in _WORD.findall(with_article(name).lower())}
    return tuple(sorted(found | {"a", "an"}))


def read_small_photos(
    folder: Path, part: str, side: int = SIDE, limit: int | None = None, progress: Progress | None = None
) -> SmallPhotos:
    """The photographs of a part, at most `limit`, as squares of `side` pixels around their centre.

    Raises InvalidInputError without such shards or a photograph of that part, DamagedError for a cut shard."""
    keys, images, masks, prompts = [], [], [], []
    for key, told, data in _samples(folder):
        if part_of(key) != part:
            continue
        found = _square(data, told, side)
        if found is None:
            continue
        keys.append(key)
        images.append(found[0])
        masks.append(found[1])
        prompts.append(with_article(str(told["category"])))
        if progress and len(keys) % 256 == 0:
            progress(len(keys), limit or len(keys), part)
        if len(keys) == limit:
            break
    if not keys:
        raise InvalidInputError(f"{folder} has no photograph of the part {part} with a box of {AREA} of its picture")
    return SmallPhotos(keys, np.stack(images), np.stack(masks), prompts)


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
        for role, found, start, count in (
            (LABELED, student, 0, labeled),
            (UNLABELED, student, labeled, unlabeled),
            (TEST, held_back, 0, test),
        ):
            described = {"small_photos": count, "first": found.keys[start], "last": found.keys[start + count - 1]}
            folder = out / role
            if (folder / MANIFEST).is_file():
                had = json.loads((folder / MANIFEST).read_text())
                if {k: had.get(k) for k in described} != described:
                    raise InvalidInputError(f"{folder} holds other photographs; choose another folder")
                continue
            writer = ShardWriter(folder, role, image_format="webp")
            for i in range(start, start + count):
                meta = {"photo": found.keys[i]}
                writer.add(Photo(found.keys[i], found.images[i], found.masks[i], found.prompts[i], "", meta))
            writer.finish(**described)
    return {LABELED: labeled, UNLABELED: unlabeled, TEST: test}


def _shards(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.name.endswith((".tar", ".tar.gz"))) if folder.is_dir() else []
    if not found:
        raise InvalidInputError(f"{folder} holds no .tar or .tar.gz; give a folder of WebDataset shards")
    return found


def _samples(folder: Path) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """Key, JSON and picture of every sample that has both, shard by shard."""
    for shard in _shards(folder):
        waiting: dict[str, dict[str, bytes]] = {}
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    stem, _, suffix = member.name.rpartition(".")
                    file = tar.extractfile(member) if suffix in ("jpg", "json") else None
                    if file is None:
                        continue
                    parts = waiting.setdefault(stem, {})
                    parts[suffix] = file.read()
                    if len(parts) == 2:
                        yield Path(stem).name, json.loads(parts["json"]), waiting.pop(stem)["jpg"]
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise DamagedError(f"{shard} cannot be read to its end: {error}; get it again") from None


def _square(data: bytes, told: dict[str, Any], side: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Picture and mask; None for a box that is none or covers too little or too much."""
    from PIL import Image

    box = told.get("box")
    if not told.get("category") or not isinstance(box, list) or len(box) != 4:
        return None
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    scale = side / min(picture.size)
    width, height = (max(side, round(scale * length)) for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    image = picture.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))
    x0, y0, x1, y1 = (round(scale * float(v)) for v in box)
    mask = np.zeros((side, side), bool)
    mask[max(0, y0 - top) : max(0, y1 - top), max(0, x0 - left) : max(0, x1 - left)] = True
    return (np.asarray(image), mask) if AREA[0] <= mask.mean() <= AREA[1] else None
