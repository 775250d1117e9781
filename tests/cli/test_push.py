"""The verb `push`: what it prints, and its exit codes."""

import json
import sys

import pytest

from refine_control.cli import app as cli
from refine_control.models.loading import save_controlnet


@pytest.fixture
def student(tiny_student, tmp_path):
    save_controlnet(tiny_student(2), tmp_path / "student", 24, kind="student")
    return tmp_path / "student"


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["refine-control", "push", *map(str, arguments)])
    try:
        return cli.main()
    except SystemExit as left:
        return int(left.code or 0)


def test_a_dry_run_prints_the_files_and_the_card_and_out_writes_them(monkeypatch, capsys, student, tmp_path):
    assert call(monkeypatch, student, "me/it", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["files"].keys() == {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "manifest.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"student"}
    assert call(monkeypatch, student, "me/it", "--out", tmp_path / "local") == 0
    assert {path.name for path in (tmp_path / "local").iterdir()} == plan["files"].keys()
    printed = capsys.readouterr().out
    assert printed.startswith("me/it, ")
    assert plan["card"] in printed


def test_mistakes_have_the_exit_codes_of_the_house(monkeypatch, capsys, student, tmp_path):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert call(monkeypatch, student, "me/it") == 69
    assert "run `hf auth login`" in capsys.readouterr().err
    assert call(monkeypatch, student, "it", "--dry-run") == 2
    (tmp_path / "empty").mkdir()
    assert call(monkeypatch, tmp_path / "empty", "me/it", "--dry-run") == 2
    (student / "config.json").write_text("{}")
    assert call(monkeypatch, student, "me/it", "--dry-run") == 65
    assert "config.json is not the file its manifest describes" in capsys.readouterr().err
