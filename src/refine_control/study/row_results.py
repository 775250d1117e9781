"""The result of one row and seed as a small JSON file, and its first pictures beside it."""

# N test samples, H W pixels

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refine_control.errors import InvalidInputError
from refine_control.metrics.distances import SetScore
from refine_control.metrics.image_pairs import Images
from refine_control.storage import write_atomic
from refine_control.study.compare import Scores

NUMERICS = 2
"""Version of the arithmetic that new rows are made with: raised when equal recipes give other numbers that are close
enough for finished rows to stay (`runs.FORMAT` is raised where they are not).

1: fp32 master weights started from weights rounded to bf16. 2: they start from the exact weights."""
PICTURES, PICTURES_MARK = "images.npy", "images.mark"
_DIGITS, _PICTURES = 5, 64


@dataclass(frozen=True)
class RowFacts:
    """What tables print beside the metrics. No mean, interval or pairing depends on it; None if not measured."""

    num_layers: int | None = None
    num_params: int | None = None
    gflops_controlnet: float | None = None
    gflops_step: float | None = None
    denoiser_params: int | None = None
    """Of a baseline."""
    baseline: Mapping[str, str] | None = None
    """How a baseline was sampled."""
    training_seconds: float | None = None
    seconds_per_image: float | None = None
    machine: str = ""
    network_calls: int | None = None
    """Passes of ControlNet and transformer that a picture takes, twice a step with guidance."""
    gflops_picture: float | None = None
    """A whole picture: text encoders, VAE and all network calls."""
    other: Mapping[str, object] = field(default_factory=dict)
    """Keys of a file that this version does not know; they are kept."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RowFacts:
        """The facts of a file."""
        names = {each.name for each in fields(cls)} - {"other"}
        known = {name: value for name, value in values.items() if name in names}
        return cls(**known, other={name: value for name, value in values.items() if name not in names})

    def as_json(self) -> dict[str, object]:
        """All facts that are known."""
        known = {name: value for name, value in vars(self).items() if name != "other" and value not in (None, "")}
        return known | dict(self.other)


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
    facts: RowFacts = RowFacts()
    steps: int = 0
    """Training steps; 0 for a model that is not trained, which is paired with every seed and closes no gap."""
    numerics: int | None = None
    """NUMERICS of the code that made it; None in files that do not say."""

    def facts_json(self) -> dict[str, object]:
        """The facts with the steps, as files hold them."""
        return {**self.facts.as_json(), "steps": self.steps}


def save_pictures(folder: Path, images: Sequence[np.ndarray] | np.ndarray, mark: str) -> None:
    """Saves the first pictures of a row, (H, W, 3) each, and the row's mark; none if their sizes differ."""
    first = list(images[:_PICTURES])
    if len({image.shape for image in first}) > 1:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PICTURES_MARK).unlink(missing_ok=True)
    np.save(folder / PICTURES, np.stack(first))
    write_atomic(folder / PICTURES_MARK, mark)


def read_pictures(folder: Path, mark: str) -> Images | None:
    """What `save_pictures` wrote, if it has this mark."""
    path = folder / PICTURES_MARK
    return np.load(folder / PICTURES) if path.is_file() and path.read_text() == mark else None


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def write_row(result: RowResult, path: Path) -> None:
    """Writes the result as compact JSON. `steps` is also among the facts, where earlier versions read it."""
    document = {
        "row": result.key,
        "seed": result.seed,
        "mark": result.mark,
        "steps": result.steps,
        "facts": result.facts_json(),
        "scores": {m: [round(float(v), _DIGITS) for v in values] for m, values in result.scores.items()},
        "sets": {m: {"value": _short(s.value), "drawn": [_short(v) for v in s.drawn]} for m, s in result.sets.items()},
    }
    document |= {} if result.numerics is None else {"numerics": result.numerics}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n")


def read_row(path: Path, mark: str | None = None) -> RowResult | None:
    """The result in a file; None if there is none or, with `mark`, if it has another mark.

    Raises InvalidInputError when the file cannot be read."""
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text())
        scores = {m: np.asarray(values, np.float64) for m, values in document["scores"].items()}
        sets = {m: SetScore(s["value"], np.asarray(s["drawn"], np.float64)) for m, s in document["sets"].items()}
        facts = dict(document["facts"])
        steps = document.get("steps", facts.pop("steps", None))
        known = (document["row"], document["seed"], document["mark"], scores, sets, RowFacts.from_json(facts))
        result = RowResult(*known, int(steps), document.get("numerics"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidInputError(f"{path} is not the result of a row; delete it and run the command again") from None
    return result if mark in (None, result.mark) else None
