"""COCO's instances (`instances_*.json`) -> entries: one for each annotation, and one for a photo that has none.

The region is the annotation's segmentation, polygons or run lengths; crowds are skipped, because they are no object.
The category is the local prompt ("a dog", "an apple"), the photo's licence is named in `license`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refine_control.data.files import exists
from refine_control.data.records import Entry, RejectReason, make_key, one_line, with_article
from refine_control.errors import InvalidInputError

_LOOKED_FOR = 20
"""So many photos are looked for in each folder before it is said that they are not there."""


def coco_entries(path: Path, images: Path | None = None) -> Iterator[Entry]:
    """The entries of a COCO file, photo by photo in its order.

    The photos lie in `images`, or else beside the file, or in the folder `images` beside it. Raises InvalidInputError
    where the file is no such list, or none of the first photos is there. The whole file is held in memory."""
    listed = _read(path)
    photos = [each for each in listed["images"] if isinstance(each, dict)]
    root = _root(path, images, [str(each.get("file_name")) for each in photos[:_LOOKED_FOR]])
    return _entries(path, root, listed)


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        listed = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise InvalidInputError(f"{path} is not JSON; want COCO's instances_*.json") from None
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(listed, dict) or not isinstance(listed.get("images"), list):
        raise InvalidInputError(f"{path} has no list of `images`; want COCO's instances_*.json")
    names = ("images", "annotations", "categories", "licenses")
    return {name: listed[name] if isinstance(listed.get(name), list) else [] for name in names} | {
        "info": [listed.get("info")]
    }


def _root(path: Path, images: Path | None, names: list[str]) -> Path:
    folders = [images] if images is not None else [path.parent, path.parent / "images"]
    for folder in folders:
        if not names or any(exists(folder, name) for name in names):
            return folder
    looked = " nor in ".join(map(str, folders))
    raise InvalidInputError(f"the photos of {path}, such as {names[0]}, are not in {looked}; name their folder")


def _by_id(rows: list[Any]) -> dict[Any, dict[str, Any]]:
    return {row["id"]: row for row in rows if isinstance(row, dict) and isinstance(row.get("id"), int | str)}


def _entries(path: Path, root: Path, listed: dict[str, list[Any]]) -> Iterator[Entry]:
    categories, licenses = _by_id(listed["categories"]), _by_id(listed["licenses"])
    told = listed["info"][0]
    source = one_line(told.get("description")) if isinstance(told, dict) else ""
    regions: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    known = _by_id(listed["images"])
    for number, annotation in enumerate(listed["annotations"]):
        photo = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(photo, int | str) or photo not in known:
            detail = f"annotation {number} is of no photo in the list"
            yield Entry(f"annotation-{number}", root, "", None, None, problem=(RejectReason.BAD_ROW, detail))
        elif not annotation.get("iscrowd"):
            regions[photo].append(annotation)
    for number, photo in enumerate(listed["images"]):
        if not isinstance(photo, dict) or not isinstance(photo.get("file_name"), str) or not photo["file_name"]:
            detail = f"image {number} is not an object with a `file_name`"
            yield Entry(f"image-{number}", root, "", None, None, problem=(RejectReason.BAD_ROW, detail))
            continue
        meta = _photo_meta(photo, source or path.stem, licenses)
        own = regions.get(photo.get("id"), []) if isinstance(photo.get("id"), int | str) else []
        for annotation in own or [{}]:
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
