"""What a model card states, read from a run: base models and licences, training data, and what was measured.

Of a base model that is not in `KNOWN` no licence is stated. Names and paths of the machine that trained are replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from refine_control.config import Recipe, SamplerConfig, StudentCard
from refine_control.errors import InvalidInputError
from refine_control.metrics.statistics import Interval
from refine_control.models.card import CONTROLNETS
from refine_control.pipeline.picture_cost import PictureCost
from refine_control.records import INPAINT
from refine_control.storage import MANIFEST, read_manifest, sha256_file


class Known(NamedTuple):
    """A model that others can name: its licence, and the number of its transformer's blocks (None: a ControlNet)."""

    license: str
    front_matter: Mapping[str, str]
    """The licence in the words of the hub's metadata."""
    num_blocks: int | None = None


_COMMUNITY = "Stability AI Community License"
_STABILITY = {
    "license": "other",
    "license_name": "stabilityai-ai-community",
    "license_link": "https://stability.ai/license",
}
KNOWN = {
    **dict.fromkeys(["mini", *CONTROLNETS], Known("Apache-2.0", {"license": "apache-2.0"}, 24)),
    "stabilityai/stable-diffusion-3-medium": Known(_COMMUNITY, _STABILITY, 24),
    "stabilityai/stable-diffusion-3-medium-diffusers": Known(_COMMUNITY, _STABILITY, 24),
    "stabilityai/stable-diffusion-3.5-medium": Known(_COMMUNITY, _STABILITY, 24),
    "stabilityai/stable-diffusion-3.5-large": Known(_COMMUNITY, _STABILITY, 38),
    "alimama-creative/SD3-Controlnet-Inpainting": Known(_COMMUNITY, _STABILITY),
}
"""The packaged models, and hub ids with the licences of their pages. A student derives from its base model."""
NOT_STATED = "not stated"
_PLACES = ("model", "teacher", "init_from")
_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")
_ABSOLUTE = re.compile(r"(?<![\w.:/<~-])/(?:[\w.@+-]+/)+[\w.@+-]+|\b[A-Za-z]:\\+\w+\\")
_MARK = re.compile(r"([^<>:\s]+): [^<>]*, sha256 ([0-9a-f]{16})")
"""An input of an evaluation in its report."""


def public_name(name: str | None) -> str | None:
    """A model of a recipe by a name that others can use: a packaged one or a hub id; None for others.

    A name with one slash may be a local folder: it is a hub id where `KNOWN` or the hub's cache has it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if not name or name in KNOWN:
        return name
    if snapshot := _SNAPSHOT.search(name):
        return "/".join(snapshot.groups())
    cached = name.count("/") == 1 and (Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir()
    return name if cached and not Path(name).exists() else None


def public_recipe(recipe: Recipe) -> Recipe:
    """A recipe without the places of one machine: MODEL, TEACHER and INIT_FROM stand for local folders, and the data
    are to be named again."""
    places = {key: public_name(given) or key.upper() for key in _PLACES if (given := getattr(recipe, key))}
    data = recipe.data.model_copy(update={"labeled": None, "unlabeled": None, "test": None})
    return recipe.model_copy(update={**places, "data": data})


def refuse_private(name: str, text: str) -> None:
    """Raises InvalidInputError where a text that is to be published holds an absolute path of a file system."""
    if private := _ABSOLUTE.search(text):
        raise InvalidInputError(
            f"{name} would hold the path {private[0]}, which is private; remove it from the files of the student or of "
            "the evaluation"
        )


@dataclass(frozen=True)
class Evaluated:
    """What `refine-control evaluate` measured of one student, which is called `name` there."""

    name: str
    test: str
    """The test set in words."""
    test_mark: str | None
    """First characters of the sha256 of the test set's manifest."""
    models: Mapping[str, Mapping[str, Interval]]
    """By model, the teacher among them: mean and 95 % interval by metric."""
    differences: Mapping[str, Interval]
    """Of the teacher minus this student on the same pictures, by metric."""
    samples: int
    sampler: str
    machine: str
    cost: Mapping[str, Mapping[str, float]]
    """By model, fields of ModelCost."""
    grid: Path | None
    """The picture grid."""


def read_evaluation(folder: Path, weights: Path) -> Evaluated:
    """The part of an evaluation folder that is about the student with these weights, by the sha256 in its report.

    Raises InvalidInputError for a folder of another kind and for an evaluation of other weights."""
    try:
        numbers = json.loads((folder / "metrics.json").read_bytes())
        facts, models = numbers["facts"], {name: _intervals(each) for name, each in numbers["models"].items()}
        marks = dict(_MARK.findall((folder / "report.html").read_text()))
        samples, cost = int(numbers["samples"]), dict(numbers["cost"])
        test, sampler, machine = Path(facts["test"]).name, facts["sampler"], facts["machine"]
        differences = numbers["paired_differences"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InvalidInputError(
            f"{folder} is no evaluation that can be read; give a folder that `refine-control evaluate` wrote"
        ) from None
    mark = sha256_file(weights)[:16]
    name = next((name for name in models if marks.get(name) == mark), None)
    if name is None:
        measured = ", ".join(sorted(models.keys() - {"teacher"}))
        raise InvalidInputError(
            f"{folder} is no evaluation of {weights}: it measured other weights as {measured}; run `refine-control "
            "evaluate` with this student"
        )
    return Evaluated(
        name,
        f"{test}, {samples} held-out samples",
        marks.get("test"),
        models,
        _intervals(differences.get(f"teacher - {name}", {})),
        samples,
        sampler,
        machine,
        cost,
        folder / "grid.png" if (folder / "grid.png").is_file() else None,
    )


def _intervals(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Interval]:
    """Those that are bounded."""
    ends = {metric: (value["mean"], value["low"], value["high"]) for metric, value in values.items()}
    return {metric: Interval(*each) for metric, each in ends.items() if None not in each}


def describe_data(recipe: Recipe, built: Path | None) -> list[str]:
    """Sentences on the caches that a recipe names; with the output of `data build` or `data scenes` that they were made
    of, their sources, licences and seed.

    Raises InvalidInputError where a cache was made of other shards than those."""
    lines = []
    for role in recipe.objective.roles:
        folder = getattr(recipe.data, role)
        if folder is None or not (Path(folder) / MANIFEST).is_file():
            lines.append(f"{role} data: the cache is not at hand, the number of samples is {NOT_STATED}")
            continue
        cache = read_manifest(Path(folder), verify=False, required=("count",))
        line = f"{role} data: {cache['count']:,} samples in the cache that the run's manifest names"
        if built is not None:
            shards = built / role / MANIFEST
            if not shards.is_file() or sha256_file(shards) != cache.get("source", {}).get("shards"):
                raise InvalidInputError(
                    f"{folder} was not made of {shards.parent}; give --data the folder that `refine-control data` "
                    "wrote for this cache, or leave it away"
                )
            line += f"; {_shards_in_words(read_manifest(shards.parent, verify=False))}"
        lines.append(line)
    return lines


def _shards_in_words(shards: Mapping[str, Any]) -> str:
    sources, licences = (
        ", ".join(f"{name} {count:,}" for name, count in shards.get(key, {}).items()) or NOT_STATED
        for key in ("sources", "licenses")
    )
    seed = shards.get("seed", NOT_STATED)
    return f"{shards.get('photos', 0):,} pictures, sources: {sources}, licences: {licences}, seed {seed}"


@dataclass(frozen=True)
class Run:
    """Everything that a card is written from."""

    repo_id: str
    config: Mapping[str, Any]
    """Of the ControlNet."""
    num_params: int
    sampler: SamplerConfig
    """How it is sampled where nobody says."""
    recipe: Recipe | None
    """As trained, with the places of this machine; None where the manifest has none."""
    steps: int | None
    card: StudentCard | None
    """Of a student for few steps."""
    model: str | None
    """Its base model by a name that others can use."""
    headings: Mapping[str, str]
    """By metric, its name in tables; their order is that of the tables."""
    evaluated: Evaluated | None = None
    cost: PictureCost | None = None
    data: Sequence[str] = ()
    """Sentences on the training data."""
    own_transformer: str | None = None
    """The folder of a transformer that was trained with it."""
    scheduler: str | None = None
    """The class of its own scheduler/."""
    without_t5: bool = False
    max_sequence_length: int = 256
    warning: str = ""
    """What stock diffusers does wrong with it."""

    @property
    def condition(self) -> str:
        """The kind of condition."""
        return self.config.get("condition") or INPAINT

    @property
    def on_hub(self) -> bool:
        """Whether its base model is a hub id."""
        return "/" in (self.model or "")

    def shown(self, values: Mapping[str, Any]) -> list[str]:
        """The metrics that have values, in the order of tables."""
        return [metric for metric in self.headings if metric in values]
