"""Where in a COCO file each photo and its annotations lie: one pass over the file, then any photo at once.

`images` and `annotations` are lists in any order; an annotation names its photo by `image_id`. Of an annotation some
40 bytes are kept, of a photo some 30; what is short (categories, licences, the source's name) is kept whole.
"""

# N photos, M annotations

from __future__ import annotations

import functools
import hashlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from refine_control.errors import InvalidInputError
from refine_control.photos.json_stream import JsonStream, Span, read_value

_NAMES_KEPT = 20
_LISTINGS_KEPT = 2


class _Places:
    """Which bytes of the file the elements of a list are, and a number for the photo of each."""

    def __init__(self) -> None:
        self.starts, self.lengths, self.owners = array("Q"), array("I"), array("Q")

    def note(self, span: Span, photo: object, kept: bool = True) -> None:
        """`photo` is the photo's id; without `kept` the element is not going to be read again."""
        self.starts.append(span.start)
        self.lengths.append(span.end - span.start if kept else 0)
        self.owners.append(_number(photo))


def _number(name: object) -> int:
    """64 bits that stand for an id; 0 for what can be none."""
    if not isinstance(name, int | str):
        return 0
    told = repr(name if isinstance(name, str) else int(name))
    return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=8).digest(), "little") or 1


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
        owners, of = np.asarray(annotations.owners), np.asarray(photos.owners)
        known = np.isin(owners, of[of != 0])
        self.strangers: list[int] = np.flatnonzero(~known).tolist()
        """The numbers of the annotations that are of no photo in the list."""
        kept = np.flatnonzero(known & (np.asarray(annotations.lengths) != 0))
        order = kept[np.argsort(owners[kept], kind="stable")]
        self._annotations = np.asarray(annotations.starts)[order], np.asarray(annotations.lengths)[order]
        self._first, self._last = (np.searchsorted(owners[order], of, side) for side in ("left", "right"))

    def _read(self) -> tuple[_Places, _Places]:
        """The places of the photos and of the annotations, and along the way what is short."""
        photos, annotations = None, _Places()
        stream = JsonStream(self.file)
        try:
            for name in stream.members() if stream.at_object() else ():
                if name == "images" and stream.at_list():
                    photos, self.first_names = _Places(), []
                    _each(stream, functools.partial(self._note_photo, photos))
                elif name == "annotations" and stream.at_list():
                    annotations = _Places()
                    _each(stream, functools.partial(_note_annotation, annotations))
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

    def __iter__(self) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        """Each photo as it is listed, with its annotations in their order, crowds apart.

        Raises InvalidInputError where the file has changed since it was walked through."""
        for start, length, first, last in zip(*self._photos, self._first, self._last, strict=True):
            photo = self._value(start, length)
            found = (self._value(*(part[number] for part in self._annotations)) for number in range(first, last))
            # two ids may have one number
            yield photo, [each for each in found if each["image_id"] == photo["id"]]

    def _value(self, start: int, length: int) -> Any:
        try:
            return read_value(self.file, int(start), int(start) + int(length))
        except ValueError:
            raise InvalidInputError(f"{self.path} changed while it was read; run the same command again") from None


def _each(stream: JsonStream, note: Callable[[Span], None]) -> None:
    for span in stream.elements():
        note(span)


def _note_annotation(places: _Places, span: Span) -> None:
    row = span.value if isinstance(span.value, dict) else {}
    places.note(span, row.get("image_id"), kept=not row.get("iscrowd"))


def coco_listing(path: Path) -> CocoListing:
    """The listing of a COCO file; the last few are kept while the file stays as it is. Raises as `CocoListing`."""
    state = path.stat()
    return _listing(path, state.st_mtime_ns, state.st_ctime_ns, state.st_size)


@functools.lru_cache(_LISTINGS_KEPT)
def _listing(path: Path, mtime_ns: int, ctime_ns: int, size: int) -> CocoListing:
    return CocoListing(path)
