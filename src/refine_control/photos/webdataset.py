"""Tars of samples (WebDataset) -> entries: files of one name are one sample, by the rules of `photos.pairing`.

As img2dataset writes them: `KEY.jpg`, `KEY.txt` with the caption of the whole photo, `KEY.json` with `url`, `sha256`,
`license` and the like. Besides, where they are there: `KEY.mask.png`, and in `KEY.json` `local_prompt`,
`segmentation`, `category` (-> local prompt "a dog"), and `box` [x0, y0, x1, y1], the first and the last column and row
of the region, in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from refine_control.photos.files import locate, tar_listing
from refine_control.photos.pairing import Leftover, Photograph, pair
from refine_control.photos.values import given, number, shown, take_segmentation, take_text, whole_ids
from refine_control.records import Entry, Rejected, RejectReason, flat_meta, make_key, one_line, with_article

_MOST_TEXT = 1 << 20
"""Bytes of a caption or of a description that are read."""
_NOT_META = frozenset(
    {"image", "mask", "segmentation", "local_prompt", "global_prompt", "caption", "box", "exif", "imageData"}
)
_OF_THE_TOOL = frozenset({"key", "status", "error_message"})
"""Fields of img2dataset about its own work."""


def tar_entries(root: Path, tar: str) -> Iterator[Entry]:
    """The entries of one tar under `root` in the order of its members, then what is left over of it.

    A cut tar ends with an entry that says so."""
    try:
        listing = tar_listing(locate(root, tar).path)
    except (Rejected, OSError) as error:
        refused = isinstance(error, Rejected)
        problem = (
            (error.reason, error.detail) if refused else (RejectReason.UNREADABLE, f"cannot be read: {error.strerror}")
        )
        yield Entry(make_key(tar, None), root, tar, None, None, problem=problem)
        return
    leftovers = [Leftover(*each) for each in listing.unread]
    for photograph in pair(listing.members, leftovers.append):
        yield described_entry(root, f"{tar}/", photograph, listing.read)
    if listing.problem is not None:
        problem = (RejectReason.TRUNCATED, listing.problem)
        yield Entry(make_key(tar, None), root, tar, None, None, problem=problem)
    for each in leftovers:
        yield unused_entry(root, f"{tar}/{each.file}", each.why)


def unused_entry(root: Path, name: str, why: str) -> Entry:
    """The entry of a file that is neither a photo nor a part of one."""
    return Entry(make_key(name, None), root, name, None, None, problem=(RejectReason.UNUSED, why))


def described_entry(root: Path, folder: str, photo: Photograph, read: Callable[[str, int], bytes]) -> Entry:
    """The entry of a photo in `folder` (empty, or ending in a slash) with its caption and description.

    `read` gives the bytes of a file in `folder`, of at most so many."""
    name = folder + photo.image
    mask = folder + photo.mask if photo.mask else None
    entry = Entry(make_key(name, mask), root, name, mask, None)
    if photo.ambiguity:
        return replace(entry, problem=(RejectReason.AMBIGUOUS, photo.ambiguity))
    try:
        facts = _facts(_text(read, photo.description), photo.description)
        caption = _text(read, photo.text)
        prompt, source = _prompt(facts)
        region = _region(facts)
        global_prompt = (
            one_line(take_text(facts, "global_prompt")) or one_line(caption) or one_line(facts.get("caption"))
        )
    except Rejected as error:
        return replace(entry, problem=(error.reason, error.detail))
    stem = photo.image if photo.rival else photo.image.rpartition(".")[0]
    meta = {**flat_meta(facts, _NOT_META | _OF_THE_TOOL), **whole_ids(facts), "id": folder + stem}
    return replace(
        entry,
        prompt=prompt or None,
        global_prompt=global_prompt,
        meta=meta | ({"local_prompt_source": source} if prompt and isinstance(source, str) else {}),
        segmentation=None if mask is not None else region,
    )


def _prompt(facts: dict[str, Any]) -> tuple[str, Any]:
    """The local prompt and its source; empty where there is none. Rejected where it is no text."""
    if prompt := one_line(take_text(facts, "local_prompt", RejectReason.NO_PROMPT)):
        return prompt, facts.get("local_prompt_source")
    return with_article(take_text(facts, "category", RejectReason.NO_PROMPT)), "category"


def _text(read: Callable[[str, int], bytes], member: str | None) -> str:
    try:
        return "" if member is None else read(member, _MOST_TEXT).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Rejected(RejectReason.BAD_ROW, f"{member} is not text in UTF-8") from None


def _facts(text: str, member: str | None) -> dict[str, Any]:
    try:
        facts = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise Rejected(RejectReason.BAD_ROW, f"{member} is not a JSON object")
    return facts


def _region(facts: dict[str, Any]) -> dict[str, Any] | list[Any] | None:
    segmentation, box = take_segmentation(facts), given(facts, "box")
    if segmentation is not None or box is None:
        return segmentation
    sides = [side for side in map(number, box) if side is not None] if isinstance(box, list) else []
    if len(sides) != 4 or len(box) != 4:
        raise Rejected(RejectReason.BAD_ROW, f"`box` is {shown(box)}, not [x0, y0, x1, y1] in pixels")
    x0, y0, x1, y1 = sides[0], sides[1], sides[2] + 1, sides[3] + 1
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]
