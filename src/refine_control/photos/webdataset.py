"""Tars of samples (WebDataset) -> entries: members of one name up to the first dot are one sample.

As img2dataset writes them: `KEY.jpg`, `KEY.txt` with the caption of the whole photo, `KEY.json` with `url`, `sha256`,
`license` and the like; its tables beside the tars are not needed. Besides, where they are there: `KEY.mask.png`, and
in `KEY.json` `local_prompt`, `segmentation`, `category` (-> local prompt "a dog"), and `box` [x0, y0, x1, y1], the
first and the last column and row of the region, in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refine_control.photos.files import Tar, locate, read_bytes, tar_listing
from refine_control.records import Entry, Rejected, RejectReason, flat_meta, make_key, one_line, with_article

_IMAGES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "ppm")
_MASK, _CAPTION, _FACTS = "mask.png", "txt", "json"
_MOST_TEXT = 1 << 20
"""Bytes of a caption or of facts that are read."""
_NOT_META = frozenset({"image", "mask", "segmentation", "local_prompt", "global_prompt", "caption", "box", "exif"})
_OF_THE_TOOL = frozenset({"key", "status", "error_message"})
"""What img2dataset tells of its own work."""


def tar_entries(root: Path, tar: str) -> Iterator[Entry]:
    """The entries of one tar under `root` in the order of its members; a cut tar ends with an entry that says so."""
    try:
        listing = tar_listing(locate(root, tar).path)
    except Rejected as error:
        yield Entry(make_key(tar, None), root, tar, None, None, problem=(error.reason, error.detail))
        return
    except OSError as error:
        problem = (RejectReason.UNREADABLE, f"cannot be read: {error.strerror}")
        yield Entry(make_key(tar, None), root, tar, None, None, problem=problem)
        return
    for key, extensions in _samples(listing).items():
        image = next((each for each in _IMAGES if each in extensions), None)
        if image is not None:
            yield _entry(root, tar, key, extensions, image, listing)
    if listing.problem is not None:
        problem = (RejectReason.TRUNCATED, listing.problem)
        yield Entry(make_key(tar, None), root, tar, None, None, problem=problem)


def _samples(listing: Tar) -> dict[str, dict[str, str]]:
    """Sample -> extension in small letters -> member."""
    samples: dict[str, dict[str, str]] = {}
    for member in listing.members:
        folder, slash, name = member.rpartition("/")
        stem, _, extension = name.partition(".")
        if stem and extension:
            samples.setdefault(folder + slash + stem, {})[extension.lower()] = member
    return samples


def _entry(root: Path, tar: str, key: str, extensions: dict[str, str], image: str, listing: Tar) -> Entry:
    name = f"{tar}/{extensions[image]}"
    mask = f"{tar}/{extensions[_MASK]}" if _MASK in extensions else None
    try:
        facts = _facts(_text(root, tar, extensions.get(_FACTS), listing))
        caption = _text(root, tar, extensions.get(_CAPTION), listing)
    except (Rejected, ValueError, RecursionError) as error:
        detail = error.detail if isinstance(error, Rejected) else "its .json or .txt is not JSON or UTF-8 text"
        return Entry(make_key(name, mask), root, name, mask, None, problem=(RejectReason.BAD_ROW, detail))
    prompt, source = one_line(facts.get("local_prompt")), facts.get("local_prompt_source")
    if not prompt and isinstance(facts.get("category"), str):
        prompt, source = with_article(facts["category"]), "category"
    meta = flat_meta(facts, _NOT_META | _OF_THE_TOOL) | {"id": f"{tar}/{key}"}
    return Entry(
        key=make_key(name, mask),
        root=root,
        image=name,
        mask=mask,
        prompt=prompt or None,
        global_prompt=one_line(facts.get("global_prompt")) or one_line(caption) or one_line(facts.get("caption")),
        meta=meta | ({"local_prompt_source": source} if prompt and isinstance(source, str) else {}),
        segmentation=None if mask is not None else _region(facts),
    )


def _text(root: Path, tar: str, member: str | None, listing: Tar) -> str:
    if member is None:
        return ""
    if listing.members[member].size > _MOST_TEXT:
        raise Rejected(RejectReason.BAD_ROW, f"{member} is larger than any caption or description")
    return read_bytes(root, f"{tar}/{member}").decode("utf-8-sig")


def _facts(text: str) -> dict[str, Any]:
    facts = json.loads(text) if text else {}
    if not isinstance(facts, dict):
        raise ValueError("not an object")
    return facts


def _region(facts: dict[str, Any]) -> dict[str, Any] | list[Any] | None:
    given, box = facts.get("segmentation"), facts.get("box")
    if isinstance(given, dict | list):
        return given
    if not (isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box)):
        return None
    x0, y0, x1, y1 = box[0], box[1], box[2] + 1, box[3] + 1
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]
