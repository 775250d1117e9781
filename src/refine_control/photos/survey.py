"""One pass over a source before anything is built: what it holds, which entries are one photograph, and their roles.

Entries of one photo id, of one content, or of near-duplicate contents (`photos.near_duplicates`) are one photograph,
and so are entries that a chain of these connects. Its name is the least of its ids.
"""

# N photographs, n entries

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refine_control.photos.decode import thumbnail
from refine_control.photos.files import read_bytes
from refine_control.photos.near_duplicates import SIDE, fingerprint, near_pairs
from refine_control.photos.sources import entries, photos_of
from refine_control.records import INPAINT, LABELED, TEST, UNLABELED, Entry, Rejected
from refine_control.workers import InOrder

logger = logging.getLogger(__name__)

Fits = Callable[[int, int], bool]
"""Whether a picture of (width, height) is large enough for a sample."""


@dataclass(frozen=True)
class Survey:
    """What one pass over the source has to say, in a few hundred bytes a photo."""

    sha256: str
    """Of everything that a build reads, and of which photograph each entry is."""
    photos: list[str]
    """The photograph of each entry, in the order of `sources.entries`."""
    usable: set[str]
    """The photographs of which a sample can be expected: the split counts these alone."""
    left_out: list[Entry]
    """What never was a sample to be; none of it is in `sha256` or `photos`."""

    @property
    def count(self) -> int:
        """All entries, those that are left out included."""
        return len(self.photos) + len(self.left_out)


class _Look(NamedTuple):
    """What the files of consecutive entries of one image say; None for what cannot be read."""

    content: str | None
    fingerprint: int | None
    size: tuple[int, int]
    """(W, H) of the picture as shown; 0 where it cannot be decoded."""
    parts: list[str | None]
    """Of the mask or condition picture of each entry."""


def _look(group: list[Entry]) -> _Look:
    """An entry with a problem is not going to be read: nor are its mask and condition picture, and the image of a
    group of such entries."""
    readable = next((entry for entry in group if entry.problem is None), None)
    content, mark, size = None, None, (0, 0)
    with contextlib.suppress(Rejected):  # the build will say why
        if readable is not None:
            data = read_bytes(readable.root, readable.image)
            content = hashlib.sha256(data).hexdigest()
            small, header = thumbnail(data, SIDE)
            mark, size = fingerprint(small), header.size
    return _Look(content, mark, size, list(map(_part_content, group)))


def _part_content(entry: Entry) -> str | None:
    part = entry.mask or entry.condition
    with contextlib.suppress(Rejected):
        if entry.problem is None and part is not None:
            return hashlib.sha256(read_bytes(entry.root, part)).hexdigest()
    return None


def survey(
    source: Path,
    in_order: InOrder,
    *,
    images: Path | None,
    limit: int | None,
    fits: Fits,
    condition: str = INPAINT,
    prepared: bool = False,
) -> Survey:
    """Reads and hashes all that a build will read. `fits` says which pictures will not be refused as too small,
    `prepared` that the pictures of the `condition` need not be given."""
    whole, numbers, serves = hashlib.sha256(), array("q"), bytearray()
    ids: dict[str, int] = {}
    contents: dict[bytes, int] = {}
    masks, masked, marks, marked = array("Q"), array("q"), array("Q"), array("q")
    same = array("q")  # pairs of ids that are one photograph
    left_out: list[Entry] = []
    # what the workers look at runs a few groups ahead of what is folded here
    listed = itertools.islice(entries(source, images, left_out.append, condition), limit)
    ahead, behind = itertools.tee(photos_of(listed))
    for group, look in zip(behind, in_order(_look, ahead), strict=True):
        for entry, part in zip(group, look.parts, strict=True):
            whole.update(json.dumps([*_listed_facts(entry), look.content, part], sort_keys=True).encode() + b"\n")
            number = ids.setdefault(entry.photo, len(ids))
            numbers.append(number)
            serves.append(_serves(entry, look, part, fits, prepared))
            if serves[-1] and entry.mask is not None:
                masks.append(int.from_bytes(_hash(os.path.normpath(entry.mask)), "little"))
                masked.append(number)
            if look.content is None:
                continue
            digest = bytes.fromhex(look.content)[:16]
            if (other := contents.get(digest)) is not None:
                if other != number:  # not for each region of one photo
                    same.extend((number, other))
                continue
            contents[digest] = number
            if look.fingerprint is not None:
                marks.append(look.fingerprint)
                marked.append(number)
    for one, other in near_pairs(np.asarray(marks, np.uint64)):
        same.extend((marked[one], marked[other]))
    names = _photographs(list(ids), np.asarray(same).reshape(-1, 2))
    _warn_of_shared_masks(np.asarray(masks), np.asarray(masked), names)
    photos = [names[number] for number in numbers]
    for name in photos:
        whole.update(json.dumps(name).encode() + b"\n")
    usable = {name for name, each in zip(photos, serves, strict=True) if each}
    return Survey(whole.hexdigest(), photos, usable, left_out)


def _photographs(ids: list[str], same: np.ndarray) -> list[str]:
    """The name of each id's photograph: the least of the ids that a chain of the pairs `same` (n, 2) connects."""
    if not len(same):
        return ids
    from scipy.sparse import coo_array  # here, because every worker imports this module
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(same), bool), (same[:, 0], same[:, 1])), (len(ids), len(ids)))
    labels = connected_components(graph, directed=False)[1].tolist()
    least: dict[int, str] = {}
    for label, name in zip(labels, ids, strict=True):
        least[label] = min(name, least.get(label, name))
    return [least[label] for label in labels]


def _warn_of_shared_masks(masks: np.ndarray, photos: np.ndarray, names: list[str]) -> None:
    """Only a list can name one mask for several photographs, and it may mean to."""
    order = np.argsort(masks, kind="stable")
    again = np.flatnonzero(masks[order][1:] == masks[order][:-1])
    pairs = zip(photos[order][again].tolist(), photos[order][again + 1].tolist(), strict=True)
    different = [(names[one], names[other]) for one, other in pairs if names[one] != names[other]]
    if different:
        message = "%d times one mask is named for two photographs, first for %s and %s"
        logger.warning(message, len(different), *different[0])


def _hash(name: str) -> bytes:
    """Eight bytes."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _listed_facts(entry: Entry) -> list[object]:
    """What the source says of an entry, as far as it reaches a sample."""
    words = [entry.key, entry.image, entry.mask, entry.prompt, entry.global_prompt, entry.meta]
    facts = [*words, entry.problem[0].value if entry.problem else None, entry.segmentation]
    return [*facts, entry.condition] if entry.condition else facts


def _serves(entry: Entry, look: _Look, part: str | None, fits: Fits, prepared: bool) -> bool:
    """Whether nothing is known yet that keeps the entry from being a sample."""
    needless = prepared or entry.segmentation is not None
    shown = part is not None or (entry.mask is None and entry.condition is None and needless)
    return entry.problem is None and entry.prompt is not None and shown and min(look.size) > 0 and fits(*look.size)


def split(photographs: Iterable[str], seed: int, test_fraction: float, unlabeled_fraction: float) -> dict[str, str]:
    """The role of each photograph: a function of the seed and of the set alone; the shares are hit to the nearest one.

    The photographs stand in the order of a hash of (seed, name); the first of them are `test`, the next `unlabeled`,
    the rest `labeled`. When the set grows that order stays and the two borders move: of a set of N some
    sqrt(N) photographs change their roles, so what was tested on may be trained on afterwards. Who lets a set grow
    builds the test from a source of its own, or trains anew."""
    ordered = sorted(set(photographs), key=lambda name: (_hash(f"{seed}\0{name}"), name))
    tests = round(test_fraction * len(ordered))
    unlabeled = tests + round(unlabeled_fraction * (len(ordered) - tests))
    roles = [TEST] * tests + [UNLABELED] * (unlabeled - tests) + [LABELED] * (len(ordered) - unlabeled)
    return dict(zip(ordered, roles, strict=True))
