"""The README's commands parse, and its tree is there: words that nothing checks go stale."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from refine_control.cli import app as cli
from refine_control.photos.shards import ShardWriter
from refine_control.records import ROLES, Photo
from refine_control.storage import only_writer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHOWN = re.compile(r"^\$ (refine-control .*)$", flags=re.MULTILINE)
COMMANDS = SHOWN.findall(README)
DATA_COMMANDS = [c for page in ("data.md", "sd3.md") for c in SHOWN.findall((ROOT / "docs" / page).read_text())]


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder that has what the commands name: folders, a photograph, a mask, shards of photographs."""
    monkeypatch.chdir(tmp_path)
    for command in [*COMMANDS, *DATA_COMMANDS]:
        for word in shlex.split(command)[1:]:
            path = Path(word.partition("=")[2] or word) if "runs/" in word else Path(word)
            if path.suffix in (".jpg", ".png", ".parquet", ".tsv000") and not str(path).startswith("runs/"):
                path.write_bytes(b"photo_id\tphoto_image_url\n")  # as a list of addresses begins
            elif word == "TARS":
                path.mkdir(exist_ok=True)
                (path / "0.tar").write_bytes(b"")
            elif (word == "PHOTOS" or "runs/" in word) and not path.suffix:
                path.mkdir(parents=True, exist_ok=True)
    for role in ROLES:
        with only_writer(Path("runs/photos") / role):
            writer = ShardWriter(Path("runs/photos") / role, role)
            mask = np.arange(64).reshape(8, 8) < 20
            writer.add(Photo("one", np.zeros((8, 8, 3), np.uint8), mask, "a dog"))
            writer.finish()
    return tmp_path


def test_the_readme_shows_the_main_job():
    verbs = [" ".join(c.split()[1:3]) for c in COMMANDS]
    assert {"data build", "cache runs/photos/labeled", "train mini/balanced_stage1", "train mini/fc_inherit"} <= set(
        verbs
    )


@pytest.mark.parametrize("command", [c for c in [*COMMANDS, *DATA_COMMANDS] if " inspect " not in c])
def test_every_command_is_one_that_we_have(command, somewhere, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--dry-run"])
    try:
        code = cli.main()
    except SystemExit as end:
        code = end.code
    assert code in (0, None), capsys.readouterr().err
    assert capsys.readouterr().out.strip()


def test_every_make_target_is_one_that_we_have():
    targets = set(re.findall(r"`?\$? ?make (\w+)`?", README))
    made = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert targets
    assert targets <= made


def test_the_tree_is_there():
    block = README.split("## Where things are")[1].split("```")[1]
    named = []
    for line in block.strip().splitlines():
        words = re.split(r"\s{2,}", line.rstrip())[0 if not line.startswith(" ") else 1]
        root = ROOT / "src/refine_control" if line.startswith("  ") else ROOT
        named += [root / word for word in words.split()]
    assert len(named) > 10
    assert [str(path) for path in named if not path.exists()] == []


def test_recipes_that_the_readme_names_exist():
    from refine_control.recipe_files import recipe_names

    assert set(re.findall(r"\b(mini/\w+)\b", README)) <= set(recipe_names())
