"""The state of a review: a folder's rows, the pictures of them, and what has been decided."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refine_control.annotation.review_rows import Row, View, decide_row, load_view, read_rows
from refine_control.errors import InvalidInputError, StorageError
from refine_control.photos.decisions import DECISIONS_NAME, UNDO, Decision, DecisionLog, append_decision, decide
from refine_control.records import Rejected, one_line

_VIEWS_KEPT = 24


@dataclass(frozen=True)
class Columns:
    """What does not change of all rows, column by column."""

    title: str
    reviewer: str | None
    ids: list[str]
    problems: list[int]
    """How many each row has."""
    scores: dict[str, list[float | None]]


@dataclass(frozen=True)
class State:
    """What one reviewer decided, the rows in disagreement, and who else decides."""

    mine: dict[str, str]
    """Action by row."""
    differ: list[str]
    others: list[str]


@dataclass(frozen=True)
class RowState:
    """All of one row."""

    id: str
    image: str
    prompt: str
    global_prompt: str
    problems: Sequence[str]
    facts: Mapping[str, Any]
    mine: Decision | None
    num_others: int
    others: list[Decision] | None
    """None as long as they are not shown."""
    differ: bool


class Review:
    """The rows of a folder, their pictures and the decisions on them; threads may call it at once.

    One photo is decoded at a time, so memory in pixels is that of one photo."""

    def __init__(self, folder: Path, reviewer: str | None = None) -> None:
        self.folder = folder
        self.reviewer = one_line(reviewer) or None
        self.rows: dict[str, Row] = {row.id: row for row in read_rows(self.folder)}
        self.path = self.folder / DECISIONS_NAME
        if not os.access(self.folder, os.W_OK):
            raise StorageError(f"cannot write into {self.folder}, where the decisions go; copy the folder first")
        self._log = DecisionLog(self.path)
        self._views: OrderedDict[tuple[str, bool], View | Rejected] = OrderedDict()
        self._decoding, self._deciding = threading.Lock(), threading.Lock()

    def columns(self) -> Columns:
        """The columns of all rows; a score that a row lacks is None."""
        rows = self.rows.values()
        names = sorted({name for row in rows for name in row.scores})
        scores = {name: [row.scores.get(name) for row in rows] for name in names}
        problems = [len(row.problems) for row in rows]
        return Columns(self.folder.resolve().name, self.reviewer, list(self.rows), problems, scores)

    def state(self, reviewer: str = "") -> State:
        """The state of the review for one reviewer."""
        reviewer = self._name(reviewer)
        with self._deciding:
            self._log.refresh()
            known = [id for id in self._log.ids() if id in self.rows]
            mine = {id: last.action for id in known if (last := self._log.of(id).get(reviewer))}
            differ = [id for id in known if self._log.disagree(id)]
            return State(mine, differ, sorted(self._log.reviewers() - {reviewer}))

    def row(self, id: str, reviewer: str = "", others: bool = False) -> RowState:
        """All of one row; what others said only with `others` or after this reviewer's own decision."""
        row, reviewer = self._row(id), self._name(reviewer)
        with self._deciding:
            self._log.refresh()
            decisions, differ = self._log.of(id), self._log.disagree(id)
        mine = decisions.pop(reviewer, None)
        shown = others or mine is not None
        entry, theirs = row.entry, sorted(decisions.values(), key=lambda each: each.time)
        facts = {name: value for name, value in entry.meta.items() if value != "" and name != "id"}
        return RowState(
            id,
            entry.image,
            entry.prompt or "",
            entry.global_prompt,
            row.problems,
            facts,
            mine,
            num_others=len(theirs),
            others=theirs if shown else None,
            differ=differ and shown,
        )

    def decide(self, id: str, action: str, reviewer: str, prompt: str | None = None) -> RowState:
        """Writes a decision and then answers as `row`. An edit that changes nothing is an acceptance."""
        append_decision(self.path, decide_row(self._row(id), action, self._name(reviewer), prompt))
        return self.row(id, reviewer)

    def undo(self, reviewer: str) -> RowState | None:
        """Takes back what this reviewer decided last and still stands; that row, or None where nothing stands."""
        reviewer = self._name(reviewer)
        with self._deciding:
            self._log.refresh()
            last = self._log.latest_by(reviewer, among=self.rows)
            if last is None:
                return None
            append_decision(self.path, decide(last.id, UNDO, reviewer))
        return self.row(last.id, reviewer)

    def view(self, id: str, close: bool) -> View:
        """The pictures of a row; the last few are kept as files, not as pixels. Raises Rejected."""
        key, row = (id, close), self._row(id)
        with self._decoding:
            if key not in self._views:
                try:
                    self._views[key] = load_view(row.entry, close)
                except Rejected as error:
                    self._views[key] = error
            self._views.move_to_end(key)
            if len(self._views) > _VIEWS_KEPT:
                self._views.popitem(last=False)
            view = self._views[key]
        if isinstance(view, Rejected):
            raise view
        return view

    def _row(self, id: str) -> Row:
        if id not in self.rows:
            raise InvalidInputError(f"there is no row {id!r}; load the page again")
        return self.rows[id]

    def _name(self, reviewer: str) -> str:
        """The name given to the server goes before the page's."""
        name = self.reviewer or one_line(reviewer)
        if not name or len(name) > 80:
            raise InvalidInputError("say who you are: a name of 1 to 80 letters")
        return name
