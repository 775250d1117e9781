"""The numbers of one row and seed as a small file, and its first pictures beside it."""

# N test samples, H W pixels

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_control.errors import InvalidInputError
from refine_control.metrics.distances import SetScore
from refine_control.metrics.image_pairs import Images
from refine_control.storage import write_atomic
from refine_control.study.compare import Scores

PICTURES, PICTURES_MARK = "images.npy", "images.mark"
_DIGITS, _PICTURES = 5, 64


class RowResult(NamedTuple):
    """The numbers of one row and seed."""

    key: str
    seed: int
    mark: str
    """Hash of everything the numbers depend on."""
    scores: Scores
    """By metric: (N,)."""
    sets: dict[str, SetScore]
    """By metric of whole sets."""
    facts: dict[str, Any]
    """Steps, seconds, machine: what tables print and no number depends on."""


def save_pictures(folder: Path, images: Sequence[np.ndarray] | np.ndarray, mark: str) -> None:
    """The first pictures of a row, (H, W, 3) each, beside the hash of what made them; none where sizes differ."""
    first = list(images[:_PICTURES])
    if len({image.shape for image in first}) > 1:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PICTURES_MARK).unlink(missing_ok=True)
    np.save(folder / PICTURES, np.stack(first))
    write_atomic(folder / PICTURES_MARK, mark)


def read_pictures(folder: Path, mark: str) -> Images | None:
    """What `save_pictures` wrote, if it is of this hash."""
    told = folder / PICTURES_MARK
    return np.load(folder / PICTURES) if told.is_file() and told.read_text() == mark else None


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def write_row(result: RowResult, path: Path) -> None:
    """The result as compact JSON."""
    scores = {m: [round(float(v), _DIGITS) for v in values] for m, values in result.scores.items()}
    sets = {m: {"value": _short(s.value), "drawn": [_short(v) for v in s.drawn]} for m, s in result.sets.items()}
    told = {"row": result.key, "seed": result.seed, "mark": result.mark, "facts": result.facts, "scores": scores}
    told["sets"] = sets
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(told, sort_keys=True, separators=(",", ":")) + "\n")


def read_row(path: Path, mark: str | None = None) -> RowResult | None:
    """The result in a file; None where there is none, or (with `mark`) one of something else.

    Raises InvalidInputError when the file cannot be read."""
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text())
        scores = {m: np.asarray(values, np.float64) for m, values in told["scores"].items()}
        sets = {m: SetScore(s["value"], np.asarray(s["drawn"], np.float64)) for m, s in told["sets"].items()}
        result = RowResult(told["row"], told["seed"], told["mark"], scores, sets, told["facts"])
    except (ValueError, KeyError, TypeError):
        raise InvalidInputError(f"{path} is not the result of a row; delete it and run the command again") from None
    return result if mark in (None, result.mark) else None
