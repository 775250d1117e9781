"""COCO's instances (`instances_*.json`) -> entries: one for each annotation, and one for a photo that has none.

The region is the annotation's segmentation, polygons or run lengths; crowds are skipped, because they are no object.
The category is the local prompt ("a dog", "an apple"), the photo's licence is named in `license`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refine_control.errors import InvalidInputError
from refine_control.photos.coco_listing import CocoListing, coco_listing
from refine_control.photos.files import exists
from refine_control.records import Entry, RejectReason, make_key, one_line, with_article


def coco_entries(path: Path, images: Path | None = None) -> Iterator[Entry]:
    """The entries of a COCO file, photo by photo in its order.

    The photos lie in `images`, or else beside the file, or in the folder `images` beside it. Raises InvalidInputError
    where the file is no such list, or none of the first photos is there."""
    try:
        listing = coco_listing(path)
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from None
    return _entries(listing, _root(path, images, listing.first_names))


def _root(path: Path, images: Path | None, names: list[str]) -> Path:
    folders = [images] if images is not None else [path.parent, path.parent / "images"]
    for folder in folders:
        if not names or any(exists(folder, name) for name in names):
            return folder
    looked = " nor in ".join(map(str, folders))
    raise InvalidInputError(f"the photos of {path}, such as {names[0]}, are not in {looked}; name their folder")


def _by_id(rows: list[Any]) -> dict[Any, dict[str, Any]]:
    return {row["id"]: row for row in rows if isinstance(row, dict) and isinstance(row.get("id"), int | str)}


def _entries(listing: CocoListing, root: Path) -> Iterator[Entry]:
    categories, licenses = _by_id(listing.categories), _by_id(listing.licenses)
    source = one_line(listing.info.get("description")) if isinstance(listing.info, dict) else ""
    for number in listing.strangers:
        detail = f"annotation {number} is of no photo in the list"
        yield Entry(f"annotation-{number}", root, "", None, None, problem=(RejectReason.BAD_ROW, detail))
    for number, (photo, regions) in enumerate(listing):
        if not isinstance(photo, dict) or not isinstance(photo.get("file_name"), str) or not photo["file_name"]:
            detail = f"image {number} is not an object with a `file_name`"
            yield Entry(f"image-{number}", root, "", None, None, problem=(RejectReason.BAD_ROW, detail))
            continue
        meta = _photo_meta(photo, source or listing.path.stem, licenses)
        for annotation in regions or [{}]:
            yield _entry(root, photo["file_name"], annotation, meta, categories)


def _photo_meta(photo: dict[str, Any], source: str, licenses: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    meta: dict[str, Any] = {"source": source}
    if isinstance(photo.get("id"), int | str):
        meta["source_image_id"] = photo["id"]
    meta |= {side: photo[side] for side in ("width", "height") if type(photo.get(side)) is int}
    terms = licenses.get(photo.get("license")) if isinstance(photo.get("license"), int | str) else None
    if terms is not None:
        meta |= {"license": one_line(terms.get("name")), "license_url": one_line(terms.get("url"))}
    address = one_line(photo.get("flickr_url")) or one_line(photo.get("coco_url"))
    return meta | ({"photo_url": address} if address else {})


def _entry(
    root: Path, image: str, annotation: dict[str, Any], photo: dict[str, Any], categories: dict[Any, dict[str, Any]]
) -> Entry:
    name = annotation.get("id") if isinstance(annotation.get("id"), int | str) else None
    number = annotation.get("category_id")
    category = one_line(categories.get(number, {}).get("name")) if isinstance(number, int | str) else ""
    given = annotation.get("segmentation")
    meta = dict(photo)
    if name is not None:
        meta["id"] = name
    if category:
        meta |= {"category": category, "local_prompt_source": "category"}
    return Entry(
        key=make_key(image, None if name is not None else json.dumps(given), name),
        root=root,
        image=image,
        mask=None,
        prompt=with_article(category) or None,
        meta=meta,
        segmentation=given if isinstance(given, dict | list) and given else None,
    )
