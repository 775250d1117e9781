"""Where in a COCO file each photo and its annotations lie: one pass over the file, then random access by photo.

`images` and `annotations` are lists in any order; an annotation names its photo by `image_id`, and 1, 1.0 and "1" are
one id. Some 40 bytes are kept of an annotation, some 30 of a photo; what is short (categories, licences, the source's
name) is kept whole.
"""

# N photos, M annotations

from __future__ import annotations

import functools
import hashlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_control.errors import InvalidInputError
from refine_control.photos.json_stream import JsonStream, Span, read_value
from refine_control.photos.values import identifier

_NAMES_KEPT = 20
_LISTINGS_KEPT = 2


class _Places:
    """Which bytes of the file the elements of a list are, and a number for the photo of each."""

    def __init__(self) -> None:
        self.starts, self.lengths, self.owners = array("Q"), array("I"), array("Q")

    def note(self, span: Span, photo: object) -> None:
        """`photo` is the photo's id."""
        self.starts.append(span.start)
        self.lengths.append(span.end - span.start)
        self.owners.append(_number(photo))


def _number(name: object) -> int:
    """64 bits that stand for an id; 0 for what can be none."""
    name = identifier(name)
    if name is None:
        return 0
    return int.from_bytes(hashlib.blake2b(repr(name).encode(), digest_size=8).digest(), "little") or 1


class ListedPhoto(NamedTuple):
    """An element of `images` and the annotations that name its id."""

    photo: Any
    annotations: list[dict[str, Any]]
    """In their order. Those of an id that several elements have come with the first of these."""
    rivals: list[str]
    """The files of the photos with this id, where these are several."""
    repeated: bool
    """Whether an earlier element has this id and file."""


class CocoListing:
    """A COCO file that has been walked through once. It stays open.

    Raises InvalidInputError where it is no such file, OSError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.open("rb")
        self.info: Any = None
        self.categories: list[Any] = []
        self.licenses: list[Any] = []
        self.first_names: list[str] = []
        """Of the files of the first photos."""
        photos, annotations = self._read()
        self._photos = np.asarray(photos.starts), np.asarray(photos.lengths)
        self._all = np.asarray(annotations.starts), np.asarray(annotations.lengths)
        owners, of = np.asarray(annotations.owners), np.asarray(photos.owners)
        known = np.isin(owners, of[of != 0])
        self._strangers = np.flatnonzero(~known)
        kept = np.flatnonzero(known)
        order = kept[np.argsort(owners[kept], kind="stable")]
        self._annotations = self._all[0][order], self._all[1][order]
        self._first, self._last = (np.searchsorted(owners[order], of, side) for side in ("left", "right"))
        values, counts = np.unique(of[of != 0], return_counts=True)
        self._shared = np.isin(of, values[counts > 1])

    def _read(self) -> tuple[_Places, _Places]:
        """The places of the photos and of the annotations, and along the way what is short."""
        photos, annotations = None, _Places()
        stream = JsonStream(self.file)
        try:
            for name in stream.members() if stream.at_object() else ():
                if name == "images" and stream.at_list():
                    photos, self.first_names = _Places(), []
                    for span in stream.elements():
                        self._note_photo(photos, span)
                elif name == "annotations" and stream.at_list():
                    annotations = _Places()
                    for span in stream.elements():
                        row = span.value if isinstance(span.value, dict) else {}
                        annotations.note(span, row.get("image_id"))
                elif name in ("categories", "licenses") and stream.at_list():
                    setattr(self, name, [span.value for span in stream.elements()])
                elif name == "info":
                    self.info = stream.value().value
                else:
                    stream.skip()
        except (ValueError, RecursionError):
            raise InvalidInputError(f"{self.path} is not JSON in UTF-8; want COCO's instances_*.json") from None
        if photos is None:
            raise InvalidInputError(f"{self.path} has no list of `images`; want COCO's instances_*.json")
        return photos, annotations

    def _note_photo(self, places: _Places, span: Span) -> None:
        row = span.value if isinstance(span.value, dict) else {}
        places.note(span, row.get("id"))
        if row and len(self.first_names) < _NAMES_KEPT:
            self.first_names.append(str(row.get("file_name")))

    def strangers(self) -> Iterator[tuple[int, Any]]:
        """Number and value of each annotation that is of no photo in the list."""
        for number in self._strangers.tolist():
            yield number, self._value(*(part[number] for part in self._all))

    def file_names(self) -> Iterator[str]:
        """The files of all photos, as they are listed."""
        for start, length in zip(*self._photos, strict=True):
            photo = self._value(start, length)
            if isinstance(photo, dict) and isinstance(photo.get("file_name"), str):
                yield photo["file_name"]

    def __iter__(self) -> Iterator[ListedPhoto]:
        """Each photo as it is listed. Raises InvalidInputError where the file has changed since it was first read."""
        shared_files, passed = self._rivals(), set[object]()
        for start, length, first, last in zip(*self._photos, self._first, self._last, strict=True):
            photo = self._value(start, length)
            name = identifier(photo.get("id")) if isinstance(photo, dict) else None
            files = shared_files.get(name, [])
            if name is None or name in passed:
                yield ListedPhoto(photo, [], files[1:] and files, repeated=name is not None)
                continue
            rows = (self._value(*(part[number] for part in self._annotations)) for number in range(first, last))
            # two ids may have one number
            annotations = [row for row in rows if identifier(row["image_id"]) == name]
            yield ListedPhoto(photo, annotations, files[1:] and files, repeated=False)
            if files:
                passed.add(name)

    def _rivals(self) -> dict[object, list[str]]:
        """The files of each id that several elements have, two at most."""
        files: dict[object, list[str]] = {}
        for start, length in zip(*(part[self._shared] for part in self._photos), strict=True):
            photo = self._value(start, length)
            of_id, name = files.setdefault(identifier(photo.get("id")), []), str(photo.get("file_name"))
            if name not in of_id and len(of_id) < 2:
                of_id.append(name)
        return files

    def _value(self, start: int, length: int) -> Any:
        try:
            return read_value(self.file, int(start), int(start) + int(length))
        except ValueError:
            raise InvalidInputError(f"{self.path} changed while it was read; run the same command again") from None


def coco_listing(path: Path) -> CocoListing:
    """The listing of a COCO file; the last few are kept while the file stays as it is. Raises as `CocoListing`."""
    state = path.stat()
    return _listing(path, state.st_mtime_ns, state.st_ctime_ns, state.st_size)


@functools.lru_cache(_LISTINGS_KEPT)
def _listing(path: Path, mtime_ns: int, ctime_ns: int, size: int) -> CocoListing:
    return CocoListing(path)
