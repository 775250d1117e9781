"""What people decided in the review: `decisions.jsonl`, one JSON object a line, only ever appended to.

A line is {"id", "action": accept | edit | reject | undo, "prompt": new text or null, "reviewer", "time"}. An `undo`
takes back the reviewer's last decision on that id which still stood; the one before stands again. The last that
stands is the reviewer's decision. Over reviewers the one with the latest time counts, of equal times the later line.
Reviewers whose actions or prompts differ are in disagreement.

A line that a kill cut in its middle has no line end: readers pass over it and the next append removes it.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import io
import json
import os
from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from refine_control.errors import DamagedError, InvalidInputError
from refine_control.photos.values import whole
from refine_control.records import Entry, one_line
from refine_control.storage import fsync_path, storage_errors

DECISIONS_NAME = "decisions.jsonl"
ACCEPT, EDIT, REJECT, UNDO = "accept", "edit", "reject", "undo"
ACTIONS = (ACCEPT, EDIT, REJECT, UNDO)


@dataclass(frozen=True)
class Decision:
    """One line: what a reviewer said of one row of the manifest, and when."""

    id: str
    """Of the row, by `id_of`."""
    action: str
    """One of ACTIONS."""
    prompt: str | None
    """The new text of an edit, one line; None of everything else."""
    reviewer: str
    time: str
    """ISO 8601 with its zone."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise InvalidInputError(f"the action is {self.action!r}; it must be one of {', '.join(ACTIONS)}")
        if not all(isinstance(name, str) and name.strip() for name in (self.id, self.reviewer)):
            raise InvalidInputError("a decision needs the id of its row and the name of its reviewer")
        if (self.action == EDIT) != bool(self.prompt) or self.prompt == "":
            raise InvalidInputError("an edit has a prompt that is not empty, and nothing else has one")
        _moment(self.time)

    @property
    def verdict(self) -> tuple[str, str | None]:
        """What two reviewers must share to agree."""
        return self.action, self.prompt


def decide(id: str, action: str, reviewer: str, prompt: str | None = None) -> Decision:
    """A decision made now; the prompt of an edit becomes one line with single spaces."""
    text = one_line(prompt) if action == EDIT else None
    return Decision(id, action, text, one_line(reviewer), datetime.now(UTC).isoformat(timespec="microseconds"))


def id_of(entry: Entry) -> str:
    """The id by which a row is decided upon: its own, or its key where the source gave none."""
    name = entry.meta.get("id")
    return str(name) if isinstance(name, str | int) and str(name).strip() else entry.key


def _moment(time: str) -> datetime:
    """The time as a date; InvalidInputError when it is none or has no zone."""
    with contextlib.suppress(ValueError, TypeError):
        moment = datetime.fromisoformat(time)
        if moment.tzinfo is not None:
            return moment
    raise InvalidInputError(f"{time!r} is not a time like 2025-01-31T12:00:00+00:00")


def _parse(line: bytes) -> Decision:
    """The decision of a line. Raises InvalidInputError with what is wrong with it."""
    try:
        row = json.loads(line)
        id = row["id"]
        if not isinstance(id, str) and whole(id) is not None:  # as other tools write it
            id = str(whole(id))
        prompt = row["prompt"] if row["action"] == EDIT else None
        return Decision(id, row["action"], prompt, row["reviewer"], row["time"])
    except InvalidInputError:
        raise
    except KeyError as error:
        raise InvalidInputError(f"it has no `{error.args[0]}`") from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InvalidInputError("it is not a JSON object in UTF-8") from None


class DecisionLog:
    """The decisions of a file, and with `refresh` those that came since, by whichever process."""

    def __init__(self, path: Path) -> None:
        """A file that does not exist holds no decision. Raises as `refresh`."""
        self.path = Path(path)
        self._clear()
        self.refresh()

    def _clear(self) -> None:
        self._standing: dict[str, dict[str, list[tuple[Decision, int]]]] = defaultdict(lambda: defaultdict(list))
        self._offset = self._lines = 0

    def refresh(self) -> None:
        """Reads on from where the last reading ended; all of it again when the file has become shorter.

        Raises DamagedError naming the line that is not a decision, unless it is a last line without its end."""
        try:
            with self.path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # nobody is in the middle of a line
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._clear()
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return self._clear()
        for line in io.BytesIO(data):
            whole = line.endswith(b"\n")
            content = line.removeprefix(codecs.BOM_UTF8 if self._lines == 0 else b"").strip()
            try:
                decision = _parse(content) if content else None
            except InvalidInputError as error:
                if not whole:
                    break  # cut by a kill
                raise DamagedError(
                    f"line {self._lines + 1} of {self.path} is no decision: {error}; correct or remove that line"
                ) from None
            self._offset += len(line)
            self._lines += whole
            if decision is not None:
                self._take(decision)

    def _take(self, decision: Decision) -> None:
        standing = self._standing[decision.id][decision.reviewer]
        if decision.action != UNDO:
            standing.append((decision, self._lines))
        elif standing:
            standing.pop()

    def _last(self, id: str) -> Iterator[tuple[Decision, int]]:
        """The decision of each reviewer who has one, with its line."""
        return (standing[-1] for standing in self._standing.get(id, {}).values() if standing)

    def of(self, id: str) -> dict[str, Decision]:
        """What each reviewer decided on a row."""
        return {decision.reviewer: decision for decision, _ in self._last(id)}

    def counting(self, id: str) -> Decision | None:
        """The decision that counts for a row."""
        latest = max(self._last(id), key=lambda each: (_moment(each[0].time), each[1]), default=(None, 0))
        return latest[0]

    def disagree(self, id: str) -> bool:
        """Whether two reviewers decided differently on a row."""
        return len({decision.verdict for decision, _ in self._last(id)}) > 1

    def latest_by(self, reviewer: str, among: Container[str]) -> Decision | None:
        """The decision on one of the rows `among` that this reviewer wrote last and that still stands."""
        stacks = (standing.get(reviewer) for id, standing in self._standing.items() if id in among)
        return max((stack[-1] for stack in stacks if stack), key=lambda each: each[1], default=(None, 0))[0]

    def ids(self) -> list[str]:
        """The rows on which a decision stands, in the order of their first line."""
        return [id for id, standing in self._standing.items() if any(standing.values())]

    def reviewers(self) -> set[str]:
        """Everybody who has a decision that stands."""
        return {name for standing in self._standing.values() for name, stack in standing.items() if stack}


def read_decisions(path: Path) -> dict[str, Decision]:
    """The decision that counts for each id; none of a file that does not exist. Raises as `DecisionLog.refresh`."""
    log = DecisionLog(path)
    return {id: decision for id in log.ids() if (decision := log.counting(id))}


def by_reviewer(path: Path) -> dict[str, dict[str, Decision]]:
    """The decisions of each reviewer: `[reviewer][id]`. Raises as `DecisionLog.refresh`."""
    log = DecisionLog(path)
    ids = log.ids()
    return {name: {id: log.of(id)[name] for id in ids if name in log.of(id)} for name in log.reviewers()}


def append_decision(path: Path, decision: Decision) -> None:
    """Adds a line, which is on the disk when this returns. Threads and processes may call it at once.

    Raises StorageError when the disk refuses; then the file is as it was."""
    line = json.dumps(asdict(decision), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    with storage_errors(path):
        born = not path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            end = _close_last_line(descriptor)
            try:
                while line:
                    line = line[os.write(descriptor, line) :]
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
        if born:
            fsync_path(path.parent)


def _close_last_line(descriptor: int) -> int:
    """The size of the file once its last line is whole: what a kill left over is cut off, a missing end added."""
    start = end = os.fstat(descriptor).st_size
    tail = b""
    while start and b"\n" not in tail:
        step = min(start, 4096)
        start -= step
        tail = os.pread(descriptor, step, start) + tail
    tail = tail.rpartition(b"\n")[2]
    if not tail:
        return end
    with contextlib.suppress(InvalidInputError):
        _parse(tail)
        return end + os.write(descriptor, b"\n")
    os.ftruncate(descriptor, end - len(tail))
    return end - len(tail)
