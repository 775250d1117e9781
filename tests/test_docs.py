"""What a script makes for the docs is as it was committed, and numbers in sentences are those of the tables."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import typer.main

from refine_control.bench.machines import ASSUMED, named_machine
from refine_control.cli import app as cli
from refine_control.injection import groups

ROOT = Path(__file__).parent.parent


def script(name: str):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


drawings = script("drawings")


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_a_drawing_is_what_the_script_draws(name):
    assert (ROOT / "docs" / name).read_text() == drawings.DRAWINGS[name](), "run `python docs/drawings.py`"


def test_the_alignment_shows_every_group_by_its_width():
    drawn = (ROOT / "docs/alignment.svg").read_text()
    widths = re.findall(r'y="256" width="(\d+)"', drawn)
    expected = [35 * (len(sites) - 1) + 28 for sites in groups(12)]
    assert [int(width) for width in widths] == expected
    assert drawn.count('class="none"') == 1  # block 23 takes no residual


def test_the_alignment_follows_the_injection(monkeypatch):
    monkeypatch.setattr(
        drawings, "groups", lambda layers, sites: [[0], *[[s] for s in range(1, 11)], list(range(11, 23))]
    )
    assert drawings.alignment() != (ROOT / "docs/alignment.svg").read_text()


def test_the_data_flow_names_folders_and_commands_that_exist():
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.main.TyperGroup)
    data = group.commands["data"]
    assert isinstance(data, typer.main.TyperGroup)
    known = set(group.commands) | {f"data {name}" for name in data.commands}
    for station in drawings.STATIONS:
        assert (ROOT / "src/refine_control" / station.folder).exists()
        assert {command.partition(" --")[0] for command in station.command.split(", ")} <= known


def test_the_readmes_numbers_of_sd3_are_in_the_table_of_its_arithmetic():
    section = (ROOT / "README.md").read_text().split("## Distil SD3 on one GPU")[1].split("\n## ")[0]
    table = (ROOT / "docs/sd3.md").read_text().split("<!-- table: full_size -->")[1].split("<!-- end -->")[0]
    numbers = dict(map(reversed, re.findall(r"([\d.]+) (GB|EFLOP|hours)", section)))
    assert f"{numbers['GB']} GB" in table
    assert f"both stages, 1,280,000 samples |  |  | {numbers['EFLOP']} EFLOP" in table
    hours = float(numbers["EFLOP"]) * 1e18 / named_machine("H100").bf16 / ASSUMED / 3600
    assert float(numbers["hours"]) == pytest.approx(hours, abs=0.6)


def test_the_diff_of_a_condition_is_the_files_that_it_added():
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/concepts.md").read_text(), flags=re.DOTALL)
    files = re.findall(r"^\+\+\+ b/(\S+)\n((?:\+(?!\+\+ ).*\n)+)", diff, flags=re.MULTILINE)
    assert [Path(name).parent.name for name, _ in files] == ["conditions", "tasks"]
    for name, lines in files:
        assert re.sub(r"^\+", "", lines, flags=re.MULTILINE) == (ROOT / name).read_text()
