"""A review in Label Studio instead of on our page: rows -> tasks, annotations -> decisions.

A task shows the photo with its region as a brush mask, the prompt as an editable text, and the choice accept | reject,
all filled in as a prediction. A region that was changed there is reported but not imported: decisions concern prompts.

Label Studio's own converter and SDK would bring some forty packages for its brush format; `annotation.brush` has fifty
lines.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from refine_control.annotation.brush import decode_brush, encode_brush
from refine_control.annotation.review_rows import Row, decide_row, grey_mask, load_view, read_rows
from refine_control.errors import InvalidInputError
from refine_control.photos.decisions import ACCEPT, DECISIONS_NAME, EDIT, REJECT, Decision, DecisionLog, append_decision
from refine_control.photos.load import load_mask
from refine_control.photos.values import whole
from refine_control.records import Rejected, one_line
from refine_control.storage import open_atomic, storage_errors, write_atomic

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
        lists = {"of no row here": self.strangers, "with a changed region, left as it was": self.repainted}
        for what, ids in lists.items():
            if ids:
                text += f"\n{len(ids)} {what}: {', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''}"
        return text


def _mask_at(row: Row, size: tuple[int, int]) -> np.ndarray:
    """The row's mask, (H, W) bool, at `size` (W, H). Raises Rejected."""
    return np.asarray(grey_mask(load_mask(row.entry), size)) > 127


# Out


def export_tasks(folder: Path, out: Path) -> ExportSummary:
    """Writes `tasks.json` and `labels.xml`, their labelling configuration, into the folder `out`.

    The rows are those of `folder` (see `review_rows.read_rows`); tasks contain the photos, at most 1024 pixels long."""
    log, rows = DecisionLog(folder / DECISIONS_NAME), read_rows(folder)
    tasks, refused = 0, Counter[str]()
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with open_atomic(out / TASKS) as file:
        file.write(b"[")
        for row in rows:
            try:
                task = _task(row, log.counting(row.id))
            except Rejected as error:
                refused[error.reason.value] += 1
                continue
            file.write((b",\n" if tasks else b"\n") + json.dumps(task).encode())
            tasks += 1
        file.write(b"\n]\n")
    write_atomic(out / LABELS, CONFIG)
    return ExportSummary(tasks, dict(refused))


def _task(row: Row, decision: Decision | None) -> Mapping[str, Any]:
    """One task, whose prediction is the decision so far. Raises Rejected where there is no picture or no region."""
    view = load_view(row.entry)
    mask = _mask_at(row, view.size)
    words = (decision.prompt if decision else None) or row.entry.prompt or ""
    verdict = REJECT if decision and decision.action == REJECT else ACCEPT
    where = {"original_width": view.size[0], "original_height": view.size[1], "image_rotation": 0}
    values = (
        ("region", "brushlabels", {"format": "rle", "rle": encode_brush(mask), "brushlabels": ["region"]}, where),
        ("prompt", "textarea", {"text": [words]}, {}),
        ("verdict", "choices", {"choices": [verdict]}, {}),
    )
    result = [
        {"id": name, "from_name": name, "to_name": "image", "type": kind, "value": value, **more}
        for name, kind, value, more in values
    ]
    image = "data:image/jpeg;base64," + base64.b64encode(view.jpeg).decode()
    data = {"id": row.id, "image": image, "prompt": words, "problems": list(row.problems), **row.scores}
    return {"data": data, "predictions": [{"model_version": "manifest", "result": result}]}


# In


def import_annotations(json_path: Path, folder: Path) -> ImportSummary:
    """Appends the decisions of Label Studio's JSON export to those of `folder`; a second import adds nothing.

    The reviewer is who completed the annotation. Raises InvalidInputError, before anything is appended, for a file
    that is no such export, and for one with values that no export has."""
    rows = {row.id: row for row in read_rows(folder)}
    log, summary, annotations = DecisionLog(folder / DECISIONS_NAME), ImportSummary(), list[tuple[Decision, bool]]()
    for task in _tasks(json_path):
        name = task["data"].get("id")
        number = whole(name)
        id = str(name if number is None or str(name) in rows else number)  # as the rows spell it
        if id not in rows:
            summary.strangers.append(id)
            continue
        try:
            read = [_read(rows[id], record) for record in task["annotations"]]
        except InvalidInputError as error:
            raise InvalidInputError(f"{json_path}, the task with the id {id}: {error}") from None
        summary.undecided += read.count(None)
        annotations += filter(None, read)
    for decision, repainted in sorted(annotations, key=lambda each: datetime.fromisoformat(each[0].time)):
        previous = log.of(decision.id).get(decision.reviewer)
        same = previous and previous.verdict == decision.verdict
        if previous and (same or datetime.fromisoformat(previous.time) > datetime.fromisoformat(decision.time)):
            summary.known += 1
        else:
            append_decision(log.path, decision)
            log.refresh()
            summary.decisions += 1
        if repainted:
            summary.repainted.append(decision.id)
    return summary


def _tasks(path: Path) -> list[Mapping[str, Any]]:
    """The tasks of an export, each with its data and annotations."""
    try:
        tasks = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path} cannot be read as JSON ({error}); export as JSON from Label Studio") from None
    tasks = tasks if isinstance(tasks, list) else [tasks]
    for task in tasks:
        data = task.get("data") if isinstance(task, dict) else None
        if not isinstance(data, dict) or not _records(task.get("annotations")):
            raise InvalidInputError(f"{path} is no list of tasks with annotations; export as JSON, not JSON-MIN")
    if tasks and not any("id" in task["data"] for task in tasks):
        raise InvalidInputError(
            f"{path}: none of its {len(tasks)} tasks has an `id` in its data; export the project into which the tasks "
            "of --to-label-studio were imported"
        )
    return tasks


def _records(value: object) -> bool:
    """Whether this is a list of JSON objects, each with such a list of results or none."""
    return isinstance(value, list) and all(
        isinstance(each, dict) and ("result" not in each or _records(each["result"])) for each in value
    )


def _read(row: Row, annotation: Mapping[str, Any]) -> tuple[Decision, bool] | None:
    """What an annotation decides on its row, and whether the region was changed; None where nothing is decided."""
    values, brushes = dict[str, Any](), []
    for part in annotation.get("result", ()):
        if part.get("type") == "brushlabels":
            brushes.append(part)
        elif isinstance(part.get("value"), dict):
            value = part["value"].get("choices") or part["value"].get("text")
            values[str(part.get("from_name"))] = value[0] if isinstance(value, list) and value else value
    verdict, text = values.get("verdict"), one_line(values.get("prompt"))
    if annotation.get("was_cancelled") or verdict not in (ACCEPT, REJECT):
        return None
    action = EDIT if verdict == ACCEPT and text else verdict
    decision = decide_row(row, action, _reviewer(annotation.get("completed_by")), text)
    time = annotation.get("updated_at") or annotation.get("created_at")
    return replace(decision, time=time) if isinstance(time, str) else decision, _repainted(row, brushes)


def _reviewer(person: object) -> str:
    """The name of who completed an annotation: an address or name, or a number under Label Studio's name."""
    number = person
    if isinstance(person, dict):
        if named := one_line(person.get("email")) or one_line(person.get("username")):
            return named
        number = person.get("id")
    counted = whole(number)
    return "label-studio" if person is None else f"label-studio-{number if counted is None else counted}"


def _repainted(row: Row, brushes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the union of the painted regions is another mask than the row's."""
    painted: np.ndarray | None = None
    for part in brushes:
        width, height = whole(part.get("original_width")), whole(part.get("original_height"))
        brush = part["value"].get("rle") if isinstance(part.get("value"), dict) else None
        if width is None or height is None or not isinstance(brush, list):
            raise InvalidInputError("a brush mask without its size or its bytes; export as JSON")
        one = decode_brush(brush, height, width)
        painted = one if painted is None or painted.shape != one.shape else painted | one
    with contextlib.suppress(Rejected):
        return painted is None or not np.array_equal(painted, _mask_at(row, painted.shape[::-1]))
    return True
