"""The descriptions beside photographs, and tars of samples (WebDataset): files of one name -> one entry.

The names are those of `photos.pairing`. As img2dataset writes them: `KEY.jpg`, `KEY.txt` with the caption of the whole
photo, `KEY.json` with `url`, `sha256`, `license` and the like. Besides, where they are there: `KEY.mask.png`, and in
`KEY.json` `local_prompt`, `segmentation`, `category` (-> local prompt "a dog"), and `box` [x0, y0, x1, y1], the first
and the last column and row of the region, in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from refine_control.photos.files import locate, tar_listing
from refine_control.photos.pairing import Leftover, Photograph, pair
from refine_control.photos.values import (
    given,
    number,
    parse_object,
    shown,
    take_segmentation,
    take_text,
    whole_ids,
)
from refine_control.records import Entry, Rejected, RejectReason, Row, flat_meta, make_key, one_line, with_article

_MOST_TEXT = 1 << 20
"""Bytes of a caption or of a description that are read."""
_NOT_META = frozenset(
    {"image", "mask", "segmentation", "local_prompt", "global_prompt", "caption", "box", "exif", "imageData"}
    | {"key", "status", "error_message"}  # img2dataset's, about its own work
)


def tar_entries(root: Path, tar: str) -> Iterator[Entry]:
    """The entries of one tar under `root` in the order of its members, then what is left over of it.

    A cut tar ends with an entry that says so."""
    try:
        listing = tar_listing(locate(root, tar).path)
    except Rejected as error:
        yield Entry.refused(root, tar, error.reason, error.detail)
        return
    except OSError as error:
        yield Entry.refused(root, tar, RejectReason.UNREADABLE, f"cannot be read: {error.strerror}")
        return
    leftovers = list(listing.unread)
    for photograph in pair(listing.members, leftovers.append):
        yield described_entry(root, f"{tar}/", photograph, listing.read)
    if listing.problem is not None:
        yield Entry.refused(root, tar, RejectReason.TRUNCATED, listing.problem)
    yield from unused_entries(root, f"{tar}/", leftovers)


def unused_entries(root: Path, folder: str, leftovers: list[Leftover]) -> Iterator[Entry]:
    """The entries of files in `folder` (empty, or ending in a slash) that are neither photos nor parts of one."""
    return (Entry.refused(root, folder + name, RejectReason.UNUSED, why) for name, why in leftovers)


def described_entry(root: Path, folder: str, photo: Photograph, read: Callable[[str, int], bytes]) -> Entry:
    """The entry of a photo in `folder` (empty, or ending in a slash) with its caption and description.

    `read` gives the bytes of a file in `folder`, of at most so many."""
    name = folder + photo.image
    mask = folder + photo.mask if photo.mask else None
    entry = Entry(make_key(name, mask), root, name, mask, None)
    if photo.ambiguity:
        return replace(entry, problem=(RejectReason.AMBIGUOUS, photo.ambiguity))
    try:
        text = _text(read, photo.description)
        facts = parse_object(text, f"{photo.description} is ") if text else {}
        caption = _text(read, photo.text)
        prompt, source = _prompt(facts)
        region = _region(facts)
        global_prompt = one_line(take_text(facts, "global_prompt")) or one_line(caption)
    except Rejected as error:
        return replace(entry, problem=(error.reason, error.detail))
    stem = photo.image if photo.rival else photo.image.rpartition(".")[0]
    meta = {**flat_meta(facts, _NOT_META), **whole_ids(facts), "id": folder + stem}
    return replace(
        entry,
        prompt=prompt or None,
        global_prompt=global_prompt or one_line(facts.get("caption")),
        meta=meta | ({"local_prompt_source": source} if prompt and isinstance(source, str) else {}),
        segmentation=None if mask is not None else region,
    )


def _prompt(facts: Row) -> tuple[str, Any]:
    """The local prompt and its source; empty where there is none. Rejected where it is no text."""
    if prompt := one_line(take_text(facts, "local_prompt", RejectReason.NO_PROMPT)):
        return prompt, facts.get("local_prompt_source")
    return with_article(take_text(facts, "category", RejectReason.NO_PROMPT)), "category"


def _text(read: Callable[[str, int], bytes], name: str | None) -> str:
    try:
        return "" if name is None else read(name, _MOST_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Rejected(RejectReason.BAD_ROW, f"{name} is not text in UTF-8") from None


def _region(facts: Row) -> Row | list[Any] | None:
    segmentation, box = take_segmentation(facts), given(facts, "box")
    if segmentation is not None or box is None:
        return segmentation
    sides = [side for side in map(number, box) if side is not None] if isinstance(box, list) else []
    if len(sides) != 4 or len(box) != 4:
        raise Rejected(RejectReason.BAD_ROW, f"`box` is {shown(box)}, not [x0, y0, x1, y1] in pixels")
    x0, y0, x1, y1 = sides[0], sides[1], sides[2] + 1, sides[3] + 1
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]
