"""The state of a review: a folder's rows, the pictures of them, and what has been decided."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from refine_control.annotation.review_rows import Row, View, decide_row, load_view, read_rows
from refine_control.errors import InvalidInputError, StorageError
from refine_control.photos.decisions import DECISIONS_NAME, UNDO, DecisionLog, append_decision, as_json, decide
from refine_control.records import Rejected, one_line

_VIEWS_KEPT = 24


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

    def columns(self) -> dict[str, Any]:
        """What does not change of all rows, column by column; a score that a row lacks is None."""
        names = sorted({name for row in self.rows.values() for name in row.scores})
        return {
            "title": self.folder.resolve().name,
            "reviewer": self.reviewer,
            "ids": list(self.rows),
            "problems": [len(row.problems) for row in self.rows.values()],
            "scores": {name: [row.scores.get(name) for row in self.rows.values()] for name in names},
        }

    def state(self, reviewer: str) -> dict[str, Any]:
        """The action of each row that this reviewer decided, the rows in disagreement, and who else decides."""
        reviewer = self._name(reviewer)
        with self._deciding:
            self._log.refresh()
            known = [id for id in self._log.ids() if id in self.rows]
            mine = {id: last.action for id in known if (last := self._log.of(id).get(reviewer))}
            differ = [id for id in known if self._log.disagree(id)]
            return {"mine": mine, "differ": differ, "others": sorted(self._log.reviewers() - {reviewer})}

    def row(self, id: str, reviewer: str, others: bool = False) -> dict[str, Any]:
        """All of one row; what others said only with `others` or after this reviewer's own decision."""
        row, reviewer = self._row(id), self._name(reviewer)
        with self._deciding:
            self._log.refresh()
            said = self._log.of(id)
            differ = self._log.disagree(id)
        mine = said.pop(reviewer, None)
        shown = others or mine is not None
        return {
            "id": id,
            "image": row.entry.image,
            "prompt": row.entry.prompt or "",
            "global_prompt": row.entry.global_prompt,
            "problems": row.problems,
            "facts": {name: value for name, value in row.entry.meta.items() if value != "" and name != "id"},
            "mine": as_json(mine),
            "num_others": len(said),
            "others": [as_json(each) for each in sorted(said.values(), key=lambda each: each.time)] if shown else None,
            "differ": differ and shown,
        }

    def decide(self, id: str, action: str, reviewer: str, prompt: str | None = None) -> dict[str, Any]:
        """Writes a decision and then answers as `row`. An edit that changes nothing is an acceptance."""
        append_decision(self.path, decide_row(self._row(id), action, self._name(reviewer), prompt))
        return self.row(id, reviewer)

    def undo(self, reviewer: str) -> dict[str, Any] | None:
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
