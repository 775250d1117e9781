"""A folder that is searched for photos: its entries in the order of the sorted names, folder by folder.

The names of one folder are held at a time, in little more memory than their letters.
"""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from refine_control.errors import InvalidInputError
from refine_control.photos.files import read_bytes
from refine_control.photos.pairing import Leftover, Photograph, hidden, one_spelling, pair
from refine_control.photos.webdataset import described_entry, unused_entry
from refine_control.records import Entry, Rejected, RejectReason, make_key, one_line

_NAMES_SORTED = 1 << 13


def folder_entries(root: Path) -> Iterator[Entry]:
    """The entries of the photos under `root`, with those of files that are left over behind their group.

    Raises InvalidInputError where the folder itself cannot be read."""
    waiting = [Path()]
    while waiting:
        here = waiting.pop()
        try:
            listed = _list_folder(root / here)
        except OSError as error:
            if here == Path():
                raise InvalidInputError(f"cannot read the folder {root}: {error.strerror}") from None
            problem = (RejectReason.UNREADABLE, f"the folder cannot be read: {error.strerror}")
            yield Entry(make_key(here.as_posix(), None), root, here.as_posix(), None, None, problem=problem)
            continue
        for name in listed.links:
            image = (here / name).as_posix()
            problem = (RejectReason.OUTSIDE_TREE, "a linked folder is not followed")
            yield Entry(make_key(image, None), root, image, None, None, problem=problem)
        folder = "" if here == Path() else f"{here.as_posix()}/"
        # a photo, its mask and its text are alike up to the first dot, and so stand together
        for _, alike in itertools.groupby(listed.files, key=lambda name: one_spelling(name).partition(".")[:2]):
            yield from _group_entries(root, folder, list(alike))
        for name in listed.hidden:
            yield unused_entry(root, f"{folder}{name}", "a hidden folder is not searched")
        waiting += [here / name for name in reversed(listed.folders)]


def _group_entries(root: Path, folder: str, files: list[str]) -> Iterator[Entry]:
    """The photos among files in their order, then what is left over of these."""
    leftovers: list[Leftover] = []
    for photograph in sorted(pair(files, leftovers.append), key=lambda each: files.index(each.image)):
        yield _folder_entry(root, folder, photograph)
    for each in leftovers:
        yield unused_entry(root, folder + each.file, each.why)


class _Listed(NamedTuple):
    """The sorted names in a folder."""

    folders: list[str]
    links: list[str]
    """Linked folders."""
    hidden: list[str]
    """Hidden folders."""
    files: Iterator[str]


def _list_folder(path: Path) -> _Listed:
    folders: list[str] = []
    links: list[str] = []
    passed: list[str] = []
    files = _SortedNames()
    with os.scandir(path) as listing:
        for each in listing:
            if not is_folder(each):
                files.add(each.name)
            elif hidden(each.name):
                passed.append(each.name)
            else:
                (links if each.is_symlink() else folders).append(each.name)
    return _Listed(sorted(folders), sorted(links), sorted(passed), iter(files))


def is_folder(each: os.DirEntry[str]) -> bool:
    """Whether a name is a folder or leads to one."""
    try:
        return each.is_dir()
    except OSError:  # a link to itself, for one
        return False


class _SortedNames:
    """The names in a folder, iterated in their order; until then they take little more memory than their letters.

    The order is that of one Unicode spelling, so that a photo and its mask stand together however they are spelled."""

    def __init__(self) -> None:
        self._new: list[str] = []
        self._runs: list[bytes] = []

    def add(self, name: str) -> None:
        self._new.append(name)
        if len(self._new) == _NAMES_SORTED:
            self._close()

    def _close(self) -> None:
        ordered = sorted(self._new, key=_place)
        self._runs.append("".join(f"{name}\0" for name in ordered).encode("utf-8", "surrogateescape"))
        self._new = []

    def __iter__(self) -> Iterator[str]:
        self._close()
        return heapq.merge(*map(_split_names, self._runs), key=_place)


def _place(name: str) -> tuple[str, str]:
    return one_spelling(name), name


def _split_names(run: bytes) -> Iterator[str]:
    start = 0
    while (end := run.find(b"\0", start)) >= 0:
        yield run[start:end].decode("utf-8", "surrogateescape")
        start = end + 1


def _folder_entry(root: Path, folder: str, photo: Photograph) -> Entry:
    """The entry of a photo in a folder, where a text is a local prompt."""

    def read(name: str, most: int) -> bytes:
        return read_bytes(root, folder + name, most)

    entry = described_entry(root, folder, photo if photo.ambiguity else photo._replace(text=None), read)
    entry = replace(entry, meta={name: value for name, value in entry.meta.items() if name != "id"})
    if photo.text is None or entry.problem is not None:
        return entry
    try:
        words = read_bytes(root, folder + photo.text).decode("utf-8-sig")
    except UnicodeDecodeError:
        return replace(entry, problem=(RejectReason.NO_PROMPT, f"{photo.text} is not text in UTF-8"))
    except Rejected as error:
        outside = error.reason is RejectReason.OUTSIDE_TREE
        reason = error.reason if outside else RejectReason.NO_PROMPT
        return replace(entry, problem=(reason, f"prompt: {error.detail}"))
    meta = {name: value for name, value in entry.meta.items() if name != "local_prompt_source"}
    return replace(entry, prompt=one_line(words) or None, meta=meta)
