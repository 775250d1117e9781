"""Wherever a folder is given to a verb, a folder of another kind is named as what it is, with what to give instead."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from refine_control.cli import app as cli
from refine_control.folders import (
    A_CACHE,
    A_CONTROLNET,
    A_MODEL,
    ALL_ROLES,
    ONE_ROLE,
    PHOTOGRAPHS,
    ROWS_TO_REVIEW,
    SHARDS_OR_BUILD,
    Kind,
)
from refine_control.photos.shards import ShardWriter
from refine_control.records import LABELED, Photo
from refine_control.storage import publish_folder

INPAINT = ("inpaint", "--image", "{0}/a.png", "--mask", "{0}/mask.png", "--prompt", "a cup", "--out", "{0}/out.png")
GENERATE = ("generate", "--prompt", "a cup", "--out", "{0}/out.png", "--control")
EVALUATE = ("evaluate", "--out", "{2}")
TRAIN = ("train", "mini/fc", "--run-dir", "{2}", "--set")
ENTRIES = {
    "data build": (PHOTOGRAPHS, ("data", "build", "{1}", "{2}")),
    "data annotate": (PHOTOGRAPHS, ("data", "annotate", "{1}", "{2}")),
    "data reword": (PHOTOGRAPHS, ("data", "reword", "{1}", "{2}", "--as", "template")),
    "data review": (ROWS_TO_REVIEW, ("data", "review", "{1}", "--to-label-studio", "{2}")),
    "data verify": (SHARDS_OR_BUILD, ("data", "verify", "{1}")),
    "data inspect": (SHARDS_OR_BUILD, ("data", "inspect", "{1}")),
    "cache": (ONE_ROLE, ("cache", "{1}", "{2}")),
    "data.labeled": (A_CACHE, (*TRAIN, "data.labeled={1}")),
    "init_from": (A_CONTROLNET, (*TRAIN, "init_from={1}")),
    "--model": (A_MODEL, (*INPAINT, "--model", "{1}")),
    "--controlnet": (A_CONTROLNET, (*INPAINT, "--controlnet", "{1}")),
    "--control": (A_CONTROLNET, (*GENERATE, "{1}={0}/a.png")),
    "--teacher": (A_CONTROLNET, ("cache", "{0}/out/labeled", "{2}", "--teacher", "{1}")),
    "--student": (A_CONTROLNET, (*EVALUATE, "--test", "{0}/out/labeled", "--student", "s={1}")),
    "--test": (ONE_ROLE, (*EVALUATE, "--test", "{1}", "--student", "{0}")),
    "--data": (ALL_ROLES, ("reproduce", "table1", "--data", "{1}", "--out", "{2}", "--results", "{2}")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(root / "a.png")
    Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16)).save(root / "mask.png")
    writer = ShardWriter(root / "out" / LABELED, LABELED)
    for key in "ab":
        writer.add(Photo(key, np.zeros((64, 64, 3), np.uint8), np.eye(64, dtype=bool), "a cup"))
    writer.finish()
    published = {Kind.CACHE: root / "cache", Kind.STUDENT: root / "run" / "student", Kind.MODEL: root / "model"}
    for name, folder in zip(("cache", "student", "bundle"), published.values(), strict=True):
        with publish_folder(folder, kind=name):
            pass
    written = {Kind.RUN: root / "run", Kind.ANNOTATIONS: root / "annotations", Kind.UNFINISHED: root / ".a.partial"}
    for folder, name in zip(written.values(), ("recipe.yaml", "annotate.json", "state.json"), strict=True):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({}))
    return root, {**published, **written, Kind.SHARDS: root / "out" / LABELED, Kind.BUILD: root / "out"}


@pytest.mark.parametrize("entry", ENTRIES)
def test_another_kind_of_folder_is_named_and_never_called_damaged(folders, monkeypatch, capsys, entry):
    root, kinds = folders
    expected, words = ENTRIES[entry]
    monkeypatch.chdir(root)
    for kind, folder in kinds.items():
        if kind in expected.kinds or (entry == "init_from" and kind is Kind.RUN):
            continue
        monkeypatch.setattr(
            sys, "argv", ["refine-control", *(word.format(root, folder, root / entry) for word in words)]
        )
        assert cli.main() == 2, kind
        said = capsys.readouterr().err
        assert f"{folder} is {kind.what}, {kind.use}; " in said
        assert " must be given here: " in said
        assert "delete" not in said
        assert "damaged" not in said
