"""Which files belong together: the rules of names for folders and tars alike.

| name | what it is |
| --- | --- |
| `NAME.jpg`, `.png`, `.webp`, `.tif`, ... | the photo NAME; NAME may hold dots |
| `NAME.mask.png`, or another image format | its mask, never a photo |
| `NAME.cond.png`, or another image format | its condition picture, never a photo |
| `NAME.txt`, `NAME.json` | its text and its description |

Extensions may be written in capitals, and two Unicode spellings of one NAME are one name. What is none of these, or
belongs to no photo, is left over, with the reason. Where two photos have one NAME, nobody can tell whose the mask, the
text and the description are: both are ambiguous.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm")
_PARTS = {".mask": "mask", ".cond": "condition"}
_USUAL = tuple(f"{part}.png" for part in _PARTS)
_KINDS = {".txt": "text", ".json": "description"}


class Photograph(NamedTuple):
    """A photo and the files of its name, as they are spelled."""

    image: str
    mask: str | None = None
    condition: str | None = None
    text: str | None = None
    description: str | None = None
    rival: str = ""
    """Another photo of this name."""

    @property
    def ambiguity(self) -> str:
        """Which file may be of this photo or of its rival; empty where there is none."""
        part = self.mask or self.condition or self.text or self.description
        if not (self.rival and part):
            return ""
        image, rival, part = (PurePosixPath(name).name for name in (self.image, self.rival, part))
        return f"{part} may be of {image} or of {rival}; rename one of them"


class Leftover(NamedTuple):
    """A file that is neither a photo nor a part of one."""

    file: str
    why: str


class Name(NamedTuple):
    """What a file's name says."""

    stem: str
    """Of the photo: without the extension of its kind, in one Unicode spelling."""
    kind: str
    """image, mask, condition, text, description; or why it is none of these."""


def read_name(file: str) -> Name:
    """What the name of a file without its folder says."""
    name = one_spelling(file)
    stem, dot, suffix = name.rpartition(".")
    suffix = dot + suffix.lower()
    if name.startswith("."):
        return Name("", "a hidden file")
    if suffix in IMAGE_SUFFIXES:
        whose, dot, part = stem.rpartition(".")
        kind = _PARTS.get(dot + part.lower())
        return Name(whose, kind) if kind else Name(stem, "image")
    if suffix in _KINDS:
        return Name(stem, _KINDS[suffix])
    return Name("", f"no photo, mask, text or description: known are {', '.join(IMAGE_SUFFIXES)}, .txt and .json")


def is_mask_name(path: str) -> bool:
    """Whether a file is a mask by its name."""
    return read_name(PurePosixPath(path).name).kind == "mask"


def one_spelling(name: str) -> str:
    """The composed Unicode form (NFC); macOS writes the decomposed one."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def pair(files: Iterable[str], left_over: Callable[[Leftover], None]) -> Iterator[Photograph]:
    """The photos among files, by folder and stem in the order of their first file; the rest is `left_over`.

    All the files of a folder and stem must be given together."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        stem, kind = read_name(name)
        if not stem or hidden(folder):
            left_over(Leftover(file, kind if not stem else "in a hidden folder"))
            continue
        groups.setdefault((one_spelling(folder), stem), {}).setdefault(kind, []).append(file)
    for (_, stem), group in groups.items():
        images = group.pop("image", [])
        parts: dict[str, str] = {}
        for kind, names in group.items():
            ordered = sorted(names, key=lambda file: (not file.endswith(_USUAL), file)) if images else names
            why = f"a {kind} without a photo {stem}.jpg, .png, ..."
            if images:
                parts[kind], why = ordered.pop(0), f"a second {kind} of {PurePosixPath(images[0]).name}"
            for file in ordered:
                left_over(Leftover(file, why))
        for place, image in enumerate(images):
            yield Photograph(image, **parts, rival=images[place - 1] if len(images) > 1 else "")


def hidden(folder: str) -> bool:
    """Whether a folder, or one above it, is hidden or holds what macOS adds to archives."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in folder.split("/"))
