"""Kinds of folders that this project writes: what a folder is, and what to give in its place where another is needed.

A folder is recognised by its manifest, or by the names of its files where the manifest is missing or damaged.
No folder is listed. A folder of somebody else has no kind and is never refused here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from refine_control.errors import InvalidInputError
from refine_control.records import ROLES
from refine_control.storage import MANIFEST

_UNFINISHED = re.compile(r"\.(?P<name>.+)\.(partial|writer|\d+\.tmp|old\.tmp)")
_LARGEST_MANIFEST = 1 << 26


class Kind(Enum):
    """What a folder holds, and which command reads it."""

    SHARDS = "the shards of one role", "which `refine-control cache` and `evaluate --test` read"
    BUILD = "the output of `data build` or `data scenes`", "of which each role is a folder of shards"
    CACHE = "a cache", "which `refine-control train` reads with --set data.labeled or data.unlabeled"
    RUN = "the folder of a training run", "whose result is its folder student"
    STUDENT = "a trained ControlNet", "which --student, --controlnet and init_from read"
    CONTROLNET = "a ControlNet", "which --teacher, --student and --controlnet read"
    CHECKPOINT = "a checkpoint of a training run", "which `refine-control train` continues from its run folder"
    MODEL = "a model in diffusers layout", "which --model reads"
    TRAINED_MODEL = "the output of `mini train`", "whose model is its folder bundle"
    ANNOTATIONS = "annotations", "which `refine-control data review` and `data build` read"
    TASKS = "tasks for Label Studio", "which Label Studio imports"
    DOWNLOAD = "downloaded photographs", "which `refine-control data annotate` and `data build` read"
    EVALUATION = "the report of `evaluate` or `demo`", "which is to be read: open report.html"
    REPRODUCTION = "the output of `reproduce`", "which is to be read: open report.html"
    EXPORT = "an exported student", "which `refine-control inpaint --runtime` and other programs read"
    UNFINISHED = "unfinished work of a command", "which the same command, run again, continues"

    def __init__(self, what: str, use: str) -> None:
        self.what, self.use = what, use


class Expected(NamedTuple):
    """What an argument needs."""

    what: str
    kinds: tuple[Kind, ...]
    """The kinds that serve. A folder without a kind is left to whoever reads it."""
    advice: str
    """What to give, where no folder that serves is near."""


PHOTOGRAPHS = Expected(
    "photographs",
    (Kind.ANNOTATIONS, Kind.DOWNLOAD),
    "give a folder of photographs or tars, a manifest.jsonl or COCO's .json",
)
ONE_ROLE = Expected(
    "the shards of one role", (Kind.SHARDS,), "give OUT/labeled or another role that `refine-control data build` writes"
)
SHARDS_OR_BUILD = Expected(
    "shards", (Kind.SHARDS, Kind.BUILD), "give the output of `refine-control data build` or one of its roles"
)
ALL_ROLES = Expected("the shards of all roles", (Kind.BUILD,), "give the output folder of `refine-control data build`")
A_CACHE = Expected("a cache", (Kind.CACHE,), "make one with `refine-control cache SHARDS CACHE`")
A_CONTROLNET = Expected(
    "a ControlNet",
    (Kind.STUDENT, Kind.CONTROLNET, Kind.EXPORT),  # the loader says which exports are none
    "give RUN/student, which `refine-control train` writes",
)
A_MODEL = Expected("a model", (Kind.MODEL,), "give `mini`, a hub id or a pipeline folder in diffusers layout")
ROWS_TO_REVIEW = Expected("annotations", (Kind.ANNOTATIONS,), "make them with `refine-control data annotate`")

_MANIFEST_KINDS = {kind.name.lower(): kind for kind in (Kind.SHARDS, Kind.BUILD, Kind.CACHE, Kind.STUDENT, Kind.EXPORT)}
_MANIFEST_KINDS["bundle"] = Kind.MODEL
_FILES_OF_KIND = (
    (Kind.ANNOTATIONS, {"annotate.json"}),
    (Kind.TASKS, {"tasks.json", "labels.xml"}),
    (Kind.BUILD, {"build.json"}),
    (Kind.CACHE, {"samples.jsonl", "prompt_index.npy"}),
    (Kind.CHECKPOINT, {"state.safetensors"}),
    (Kind.MODEL, {"model_index.json"}),
    (Kind.SHARDS, {"index.jsonl", "shard-00000.tar"}),
    (Kind.TRAINED_MODEL, {"bundle/model_index.json"}),
    (Kind.REPRODUCTION, {"tables.json", "report.html"}),
    (Kind.EVALUATION, {"metrics.json", "report.html"}),
    *((Kind.RUN, {"recipe.yaml", name}) for name in ("metrics.jsonl", "checkpoints", "student")),
)


def kind_of_folder(path: str | Path) -> Kind | None:
    """What the folder `path` is; None for a folder of another origin, and for what is no folder."""
    folder = Path(path)
    if not os.path.isdir(path):  # False, too, for names that no file system takes
        return None
    if _UNFINISHED.fullmatch(folder.name):
        return Kind.UNFINISHED
    manifest = _read_object(folder / MANIFEST)
    if isinstance(manifest.get("files"), dict):
        if (kind := _MANIFEST_KINDS.get(str(manifest.get("kind")))) is not None:
            return kind
        if {"step", "fingerprint"} <= manifest.keys():
            return Kind.CHECKPOINT
    for kind, files in _FILES_OF_KIND:
        if all((folder / name).exists() for name in files):
            return kind
    if any(kind_of_folder(folder / role) is Kind.SHARDS for role in ROLES):
        return Kind.BUILD
    if "ControlNet" in str(_read_object(folder / "config.json").get("_class_name")):
        return Kind.CONTROLNET
    if "urls_sha256" in _read_object(folder / "request"):
        return Kind.DOWNLOAD
    if "made_by" in _read_object(folder / "manifest.jsonl", first_line=True):
        return Kind.ANNOTATIONS
    return Kind.CHECKPOINT if folder.name == "checkpoints" and any(folder.glob("step_*")) else None


def refuse_other_kind(path: str | Path, expected: Expected) -> None:
    """Raises InvalidInputError for a folder of this project that is of another kind than `expected`.

    The message says what the folder is and what to give in its place: a folder near it that serves, the command that
    makes one from it, or the general advice."""
    kind, folder = kind_of_folder(path), Path(path)
    if kind is None or kind in expected.kinds:
        return
    near = " or ".join(str(each) for each in _near(folder) if kind_of_folder(each) in expected.kinds)
    advice = f"give {near}" if near else _command_for(folder, kind, expected) or expected.advice
    raise InvalidInputError(f"{path} is {kind.what}, {kind.use}; {expected.what} must be given here: {advice}")


def refuse_output_kind(path: str | Path, *kinds: Kind) -> None:
    """Raises InvalidInputError for an output folder that holds another kind of this project's work than `kinds`."""
    kind = kind_of_folder(path)
    if kind is not None and kind not in kinds:
        raise InvalidInputError(
            f"{path} is {kind.what}, {kind.use}; nothing is written into it: choose a new folder for the output"
        )


def _read_object(path: Path, first_line: bool = False) -> dict[str, object]:
    """A JSON object in a small file, or in its first line; empty where there is none."""
    try:
        if not path.is_file() or (path.stat().st_size > _LARGEST_MANIFEST and not first_line):
            return {}
        with path.open("rb") as file:
            value = json.loads(file.readline(1 << 20) if first_line else file.read())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _near(folder: Path) -> list[Path]:
    """Where the folder that was meant may be: inside this one, or beside or above it."""
    named = _UNFINISHED.fullmatch(folder.name)
    inside = [folder / name for name in (*ROLES, "student", "bundle", "controlnet")]
    above = [folder.parent, folder.parent / "student", folder.parent.parent / "student"]
    return [*([folder.with_name(named["name"])] if named else []), *inside, *above]


def _command_for(folder: Path, kind: Kind, expected: Expected) -> str | None:
    """The command that makes what is expected from what was given."""
    if kind is Kind.BUILD and expected is A_CACHE:
        kind, folder = (
            Kind.SHARDS,
            next((each for role in ROLES if (each := folder / role).is_dir()), folder / ROLES[0]),
        )
    quoted = shlex.quote(str(folder))
    if kind is Kind.SHARDS and expected is A_CACHE:
        return f"make one with `refine-control cache {quoted} CACHE`"
    if kind in PHOTOGRAPHS.kinds and {Kind.SHARDS, Kind.BUILD, Kind.CACHE} & {*expected.kinds}:
        return f"build shards with `refine-control data build {quoted} OUT`"
    if kind is Kind.DOWNLOAD and expected is ROWS_TO_REVIEW:
        return f"annotate them with `refine-control data annotate {quoted} OUT`"
    if kind is Kind.RUN and expected is A_CONTROLNET:
        return "the run is not finished; run its `refine-control train` command again"
    return None
