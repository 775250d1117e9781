"""A review in Label Studio instead of on our page: rows -> tasks, annotations -> decisions.

`export_tasks` writes `tasks.json` and `labels.xml`, the labelling configuration that fits them. A task shows the photo
with its region as a brush mask, the prompt as text to mend, and the choice accept | reject, all filled in as a
prediction. `import_annotations` reads Label Studio's JSON export and appends to `decisions.jsonl`. A region that was
painted differently there is counted and told: decisions are about words, and masks stay as they are.
"""

# H W pixels of the photo as shown

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from refine_control.annotation.brush import decode_brush, encode_brush
from refine_control.annotation.review_rows import Row, load_view, read_rows
from refine_control.errors import InvalidInputError
from refine_control.photos.decisions import (
    ACCEPT,
    DECISIONS_NAME,
    EDIT,
    REJECT,
    Decision,
    DecisionLog,
    append_decision,
    decide,
)
from refine_control.photos.files import locate
from refine_control.photos.load import load_mask
from refine_control.records import Rejected, one_line
from refine_control.storage import storage_errors, write_atomic

TASKS, LABELS = "tasks.json", "labels.xml"
CONFIG = """<View>
  <Header value="Does the text name what belongs in the region?"/>
  <Image name="image" value="$image" zoom="true" zoomControl="true"/>
  <BrushLabels name="region" toName="image"><Label value="region" background="#e0107f"/></BrushLabels>
  <TextArea name="prompt" toName="image" value="$prompt" rows="2" maxSubmissions="1" editable="true"/>
  <Choices name="verdict" toName="image" choice="single-radio" required="true" showInLine="true">
    <Choice value="accept"/><Choice value="reject"/>
  </Choices>
</View>
"""
Images = Literal["local-files", "data"]


@dataclass(frozen=True)
class ExportSummary:
    """What became of the rows: all = tasks + refused."""

    tasks: int
    refused: dict[str, int]
    """Rows that cannot be shown, by reason code."""

    def __str__(self) -> str:
        listed = ", ".join(f"{reason} {count}" for reason, count in sorted(self.refused.items()))
        return f"{self.tasks} tasks; refused {sum(self.refused.values())}{': ' + listed if listed else ''}"


@dataclass
class ImportSummary:
    """What became of the annotations."""

    decisions: int = 0
    """Appended."""
    known: int = 0
    """Not appended: the same reviewer already decided so, or decided later."""
    undecided: int = 0
    """Skipped in Label Studio, or without a choice."""
    strangers: list[str] = field(default_factory=list)
    """Ids that are no row's."""
    repainted: list[str] = field(default_factory=list)
    """Ids whose region was changed there, which is not taken over."""

    def __str__(self) -> str:
        text = f"{self.decisions} decisions; {self.known} known already, {self.undecided} undecided"
        for ids, what in (
            (self.strangers, "of no row here"),
            (self.repainted, "with a changed region, left as it was"),
        ):
            if ids:
                text += f"\n{len(ids)} {what}: {', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''}"
        return text


class _Told(NamedTuple):
    """What one annotation says."""

    decision: Decision
    repainted: bool


def _mask_at(row: Row, size: tuple[int, int] | None) -> np.ndarray:
    """The row's mask, (H, W) bool, at `size` (W, H) where that is another than the photo's. Raises Rejected."""
    mask = load_mask(row.entry)
    if size is None or size == mask.shape[::-1]:
        return mask
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
    return np.asarray(grey) > 127


# Out


def export_tasks(
    folder: Path, out: Path, images: Images = "local-files", document_root: Path | None = None
) -> ExportSummary:
    """Writes tasks and configuration for the rows of `folder` (see `review_rows.read_rows`) into the folder `out`.

    `local-files` names the photos relative to `document_root`, Label Studio's LOCAL_FILES_DOCUMENT_ROOT (None: the
    folder that the manifest's paths start from); `data` puts them into the tasks, at most 1024 pixels long.
    Raises InvalidInputError for photos that local-files cannot name."""
    log = DecisionLog(Path(folder) / DECISIONS_NAME)
    tasks, refused = 0, Counter[str]()
    with storage_errors(out):
        Path(out).mkdir(parents=True, exist_ok=True)
        temporary = Path(out) / f".{TASKS}.{os.getpid()}.tmp"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                for row in read_rows(folder):
                    try:
                        task = _task(row, log.counting(row.id), images, document_root)
                    except Rejected as error:
                        refused[error.reason.value] += 1
                        continue
                    file.write(("[\n" if tasks == 0 else ",\n") + json.dumps(task))
                    tasks += 1
                file.write("\n]\n" if tasks else "[]\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(Path(out) / TASKS)
        finally:
            temporary.unlink(missing_ok=True)
    write_atomic(Path(out) / LABELS, CONFIG)
    return ExportSummary(tasks, dict(refused))


def _task(row: Row, decision: Decision | None, images: Images, root: Path | None) -> dict[str, Any]:
    """One task, its prediction saying what counts so far. Raises Rejected where there is no picture or no region."""
    view = load_view(row.entry) if images == "data" else None
    if view is None:
        address = _local_file(row, root)
    else:
        address = "data:image/jpeg;base64," + base64.b64encode(view.jpeg).decode()
    mask = _mask_at(row, view.size if view else None)
    height, width = mask.shape
    words = (decision.prompt if decision else None) or row.entry.prompt or ""
    verdict = REJECT if decision and decision.action == REJECT else ACCEPT
    where = {"to_name": "image", "original_width": width, "original_height": height, "image_rotation": 0}
    brush = {"format": "rle", "rle": encode_brush(mask), "brushlabels": ["region"]}
    result = [
        {"id": "region", "from_name": "region", "type": "brushlabels", "value": brush, **where},
        {"id": "prompt", "from_name": "prompt", "to_name": "image", "type": "textarea", "value": {"text": [words]}},
        {
            "id": "verdict",
            "from_name": "verdict",
            "to_name": "image",
            "type": "choices",
            "value": {"choices": [verdict]},
        },
    ]
    data = {"id": row.id, "image": address, "prompt": words, "problems": list(row.problems), **row.scores}
    return {"data": data, "predictions": [{"model_version": "manifest", "result": result}]}


def _local_file(row: Row, root: Path | None) -> str:
    """The address under which Label Studio serves a photo from its own disk."""
    where = locate(row.entry.root, row.entry.image)
    base = Path(root or row.entry.root).resolve()
    if where.member is not None or not where.path.is_relative_to(base):
        place = "lies in a tar" if where.member is not None else f"is not under {base}"
        raise InvalidInputError(f"{row.entry.image} {place}; export with images='data', or name another document root")
    return f"/data/local-files/?d={quote(where.path.relative_to(base).as_posix())}"


# In


def import_annotations(json_path: Path, folder: Path) -> ImportSummary:
    """Appends what Label Studio's JSON export says to the decisions of `folder`; again, and nothing is added.

    The reviewer is who completed the annotation. Raises InvalidInputError when the file is no such export."""
    rows = {row.id: row for row in read_rows(folder)}
    log, summary, told = DecisionLog(Path(folder) / DECISIONS_NAME), ImportSummary(), list[_Told]()
    for task in _tasks(json_path):
        row = rows.get(str(task["data"].get("id")))
        if row is None:
            summary.strangers.append(str(task["data"].get("id")))
            continue
        for annotation in task["annotations"]:
            one = _told(row, annotation)
            if one is None:
                summary.undecided += 1
            else:
                told.append(one)
    for decision, repainted in sorted(told, key=lambda one: datetime.fromisoformat(one.decision.time)):
        own = log.of(decision.id).get(decision.reviewer)
        if own and (own.verdict == decision.verdict or _later(own, decision)):
            summary.known += 1
        else:
            append_decision(log.path, decision)
            log.refresh()
            summary.decisions += 1
        if repainted:
            summary.repainted.append(decision.id)
    return summary


def _later(one: Decision, other: Decision) -> bool:
    return datetime.fromisoformat(one.time) > datetime.fromisoformat(other.time)


def _tasks(path: Path) -> Iterator[dict[str, Any]]:
    """The tasks of an export, each with its data and annotations."""
    try:
        tasks = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path} cannot be read as JSON ({error}); export as JSON from Label Studio") from None
    for task in tasks if isinstance(tasks, list) else [tasks]:
        if (
            not isinstance(task, dict)
            or not isinstance(task.get("data"), dict)
            or not _records(task.get("annotations"))
        ):
            raise InvalidInputError(f"{path} is no list of tasks with annotations; export as JSON, not JSON-MIN")
        yield task


def _records(value: object) -> bool:
    """Whether this is a list of JSON objects, each with such a list of results or none."""
    return isinstance(value, list) and all(
        isinstance(each, dict) and ("result" not in each or _records(each["result"])) for each in value
    )


def _told(row: Row, annotation: dict[str, Any]) -> _Told | None:
    """What an annotation says of its row, None where nothing is decided."""
    values: dict[str, Any] = {}
    brushes = []
    for part in annotation.get("result", ()):
        if part.get("type") == "brushlabels":
            brushes.append(part)
        elif isinstance(part.get("value"), dict):
            told = part["value"].get("choices") or part["value"].get("text")
            values[part.get("from_name")] = told[0] if isinstance(told, list) and told else told
    verdict, text = values.get("verdict"), one_line(values.get("prompt"))
    if annotation.get("was_cancelled") or verdict not in (ACCEPT, REJECT):
        return None
    action = EDIT if verdict == ACCEPT and text and text != row.entry.prompt else verdict
    decision = decide(row.id, action, _reviewer(annotation.get("completed_by")), text)
    time = annotation.get("updated_at") or annotation.get("created_at")
    if isinstance(time, str):
        decision = Decision(row.id, action, decision.prompt, decision.reviewer, time)
    return _Told(decision, _repainted(row, brushes))


def _reviewer(person: object) -> str:
    """Label Studio tells a number, or a record with an address."""
    if isinstance(person, dict):
        named = one_line(person.get("email")) or one_line(person.get("username"))
        return named or f"label-studio-{person.get('id')}"
    return "label-studio" if person is None else f"label-studio-{person}"


def _repainted(row: Row, brushes: list[dict[str, Any]]) -> bool:
    """Whether the painted regions together are another mask than the row's."""
    painted: np.ndarray | None = None
    for part in brushes:
        width, height = part.get("original_width"), part.get("original_height")
        brush = part.get("value", {}).get("rle")
        if type(width) is not int or type(height) is not int or not isinstance(brush, list):
            raise InvalidInputError(f"{row.id}: a brush mask without its size or its bytes; export as JSON")
        one = decode_brush(brush, height, width)
        painted = one if painted is None or painted.shape != one.shape else painted | one
    if painted is None:
        return True
    try:
        return not np.array_equal(painted, _mask_at(row, painted.shape[::-1]))
    except Rejected:
        return True
