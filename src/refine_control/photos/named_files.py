"""Photographs found by name, in tars (WebDataset) and folders -> entries: files of one name are one entry.

The names are those of `photos.pairing`. A tar is as img2dataset writes it: `KEY.jpg`, `KEY.txt` with the caption of the
whole photo, `KEY.json` with `url`, `sha256`, `license` and the like. Optional are `KEY.mask.png`, `KEY.cond.png` and in
`KEY.json` `local_prompt`, `segmentation`, `category` (-> local prompt "a dog"), and `box` [x0, y0, x1, y1], the first
and the last column and row of the region, in pixels.

A folder holds the same; there a text is a local prompt. Entries come in the order of the sorted names, folder by
folder; the names of one folder are held at a time, in little more memory than their letters.
"""

from __future__ import annotations

import heapq
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from refine_control.errors import InvalidInputError
from refine_control.photos.files import locate, read_bytes, tar_listing
from refine_control.photos.pairing import Leftover, Photograph, hidden, one_spelling, pair
from refine_control.photos.values import given, number, parse_object, shown, take_segmentation, take_text, whole_ids
from refine_control.records import Entry, Rejected, RejectReason, Row, flat_meta, make_key, one_line, with_article

_NAMES_SORTED = 1 << 13
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
    cond = folder + photo.condition if photo.condition else None
    entry = Entry(make_key(name, mask), root, name, mask, None, condition=cond)
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


# Folders


def folder_entries(root: Path) -> Iterator[Entry]:
    """The entries of the photos under `root`, with those of files that are left over behind their group.

    Raises InvalidInputError where the folder itself cannot be read."""
    waiting = [Path()]
    while waiting:
        here = waiting.pop()
        folder = "" if here == Path() else f"{here.as_posix()}/"
        try:
            listed = _list_folder(root / here)
        except OSError as error:
            if not folder:
                raise InvalidInputError(f"cannot read the folder {root}: {error.strerror}") from None
            detail = f"the folder cannot be read: {error.strerror}"
            yield Entry.refused(root, here.as_posix(), RejectReason.UNREADABLE, detail)
            continue
        for name in listed.links:
            yield Entry.refused(root, folder + name, RejectReason.OUTSIDE_TREE, "a linked folder is not followed")
        # a photo, its mask and its text are alike up to the first dot, and so stand together
        for _, alike in itertools.groupby(listed.files, key=lambda name: one_spelling(name).partition(".")[:2]):
            files, leftovers = list(alike), list[Leftover]()
            for photograph in sorted(pair(files, leftovers.append), key=lambda each: files.index(each.image)):
                yield _folder_entry(root, folder, photograph)
            yield from unused_entries(root, folder, leftovers)
        passed = [Leftover(name, "a hidden folder is not searched") for name in listed.hidden]
        yield from unused_entries(root, folder, passed)
        waiting += [here / name for name in reversed(listed.folders)]


class _Listed(NamedTuple):
    """The sorted names in a folder."""

    folders: list[str]
    links: list[str]
    """Linked folders."""
    hidden: list[str]
    """Hidden folders."""
    files: Iterator[str]


def _list_folder(path: Path) -> _Listed:
    folders, links, passed = list[str](), list[str](), list[str]()

    def files() -> Iterator[str]:
        with os.scandir(path) as listing:
            for each in listing:
                if not is_folder(each):
                    yield each.name
                elif hidden(each.name):
                    passed.append(each.name)
                else:
                    (links if each.is_symlink() else folders).append(each.name)

    ordered = _sort(files())
    return _Listed(sorted(folders), sorted(links), sorted(passed), ordered)


def is_folder(each: os.DirEntry[str]) -> bool:
    """Whether a name is a folder or leads to one."""
    try:
        return each.is_dir()
    except OSError:  # a link to itself, for one
        return False


def _sort(names: Iterator[str]) -> Iterator[str]:
    """All names in the order of one Unicode spelling, so that a photo and its mask stand together.

    Until they are iterated they take little more memory than their letters."""
    runs: list[bytes] = []
    while batch := sorted(itertools.islice(names, _NAMES_SORTED), key=_place):
        runs.append("\0".join(batch).encode("utf-8", "surrogateescape"))
    return heapq.merge(*map(_split_names, runs), key=_place)


def _place(name: str) -> tuple[str, str]:
    return one_spelling(name), name


def _split_names(run: bytes) -> Iterator[str]:
    return (name[0].decode("utf-8", "surrogateescape") for name in re.finditer(rb"[^\0]+", run))


def _folder_entry(root: Path, folder: str, photo: Photograph) -> Entry:
    """The entry of a photo in a folder, where a text is a local prompt."""

    def read(name: str, most: int) -> bytes:
        return read_bytes(root, folder + name, most)

    entry = described_entry(root, folder, photo if photo.ambiguity else photo._replace(text=None), read)
    meta = {name: value for name, value in entry.meta.items() if name != "id"}
    if photo.text is None or entry.problem is not None:
        return replace(entry, meta=meta)
    reason = RejectReason.NO_PROMPT
    try:
        words = read_bytes(root, folder + photo.text).decode("utf-8-sig")
    except UnicodeDecodeError:
        return replace(entry, meta=meta, problem=(reason, f"{photo.text} is not text in UTF-8"))
    except Rejected as error:
        problem = (error.reason if error.reason is RejectReason.OUTSIDE_TREE else reason, f"prompt: {error.detail}")
        return replace(entry, meta=meta, problem=problem)
    meta.pop("local_prompt_source", None)
    return replace(entry, meta=meta, prompt=one_line(words) or None)
