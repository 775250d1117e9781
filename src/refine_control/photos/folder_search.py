"""A folder that is searched for photos: its entries in the order of the sorted names, folder by folder.

The names of one folder are held at a time, in little more memory than their letters.
"""

from __future__ import annotations

import heapq
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from refine_control.errors import InvalidInputError
from refine_control.photos.files import read_bytes
from refine_control.photos.pairing import Leftover, Photograph, hidden, one_spelling, pair
from refine_control.photos.webdataset import described_entry, unused_entries
from refine_control.records import Entry, Rejected, RejectReason, one_line

_NAMES_SORTED = 1 << 13


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
