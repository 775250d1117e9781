"""COCO's instances (`instances_*.json`) -> entries: one for each annotation, and one for a photo that has none.

The region is the annotation's segmentation, polygons or run lengths. A crowd is no single object: it becomes an entry
that is left out. The category is the local prompt ("a dog", "an apple"), `license` is the name of the photo's licence.
An id that an earlier annotation has counts as absent: the region then tells the two apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from refine_control.errors import InvalidInputError
from refine_control.photos.coco_listing import CocoListing, ListedPhoto, coco_listing
from refine_control.photos.files import exists
from refine_control.photos.seen import Seen
from refine_control.photos.values import (
    identifier,
    shown,
    take_flag,
    take_id,
    take_segmentation,
    take_whole,
)
from refine_control.records import Entry, Rejected, RejectReason, make_key, one_line, with_article

_Rows = dict[int | str | None, dict[str, Any]]


class _Tables(NamedTuple):
    """What the photos and annotations of a list refer to."""

    source: str
    categories: _Rows
    licenses: _Rows


def coco_entries(path: Path, images: Path | None = None) -> Iterator[Entry]:
    """The entries of a COCO file, photo by photo in its order.

    The photos lie in `images`, or else beside the file, or in the folder `images` beside it. Raises InvalidInputError
    where the file is no such list, or not one of its photos is there."""
    try:
        listing = coco_listing(path)
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from None
    return _entries(listing, _root(listing, images))


def _root(listing: CocoListing, images: Path | None) -> Path:
    """The folder that holds a photo of the list; the first names decide unless none of them is there."""
    path, names = listing.path, listing.first_names
    folders = [images] if images is not None else [path.parent, path.parent / "images"]
    for folder in folders:
        if not names or any(exists(folder, name) for name in names):
            return folder
    for name in listing.file_names():
        for folder in folders:
            if exists(folder, name):
                return folder
    searched = " nor in ".join(map(str, folders))
    raise InvalidInputError(f"the photos of {path}, such as {names[0]}, are not in {searched}; name their folder")


def _by_id(rows: list[Any]) -> _Rows:
    named = ((identifier(row.get("id")), row) for row in rows if isinstance(row, dict))
    return {name: row for name, row in named if name is not None}


def _entries(listing: CocoListing, root: Path) -> Iterator[Entry]:
    info = listing.info if isinstance(listing.info, dict) else {}
    source = one_line(info.get("description")) or listing.path.stem
    tables = _Tables(source, _by_id(listing.categories), _by_id(listing.licenses))
    for number, annotation in listing.strangers():
        detail = f"annotation {number} {_why_of_no_photo(annotation)}"
        yield Entry(f"annotation-{number}", root, "", None, None, problem=(RejectReason.BAD_ROW, detail))
    ids = Seen()
    for number, listed in enumerate(listing):
        photo = listed.photo
        if not isinstance(photo, dict) or not isinstance(photo.get("file_name"), str) or not photo["file_name"]:
            detail = f"image {number} is not an object with a `file_name`"
            yield Entry(f"image-{number}", root, "", None, None, problem=(RejectReason.BAD_ROW, detail))
            continue
        yield from _photo_entries(root, listed, tables, ids)


def _why_of_no_photo(annotation: Any) -> str:
    if not isinstance(annotation, dict):
        return "is not an object"
    name = annotation.get("image_id")
    if identifier(name) is None:
        return f"has the `image_id` {shown(name)}, neither a whole number nor text"
    return f"has the `image_id` {shown(name)}, which is of no photo in the list"


def _photo_entries(root: Path, listed: ListedPhoto, tables: _Tables, ids: Seen) -> Iterator[Entry]:
    image, rows = listed.photo["file_name"], listed.annotations
    try:
        _check_id(listed)
        meta = _photo_meta(listed.photo, tables)
    except Rejected as error:
        yield Entry(make_key(image, None), root, image, None, None, problem=(error.reason, error.detail))
        for row in rows:
            yield Entry(
                make_key(image, None, str(row.get("id"))), root, image, None, None, problem=(error.reason, error.detail)
            )
        return
    objects = 0
    for place, row in enumerate(rows):
        try:
            entry = _entry(root, image, row, rows[:place], meta, tables, ids)
        except Rejected as error:
            name, objects = str(row.get("id")), objects + (error.reason is not RejectReason.CROWD)
            yield Entry(make_key(image, None, name), root, image, None, None, problem=(error.reason, error.detail))
        else:
            objects += 1
            yield entry
    if not objects:
        yield _entry(root, image, {}, [], meta, tables, ids)


def _check_id(listed: ListedPhoto) -> None:
    """Rejected where the photo's id cannot tell which annotations are its own."""
    name = take_id(listed.photo, "id")
    if listed.rivals:
        detail = f"{listed.rivals[0]} and {listed.rivals[1]} have one `id`, {shown(name)}: annotations may be of either"
        raise Rejected(RejectReason.AMBIGUOUS, detail)
    if listed.repeated:
        raise Rejected(RejectReason.DUPLICATE, "an earlier element of `images` has this id and file")


def _photo_meta(photo: dict[str, Any], tables: _Tables) -> dict[str, Any]:
    meta: dict[str, Any] = {"source": tables.source}
    if (name := take_id(photo, "id")) is not None:
        meta["source_image_id"] = name
    sides = {side: take_whole(photo, side) for side in ("width", "height")}
    meta |= {side: length for side, length in sides.items() if length is not None}
    named = identifier(photo.get("license"))
    terms = tables.licenses.get(named) if named is not None else None
    if terms is not None:
        meta |= {"license": one_line(terms.get("name")), "license_url": one_line(terms.get("url"))}
    address = one_line(photo.get("flickr_url")) or one_line(photo.get("coco_url"))
    return meta | ({"photo_url": address} if address else {})


def _entry(
    root: Path,
    image: str,
    annotation: dict[str, Any],
    earlier: list[dict[str, Any]],
    photo: dict[str, Any],
    tables: _Tables,
    ids: Seen,
) -> Entry:
    """The entry of an annotation; `earlier` are those before it of the same photo. Rejected with the reason."""
    name, region = take_id(annotation, "id"), take_segmentation(annotation)
    if name is not None and not ids.add(repr(identifier(name))):
        if any(identifier(e.get("id")) == identifier(name) and e.get("segmentation") == region for e in earlier):
            raise Rejected(RejectReason.DUPLICATE, "an earlier annotation of this photo has this id and region")
        name = None
    if take_flag(annotation, "iscrowd"):
        raise Rejected(RejectReason.CROWD, "the annotation is a crowd (`iscrowd`), which is no single object")
    of = take_id(annotation, "category_id")
    category = one_line(tables.categories.get(identifier(of), {}).get("name")) if of is not None else ""
    meta = dict(photo)
    if name is not None:
        meta["id"] = name
    if category:
        meta |= {"category": category, "local_prompt_source": "category"}
    return Entry(
        key=make_key(image, None if name is not None else json.dumps(region), name),
        root=root,
        image=image,
        mask=None,
        prompt=with_article(category) or None,
        meta=meta,
        segmentation=region or None,
    )
