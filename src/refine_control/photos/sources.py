"""The door to photographs: whatever a source is, it becomes a stream of entries, one for each (photo, region).

| source | what it is |
| --- | --- |
| `manifest.jsonl`, or a folder that holds one | rows of `image`, `mask`, `condition`, `local_prompt`, ... |
| a folder with tars at its top, or one tar | WebDataset, as img2dataset writes it: see `photos.named_files` |
| any other folder | searched for photos, masks and texts by the names of `photos.pairing`; a text is a local prompt |
| a `.json` file | COCO's instances: see `photos.coco` |

Nothing is decoded here; what is held are the names of one folder, the listing of one tar or JSON, and some 30 bytes
of every entry. A region or a prompt may be missing: an annotator can add it, `photos.load` refuses it. What cannot
be used at all is an entry with a problem, and every other file of a folder or tar is an entry that is left out: nothing
is lost silently.

A manifest's first line may be a header: an object without `image` whose `root` is the folder that the rows' paths
start from; without it that is the manifest's own folder. The people's decisions in `decisions.jsonl` beside it hold: a
refused row has the problem REVIEW_REJECTED, a corrected prompt replaces the row's. A row with `prompt_problems`
on which nobody has decided has the problem NEEDS_REVIEW.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from refine_control.conditions.condition import find_condition
from refine_control.errors import InvalidInputError
from refine_control.folders import PHOTOGRAPHS, refuse_other_kind
from refine_control.photos.decisions import DECISIONS_NAME, REJECT, Decision, id_of, read_decisions
from refine_control.photos.files import TAR_SUFFIXES
from refine_control.photos.named_files import folder_entries, is_folder, tar_entries, unused_entries
from refine_control.photos.pairing import IMAGE_SUFFIXES, Leftover, is_mask_name
from refine_control.photos.seen import Seen
from refine_control.photos.values import parse_object, take_id, take_segmentation, take_text, whole_ids
from refine_control.records import INPAINT, LEFT_OUT, Entry, Rejected, RejectReason, Row, flat_meta, make_key, one_line

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.jsonl"
_NOT_META = frozenset({"image", "mask", "segmentation", "local_prompt", "global_prompt"})
_BESIDE_TARS = frozenset({"request"})
"""Of `data download`; img2dataset's own tables are called after their tars."""


def entries(
    source: Path,
    images: Path | None = None,
    left_out: Callable[[Entry], None] | None = None,
    condition: str = INPAINT,
) -> Iterator[Entry]:
    """Streams the entries of a source (see above) in the order of its rows, or of the sorted names.

    `images` is the folder of COCO's photos where it is not the JSON's own. `left_out` is called with the entries of
    what never was a sample to be (LEFT_OUT), each before the next that is streamed; without it a warning counts them
    at the end. Of a `condition` without a region the entries are whole photos: no mask, and the global prompt where
    there is one. Raises InvalidInputError when `source` is nothing of the kind, or a folder that this project writes
    for another use."""
    region = find_condition(condition).region
    listed = _reader(Path(source), images, region)
    if region:
        listed = (replace(entry, condition=None) if entry.condition else entry for entry in listed)
    else:
        listed = _whole_photos(source, listed, condition)
    return _checked(source, listed, left_out)


def _whole_photos(source: Path, listed: Iterator[Entry], condition: str) -> Iterator[Entry]:
    """The entries without their regions; of several that then are alike all but the first are duplicates."""
    seen = Seen()
    for entry in listed:
        if entry.problem is not None:
            yield entry
            continue
        if entry.mask is not None or entry.segmentation is not None:
            _warn_once(f"{source} names masks, which the condition {condition} does not use")
        prompt, problem = entry.global_prompt or entry.prompt, None
        if not seen.add("\0".join((entry.image, entry.condition or "", prompt or ""))):
            problem = (RejectReason.DUPLICATE, "an earlier entry has this photo, condition picture and prompt")
        elif entry.condition and os.path.normpath(entry.condition) == os.path.normpath(entry.image):
            problem = (RejectReason.BAD_ROW, "the condition picture is the photo itself")
        yield replace(entry, mask=None, segmentation=None, prompt=prompt, problem=problem)


@functools.lru_cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _reader(source: Path, images: Path | None, region: bool) -> Iterator[Entry]:
    """Chooses by what lies there; errors of the choice are raised here, before the first entry."""
    if images is not None and source.suffix.lower() != ".json":
        raise InvalidInputError(f"a folder of images is for COCO's .json files; {source} says where its photos are")
    if source.is_dir():
        refuse_other_kind(source, PHOTOGRAPHS)
        if (source / MANIFEST_NAME).is_file():
            return _manifest_entries(source / MANIFEST_NAME, region)
        return _folder_entries(source)
    if source.is_file():
        if source.suffix.lower() == ".jsonl":
            return _manifest_entries(source, region)
        if source.suffix.lower() == ".json":
            from refine_control.photos.coco import coco_entries

            return coco_entries(source, images)
        if source.name.lower().endswith(TAR_SUFFIXES):
            return _tar_entries(source.parent, [source.name], [])
    fault = "is not" if source.exists() else "does not exist; name"
    raise InvalidInputError(f"{source} {fault} a folder of photos or tars, a .jsonl manifest or COCO's .json")


def _tar_entries(root: Path, names: list[str], others: list[Leftover]) -> Iterator[Entry]:
    """The entries of the tars `names` in `root`, then of what lies beside them."""
    for name in names:
        yield from tar_entries(root, name)
    yield from unused_entries(root, "", others)


def _folder_entries(folder: Path) -> Iterator[Entry]:
    """Of the tars at the top of a folder, or of a folder without tars.

    Raises InvalidInputError where there are photos beside the tars: one of the two would be passed over."""
    with os.scandir(folder) as listing:
        listed = sorted((each.name, is_folder(each)) for each in listing)
    files = [name for name, is_folder in listed if not is_folder and not name.startswith(".")]
    tars = [name for name in files if name.lower().endswith(TAR_SUFFIXES) and (folder / name).is_file()]
    if not tars:
        return folder_entries(folder)
    photos = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    if photos:
        raise InvalidInputError(f"{folder} holds tars ({tars[0]}) and photos ({photos[0]}); give each a folder")
    stems = {name[: -len(suffix)] for name in tars for suffix in TAR_SUFFIXES if name.lower().endswith(suffix)}
    known = {*tars, *_BESIDE_TARS, *(f"{stem}{end}" for stem in stems for end in (".parquet", "_stats.json"))}
    whys = ("no tar; other files beside tars are not read", "a folder beside tars is not searched")
    return _tar_entries(folder, tars, [Leftover(name, whys[is_dir]) for name, is_dir in listed if name not in known])


def _checked(source: Path, listed: Iterator[Entry], left_out: Callable[[Entry], None] | None) -> Iterator[Entry]:
    """The entries without those that are left out; what no source may hold is found here for all of them."""
    count, first = 0, ""
    seen = Seen()
    for entry in listed:
        if entry.problem is not None and entry.problem[0] in LEFT_OUT:
            count, first = count + 1, first or entry.image + ": " + entry.problem[1]
            if left_out is not None:
                left_out(entry)
            continue
        new, problem = seen.add(entry.key), entry.problem
        if problem is None and not new:
            problem = (RejectReason.DUPLICATE, "an earlier entry has this image, region and id")
        elif problem is None and is_mask_name(entry.image):
            problem = (RejectReason.BAD_ROW, "the image is a mask by its name")
        elif problem is None and entry.mask and os.path.normpath(entry.mask) == os.path.normpath(entry.image):
            problem = (RejectReason.BAD_ROW, "the mask is the photo itself")
        yield entry if problem is entry.problem else replace(entry, problem=problem)
    if count and left_out is None:
        _warn_once(f"{count} files or annotations of {source} are left out, first {first}")


def photos_of(listed: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Groups consecutive entries of one image: what an annotator looks at once."""
    for _, group in itertools.groupby(listed, key=lambda entry: (entry.root, entry.image)):
        yield list(group)


# A JSONL manifest


def _manifest_entries(path: Path, region: bool) -> Iterator[Entry]:
    decisions = read_decisions(path.with_name(DECISIONS_NAME))
    root = path.parent
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise InvalidInputError(f"{path} is in UTF-16; save it as UTF-8")
            if not line.strip():
                continue
            try:
                row = _row(line)
                if number == 1 and "image" not in row and isinstance(row.get("root"), str):
                    root = _root(path, row["root"])
                    continue
                entry, doubts = _manifest_entry(root, row, region), _texts(row, "prompt_problems")
            except Rejected as error:
                detail = f"line {number}: {error.detail}"
                yield Entry.refused(root, _image_name(line), error.reason, detail, f"row-{number}")
            else:
                yield _decided(entry, decisions, doubts)


def _row(line: bytes) -> Row:
    try:
        return parse_object(line.decode("utf-8-sig"), "")
    except UnicodeDecodeError:
        raise Rejected(RejectReason.BAD_ROW, "not text in UTF-8") from None


def _image_name(line: bytes) -> str:
    """Of a row that cannot be used; empty where it names none."""
    try:
        return take_text(_row(line), "image")
    except Rejected:
        return ""


def _root(manifest: Path, named: str) -> Path:
    root = manifest.parent / named
    if "\0" in named or not root.is_dir():
        raise InvalidInputError(f"the first line of {manifest} says that the photos are in {root}, which is no folder")
    return root


def _manifest_entry(root: Path, row: Row, region: bool) -> Entry:
    """The entry of a row. Rejected where a field has a value that it cannot have; with a `region` none reads the
    field `condition`, which other lists use in other ways."""
    image = take_text(row, "image")
    if not image:
        fields = ", ".join(sorted(map(str, row))[:8])
        raise Rejected(RejectReason.BAD_ROW, f"no `image` is named; the fields are: {fields or 'none'}")
    mask = take_text(row, "mask") or None
    segmentation = take_segmentation(row) if mask is None else None
    cond = None if region and not isinstance(row.get("condition"), str) else take_text(row, "condition") or None
    part = mask or cond if segmentation is None else json.dumps(segmentation, sort_keys=True)
    captions = _texts(row, "captions")
    take_id(row, "source_image_id")
    return Entry(
        key=make_key(image, part, take_id(row, "id")),
        root=root,
        image=image,
        mask=mask,
        prompt=one_line(take_text(row, "local_prompt", RejectReason.NO_PROMPT)) or None,
        global_prompt=one_line(take_text(row, "global_prompt")) or next(filter(None, map(one_line, captions)), ""),
        meta=flat_meta(row, _NOT_META) | whole_ids(row),
        segmentation=segmentation,
        condition=cond,
    )


def _texts(row: Row, name: str) -> list[Any]:
    """A list of texts, or a single text as one; empty where it is absent. Rejected where it is neither."""
    value = row.get(name)
    return value if isinstance(value, list) else [text] if (text := take_text(row, name)) else []


def _decided(entry: Entry, decisions: dict[str, Decision], doubts: list[Any]) -> Entry:
    """The entry as people left it; `doubts` of its prompt that nobody has settled keep it out."""
    decision = decisions.get(id_of(entry)) if decisions else None
    if decision is None:
        if not doubts:
            return entry
        detail = f"the prompt is doubtful ({', '.join(map(str, doubts))}): see `data review`"
        return replace(entry, problem=(RejectReason.NEEDS_REVIEW, detail))
    if decision.action == REJECT:
        return replace(entry, problem=(RejectReason.REVIEW_REJECTED, "refused in the review"))
    return replace(entry, prompt=one_line(decision.prompt) or entry.prompt)
