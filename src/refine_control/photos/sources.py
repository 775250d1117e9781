"""The door to photographs: whatever a source is, it becomes a stream of entries, one for each (photo, region).

| source | what it is |
| --- | --- |
| `manifest.jsonl`, or a folder that holds one | rows of `image`, `mask` or `segmentation`, `local_prompt`, ... |
| a folder with tars at its top, or one tar | WebDataset, as img2dataset writes it: see `photos.webdataset` |
| any other folder | searched for `name.jpg|png|webp|tif...` + `name.mask.png` + `name.txt` |
| a `.json` file | COCO's instances: see `photos.coco` |

Nothing is decoded here; what is held are the names of one folder, the listing of one tar or JSON, and some 30 bytes
of every entry. A region or a prompt may be missing: an annotator can fill it in, `photos.load` refuses it. What cannot
be used at all is an entry with a problem: nothing is lost silently.

A manifest's first line may be a header: an object without `image` whose `root` is the folder that the rows' paths
start from; without it that is the manifest's own folder. The people's decisions in `decisions.jsonl` beside it hold: a
refused row has the problem REVIEW_REJECTED, a mended prompt takes the place of the row's. A row with `prompt_problems`
on which nobody has decided has the problem NEEDS_REVIEW.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from refine_control.errors import InvalidInputError
from refine_control.photos.decisions import DECISIONS_NAME, REJECT, Decision, id_of, read_decisions
from refine_control.photos.files import TAR_SUFFIXES, read_bytes
from refine_control.photos.seen import Seen
from refine_control.records import Entry, Rejected, RejectReason, flat_meta, make_key, one_line

MANIFEST_NAME = "manifest.jsonl"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm")
MASK_SUFFIX = ".mask.png"
_NAMES_SORTED = 1 << 13
_NOT_META = frozenset({"image", "mask", "segmentation", "local_prompt", "global_prompt"})


def entries(source: Path, images: Path | None = None) -> Iterator[Entry]:
    """Streams the entries of a source (see above) in the order of its rows, or of the sorted names.

    `images` is the folder of COCO's photos where it is not the JSON's own. Raises InvalidInputError when `source`
    is nothing of the kind."""
    return _unique(_reader(Path(source), images))


def _reader(source: Path, images: Path | None) -> Iterator[Entry]:
    """Chooses by what lies there; errors of the choice are raised here, before the first entry."""
    if images is not None and source.suffix.lower() != ".json":
        raise InvalidInputError(f"a folder of images is for COCO's .json files; {source} says where its photos are")
    if source.is_dir():
        if (source / MANIFEST_NAME).is_file():
            return _manifest_entries(source / MANIFEST_NAME)
        return _tar_entries(source, tars) if (tars := _tars(source)) else _folder_entries(source)
    if source.is_file():
        if source.suffix == ".jsonl":
            return _manifest_entries(source)
        if source.suffix.lower() == ".json":
            from refine_control.photos.coco import coco_entries

            return coco_entries(source, images)
        if source.name.lower().endswith(TAR_SUFFIXES):
            return _tar_entries(source.parent, [source.name])
    fault = "is not" if source.exists() else "does not exist; name"
    raise InvalidInputError(f"{source} {fault} a folder of photos or tars, a .jsonl manifest or COCO's .json")


def _tars(folder: Path) -> list[str]:
    """Names of the tars at the top of a folder; photos beside them would be passed over, so that is refused."""
    tars, photo = [], ""
    with os.scandir(folder) as listing:
        for name in (each.name for each in listing if not each.name.startswith(".")):
            if name.lower().endswith(TAR_SUFFIXES) and (folder / name).is_file():
                tars.append(name)
            elif name.lower().endswith(SUFFIXES):
                photo = min(photo or name, name)
    if tars and photo:
        raise InvalidInputError(f"{folder} holds tars ({min(tars)}) and photos ({photo}); give each a folder")
    return sorted(tars)


def _tar_entries(root: Path, tars: list[str]) -> Iterator[Entry]:
    from refine_control.photos.webdataset import tar_entries

    return itertools.chain.from_iterable(tar_entries(root, name) for name in tars)


def _unique(found: Iterator[Entry]) -> Iterator[Entry]:
    seen = Seen()
    for entry in found:
        if not seen.add(entry.key) and entry.problem is None:
            entry = replace(entry, problem=(RejectReason.DUPLICATE, "an earlier entry has this image, mask and id"))
        yield entry


def photos_of(found: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Groups consecutive entries of one image: what an annotator looks at once."""
    for _, group in itertools.groupby(found, key=lambda entry: (entry.root, entry.image)):
        yield list(group)


# A JSONL manifest


def _manifest_entries(path: Path) -> Iterator[Entry]:
    decisions = read_decisions(path.with_name(DECISIONS_NAME))
    root = path.parent
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = _row(line)
            if number == 1 and row and "image" not in row and isinstance(row.get("root"), str):
                root = _root(path, row["root"])
            else:
                doubts = row.get("prompt_problems") if row else None
                yield _decided(_manifest_entry(root, number, row), decisions, doubts)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _root(manifest: Path, named: str) -> Path:
    root = manifest.parent / named
    if "\0" in named or not root.is_dir():
        raise InvalidInputError(f"the first line of {manifest} says that the photos are in {root}, which is no folder")
    return root


def _manifest_entry(root: Path, number: int, row: dict[str, Any] | None) -> Entry:
    image = row.get("image") if row is not None else None
    if row is None or not isinstance(image, str) or not image:
        detail = f"line {number} is not a JSON object with an `image`"
        return Entry(f"row-{number}", root, "", None, None, problem=(RejectReason.BAD_ROW, detail))
    mask = row.get("mask") if isinstance(row.get("mask"), str) and row["mask"] else None
    given = row.get("segmentation")
    segmentation = given if mask is None and isinstance(given, dict | list) else None
    region = mask if segmentation is None else json.dumps(segmentation, sort_keys=True)
    name = row.get("id") if isinstance(row.get("id"), str | int) else None
    captions = row["captions"] if isinstance(row.get("captions"), list) else []
    return Entry(
        key=make_key(image, region, name),
        root=root,
        image=image,
        mask=mask,
        prompt=one_line(row.get("local_prompt")) or None,
        global_prompt=one_line(row.get("global_prompt")) or next(filter(None, map(one_line, captions)), ""),
        meta=flat_meta(row, _NOT_META),
        segmentation=segmentation,
    )


def _decided(entry: Entry, decisions: dict[str, Decision], doubts: object) -> Entry:
    """The entry as people left it; `doubts` of its prompt that nobody has settled keep it out."""
    decision = decisions.get(id_of(entry)) if decisions else None
    if entry.problem is not None:
        return entry
    if decision is None:
        if not isinstance(doubts, list) or not doubts:
            return entry
        told = ", ".join(map(str, doubts))
        detail = f"the prompt is doubtful ({told}): see `data review`"
        return replace(entry, problem=(RejectReason.NEEDS_REVIEW, detail))
    if decision.action == REJECT:
        return replace(entry, problem=(RejectReason.REVIEW_REJECTED, "refused in the review"))
    return replace(entry, prompt=one_line(decision.prompt) or entry.prompt)


# A folder of photos


def _folder_entries(root: Path) -> Iterator[Entry]:
    waiting = [Path()]
    while waiting:
        here = waiting.pop()
        folders, links, files = _listed(root / here)
        for name in links:
            image = (here / name).as_posix()
            problem = (RejectReason.OUTSIDE_TREE, "a linked folder is not followed")
            yield Entry(make_key(image, None), root, image, None, None, problem=problem)
        # a photo, its mask and its text are alike up to the first dot, and so stand together
        for (start, _), alike in itertools.groupby(files, key=lambda name: name.partition(".")[:2]):
            siblings = dict.fromkeys(alike if start else ())
            for name in siblings:
                low = name.lower()
                if low.endswith(SUFFIXES) and not low.endswith(MASK_SUFFIX):
                    yield _folder_entry(root, here / name, siblings)
        waiting += [here / name for name in reversed(folders)]


def _listed(path: Path) -> tuple[list[str], list[str], Iterator[str]]:
    """The sorted names of the folders, the linked folders and the files in a folder, without hidden folders."""
    folders: list[str] = []
    links: list[str] = []
    files = _SortedNames()
    try:
        with os.scandir(path) as listing:
            for each in listing:
                if not _is_folder(each):
                    files.add(each.name)
                elif not each.name.startswith("."):
                    (links if each.is_symlink() else folders).append(each.name)
    except OSError as error:
        raise InvalidInputError(f"cannot read the folder {error.filename or path}: {error.strerror}") from None
    return sorted(folders), sorted(links), iter(files)


def _is_folder(each: os.DirEntry[str]) -> bool:
    try:
        return each.is_dir()
    except OSError:  # a link to itself, for one
        return False


class _SortedNames:
    """The names in a folder, iterated in their order; till then they take little more than their letters."""

    def __init__(self) -> None:
        self._new: list[str] = []
        self._runs: list[bytes] = []

    def add(self, name: str) -> None:
        self._new.append(name)
        if len(self._new) == _NAMES_SORTED:
            self._close()

    def _close(self) -> None:
        self._runs.append("".join(f"{name}\0" for name in sorted(self._new)).encode("utf-8", "surrogateescape"))
        self._new = []

    def __iter__(self) -> Iterator[str]:
        self._close()
        return heapq.merge(*map(_names_of, self._runs))


def _names_of(run: bytes) -> Iterator[str]:
    start = 0
    while (end := run.find(b"\0", start)) >= 0:
        yield run[start:end].decode("utf-8", "surrogateescape")
        start = end + 1


def _folder_entry(root: Path, relative: Path, siblings: Container[str]) -> Entry:
    image, mask, text = relative.as_posix(), relative.stem + MASK_SUFFIX, relative.stem + ".txt"
    mask_name = relative.with_name(mask).as_posix() if mask in siblings else None
    entry = Entry(make_key(image, mask_name), root, image, mask_name, None)
    if text not in siblings:
        return entry
    try:
        words = read_bytes(root, relative.with_name(text).as_posix()).decode("utf-8-sig")
        return replace(entry, prompt=one_line(words) or None)
    except UnicodeDecodeError:
        return replace(entry, problem=(RejectReason.NO_PROMPT, f"{text} is not a readable UTF-8 text"))
    except Rejected as error:
        outside = error.reason is RejectReason.OUTSIDE_TREE
        reason = error.reason if outside else RejectReason.NO_PROMPT
        return replace(entry, problem=(reason, f"prompt: {error.detail}"))
