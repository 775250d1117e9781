"""COCO's instances (`instances_*.json`) -> entries: one for each annotation, and one for a photo that has none.

The region is the annotation's segmentation, polygons or run lengths. A crowd is no single object: it becomes an entry
that is left out. The category is the local prompt ("a dog", "an apple"), `license` is the name of the photo's licence.
An id that an earlier annotation has counts as absent: the region then tells the two apart. An annotation names its
photo by `image_id`, and 1, 1.0 and "1" are one id.

The file is read once from end to end, then by photo: 24 bytes are kept of each element of `images` and `annotations`,
and what is short (categories, licences, the source's name) whole.
"""

# N photos, M annotations

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from refine_control.errors import InvalidInputError
from refine_control.photos.files import exists
from refine_control.photos.json_stream import JsonStream, read_value
from refine_control.photos.seen import Seen
from refine_control.photos.values import (
    identifier,
    shown,
    take_flag,
    take_id,
    take_segmentation,
    take_whole,
)
from refine_control.records import Entry, Rejected, RejectReason, Row, make_key, one_line, with_article

_NAMES_TRIED = 20
_LISTINGS_KEPT = 2
_PHOTO_FIELD = {"images": "id", "annotations": "image_id"}


def coco_entries(path: Path, images: Path | None = None) -> Iterator[Entry]:
    """The entries of a COCO file, photo by photo in its order.

    The photos lie in `images`, or else beside the file, or in the folder `images` beside it. Raises InvalidInputError
    where the file is no such list, or not one of its photos is there."""
    try:
        state = path.stat()
        listing = _listing(path, state.st_mtime_ns, state.st_ctime_ns, state.st_size)
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from None
    return _entries(listing, _root(listing, images))


def _root(listing: CocoListing, images: Path | None) -> Path:
    """The folder that holds a photo of the list; the first names decide unless none of them is there."""
    path = listing.path
    folders = [images] if images is not None else [path.parent, path.parent / "images"]
    first = list(itertools.islice(listing.file_names(), _NAMES_TRIED))
    pairs = ((folder, name) for folder in folders for name in first)
    others = ((folder, name) for name in listing.file_names() for folder in folders)
    for folder, name in itertools.chain(pairs, others):
        if exists(folder, name):
            return folder
    if not first:
        return folders[0]
    searched = " nor in ".join(map(str, folders))
    raise InvalidInputError(f"the photos of {path}, such as {first[0]}, are not in {searched}; name their folder")


def _entries(listing: CocoListing, root: Path) -> Iterator[Entry]:
    for number, annotation in listing.strangers():
        detail = f"annotation {number} {_missing_photo(annotation)}"
        yield Entry.refused(root, "", RejectReason.BAD_ROW, detail, f"annotation-{number}")
    ids = Seen()
    for number, (photo, rows, problem) in enumerate(listing.photos()):
        image = photo.get("file_name") if isinstance(photo, dict) else None
        if not isinstance(image, str) or not image:
            detail = f"image {number} is not an object with a `file_name`"
            yield Entry.refused(root, "", RejectReason.BAD_ROW, detail, f"image-{number}")
            continue
        try:
            if problem is not None:
                raise problem
            whole = Entry(make_key(image, "null"), root, image, None, None, meta=_photo_meta(photo, listing))
        except Rejected as error:
            for name in (None, *(str(row.get("id")) for row in rows)):
                yield Entry.refused(root, image, error.reason, error.detail, make_key(image, None, name))
            continue
        objects = 0
        for place, row in enumerate(rows):
            objects += 1
            try:
                yield _annotation_entry(whole, row, rows[:place], listing, ids)
            except Rejected as error:
                objects -= error.reason is RejectReason.CROWD
                yield Entry.refused(root, image, error.reason, error.detail, make_key(image, None, str(row.get("id"))))
        if not objects:
            yield whole


def _missing_photo(annotation: object) -> str:
    if not isinstance(annotation, dict):
        return "is not an object"
    name = annotation.get("image_id")
    fault = "neither a whole number nor text" if identifier(name) is None else "which is of no photo in the list"
    return f"has the `image_id` {shown(name)}, {fault}"


def _photo_meta(photo: Row, listing: CocoListing) -> Row:
    facts = {"source_image_id": take_id(photo, "id"), **{side: take_whole(photo, side) for side in ("width", "height")}}
    meta = {"source": listing.source} | {name: value for name, value in facts.items() if value is not None}
    terms = listing.licenses.get(identifier(photo.get("license")))
    if terms is not None:
        meta |= {"license": one_line(terms.get("name")), "license_url": one_line(terms.get("url"))}
    address = one_line(photo.get("flickr_url")) or one_line(photo.get("coco_url"))
    return meta | ({"photo_url": address} if address else {})


def _annotation_entry(photo: Entry, row: Row, earlier: list[Row], listing: CocoListing, ids: Seen) -> Entry:
    """The photo with the region of an annotation; `earlier` are those before it of the same photo.

    Rejected with the reason."""
    name, region = take_id(row, "id"), take_segmentation(row)
    if name is not None and not ids.add(repr(identifier(name))):
        if any(identifier(e.get("id")) == identifier(name) and e.get("segmentation") == region for e in earlier):
            raise Rejected(RejectReason.DUPLICATE, "an earlier annotation of this photo has this id and region")
        name = None
    if take_flag(row, "iscrowd"):
        raise Rejected(RejectReason.CROWD, "the annotation is a crowd (`iscrowd`), which is no single object")
    category = one_line(listing.categories.get(identifier(take_id(row, "category_id")), {}).get("name"))
    named = {} if name is None else {"id": name}
    described = {"category": category, "local_prompt_source": "category"} if category else {}
    return replace(
        photo,
        key=make_key(photo.image, None if name is not None else json.dumps(region), name),
        prompt=with_article(category) or None,
        meta=photo.meta | named | described,
        segmentation=region or None,
    )


class CocoListing:
    """A COCO file that has been read once. It stays open.

    Raises InvalidInputError where it is no such file, OSError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.open("rb")
        self.source = path.stem
        """The name of the whole."""
        self.categories: dict[int | str | None, Row] = {}
        self.licenses: dict[int | str | None, Row] = {}
        self._photos, self._all = self._read()  # (N, 3) and (M, 3): first byte, end, the id's number
        ids, owners = self._photos[:, 2], self._all[:, 2]
        known = np.isin(owners, ids[ids != 0])
        self._strangers = np.flatnonzero(~known)
        kept = np.flatnonzero(known)
        self._order = kept[np.argsort(owners[kept], kind="stable")]
        self._first, self._last = (np.searchsorted(owners[self._order], ids, side) for side in ("left", "right"))
        values, counts = np.unique(ids[ids != 0], return_counts=True)
        self._shared = np.isin(ids, values[counts > 1])

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        """The places of the photos and of the annotations, and along the way what is short."""
        places = {"annotations": array("Q")}
        stream = JsonStream(self.file)
        try:
            for name in stream.members() if stream.at_object() else ():
                if name in _PHOTO_FIELD and stream.at_list():
                    places[name] = array("Q")
                    for span in stream.elements():
                        owner = span.value.get(_PHOTO_FIELD[name]) if isinstance(span.value, dict) else None
                        places[name].extend((span.start, span.end, _number(owner)))
                elif name in ("categories", "licenses") and stream.at_list():
                    rows = [span.value for span in stream.elements() if isinstance(span.value, dict)]
                    by_id = {identifier(row.get("id")): row for row in rows}
                    by_id.pop(None, None)
                    setattr(self, name, by_id)
                elif name == "info":
                    info = stream.value().value
                    description = one_line(info.get("description")) if isinstance(info, dict) else ""
                    self.source = description or self.path.stem
                else:
                    stream.skip()
        except (ValueError, RecursionError):
            raise InvalidInputError(f"{self.path} is not JSON in UTF-8; want COCO's instances_*.json") from None
        if "images" not in places:
            raise InvalidInputError(f"{self.path} has no list of `images`; want COCO's instances_*.json")
        photos, annotations = (np.asarray(places[name]).reshape(-1, 3) for name in _PHOTO_FIELD)
        return photos, annotations

    def strangers(self) -> Iterator[tuple[int, object]]:
        """Number and value of each annotation that is of no photo in the list."""
        return ((number, self._value(self._all[number])) for number in self._strangers.tolist())

    def file_names(self) -> Iterator[str]:
        """The files of all photos, as they are listed."""
        photos = map(self._value, self._photos)
        names = (photo.get("file_name") for photo in photos if isinstance(photo, dict))
        return (name for name in names if isinstance(name, str))

    def photos(self) -> Iterator[tuple[Any, list[Row], Rejected | None]]:
        """The elements of `images`, each with its annotations and the reason why these may be of another photo.

        The annotations of an id that several elements have come with the first of them."""
        shared_files, passed = self._shared_files(), set[object]()
        for place, first, last in zip(self._photos, self._first, self._last, strict=True):
            photo, problem = self._value(place), None
            name = identifier(photo.get("id")) if isinstance(photo, dict) else None
            files = shared_files.get(name, [])
            if len(files) > 1:
                names = f"{files[0]} and {files[1]} have one `id`, {shown(take_id(photo, 'id'))}"
                problem = Rejected(RejectReason.AMBIGUOUS, f"{names}: annotations may be of either")
            elif name in passed:
                problem = Rejected(RejectReason.DUPLICATE, "an earlier element of `images` has this id and file")
            annotations: list[Row] = []
            if name is not None and name not in passed:
                rows = (self._value(self._all[number]) for number in self._order[first:last])
                annotations = [
                    row for row in rows if identifier(row["image_id"]) == name
                ]  # two ids may have one number
            yield photo, annotations, problem
            if files:
                passed.add(name)

    def _shared_files(self) -> dict[object, list[str]]:
        """The files of each id that several elements have, two at most."""
        files: dict[object, list[str]] = {}
        for photo in map(self._value, self._photos[self._shared]):
            names, name = files.setdefault(identifier(photo.get("id")), []), str(photo.get("file_name"))
            if name not in names and len(names) < 2:
                names.append(name)
        return files

    def _value(self, place: np.ndarray) -> Any:
        """The element at a place. Raises InvalidInputError where the file has changed since it was first read."""
        try:
            return read_value(self.file, int(place[0]), int(place[1]))
        except ValueError:
            raise InvalidInputError(f"{self.path} changed while it was read; run the same command again") from None


def _number(name: object) -> int:
    """64 bits that stand for an id; 0 for what can be none."""
    name = identifier(name)
    if name is None:
        return 0
    return int.from_bytes(hashlib.blake2b(repr(name).encode(), digest_size=8).digest(), "little") or 1


@functools.lru_cache(_LISTINGS_KEPT)
def _listing(path: Path, mtime_ns: int, ctime_ns: int, size: int) -> CocoListing:
    """The last few listings are kept while their files stay as they are."""
    return CocoListing(path)
