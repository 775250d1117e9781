"""The only module of these tests that imports the package. When a module moves, change its import here and no more.

Functions return plain data: text, numbers, lists and dicts.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from typer.main import get_command
from typer.testing import CliRunner

from refine_control import errors
from refine_control.cli.app import app
from refine_control.config import fingerprint
from refine_control.models.loading import load_backbone
from refine_control.recipe_files import RECIPES, load_recipe, recipe_names
from refine_control.strict_yaml import read_yaml
from refine_control.study import model_cost
from refine_control.study import plan as plans
from refine_control.study.materials import Comparison
from refine_control.study.plan import ALIKE, FIGURE3, TABLES, TARGETS, anchor_row, measured_rows, row_recipes
from refine_control.study.row_results import read_row
from refine_control.study.row_tables import row_tables
from refine_control.study.runs import finished, row_mark
from refine_control.study.summary import summarise_rows
from refine_control.study.tables import write_tables
from refine_control.training.run import run_mark

read_budget, read_rows = cache(plans.read_budget), cache(plans.read_rows)
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
NonFinite = errors.NonFiniteError
MEASURED = {"": TABLES, "alike": ALIKE}
"""The kind of measurement by the name of the folder below that of the budget."""


# The command line.


def run(*arguments: object) -> str:
    """Standard output of a verb, run in this process."""
    with patch.object(model_cost, "_peak_in_fresh_process", lambda *_: 1):  # two processes of many seconds
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def commands() -> dict[str, Any]:
    """Every verb as a Click command, by its words: `data build`."""

    def walk(command: Any, words: tuple[str, ...] = ()) -> Any:
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, (*words, name))
        if not hasattr(command, "commands"):
            yield " ".join(words), command

    return dict(walk(get_command(app)))


def exit_codes() -> dict[str, int]:
    """Exit codes of all errors by class name."""
    return {name: kind.exit_code for name, kind in vars(errors).items() if hasattr(kind, "exit_code")}


# Recipes, budgets and rows.


def recipes() -> dict[str, Any]:
    """For each packaged recipe its fingerprint and what it sets apart from the defaults."""
    out = {}
    for name in recipe_names():
        recipe = load_recipe(name)
        out[name] = {"fingerprint": fingerprint(recipe), "set": recipe.model_dump(mode="json", exclude_defaults=True)}
    return out


def whole_recipe(name: str) -> dict[str, Any]:
    """A recipe with all its defaults."""
    return load_recipe(name).model_dump(mode="json")


def budgets(scale: str) -> dict[str, Any]:
    """The budgets of a scale, with their defaults."""
    return {name: read_budget(name, scale=scale).model_dump(mode="json") for name in read_yaml(_file(scale, "budgets"))}


def _file(scale: str, name: str) -> Path:
    return RECIPES / scale / f"{name}.yaml"


def rows(scale: str) -> dict[str, Any]:
    """The rows of a scale: what rows.yaml sets."""
    return {key: row.model_dump(mode="json", exclude_defaults=True) for key, row in read_rows(scale).items()}


class FixedMaterial(Comparison):
    """A comparison whose model and data are not here: fixed text stands for their hashes in the mark."""

    def mark(self) -> list[str]:
        return ["model", "data"]


def row_marks(scale: str, budget_name: str) -> dict[str, Any]:
    """For each row the fingerprints of its stages and its mark (seed 1), with fixed text for model and data."""
    budget = read_budget(budget_name, scale=scale)
    comparison = FixedMaterial(budget, Path("out"), scale)
    out = {}
    for key, row in read_rows(scale).items():
        stages = {name: fingerprint(recipe) for name, recipe in row_recipes(row, budget, 1).items()}
        out[key] = {"stages": stages, "mark": row_mark(row, comparison, 1)}
    return out


def targets() -> dict[str, Any]:
    """For each target of `reproduce` its rows by what is measured, and the row that the others are compared with."""
    return {
        name: {kind: list(measured_rows(kind, target)) for kind in (TABLES, ALIKE, FIGURE3)}
        | {"against": anchor_row(target)}
        for name, target in TARGETS.items()
    }


def run_fingerprint(name: str, overrides: Sequence[str] = ()) -> str:
    """What a run of a packaged recipe on the mini model is known by, without its caches."""
    return run_mark(load_recipe(name, overrides), load_backbone("mini"))


# Finished rows.


def result_files(world: str) -> list[str]:
    """Paths of all rows of a world (`mini`, `photos`) relative to the results."""
    return sorted(path.relative_to(RESULTS).as_posix() for path in (RESULTS / world).rglob("*.json"))


def recorded_mark(name: str) -> str:
    """The mark that a file of a row holds."""
    return json.loads((RESULTS / name).read_text())["mark"]


def _place(name: str) -> tuple[str, str, int, str]:
    """`mini/long/alike/fc-0.json` -> budget, row, seed and kind of measurement."""
    _, budget, *folder, file = name.split("/")
    key, _, seed = file.removesuffix(".json").rpartition("-")
    return budget, key, int(seed), MEASURED["/".join(folder)]


def is_finished(name: str) -> bool:
    """Would `reproduce` take this row of rendered scenes as finished?"""
    budget, key, seed, measured = _place(name)
    comparison = Comparison(read_budget(budget), Path("out"), "mini")
    row = finished(RESULTS / name, read_rows()[key], comparison, seed, measured)
    return row is not None and (row.key, row.seed) == (key, seed)


def fixed_mark(name: str) -> str:
    """The mark of a row of photographs, with fixed text for the bundle and the photographs, which are not shipped."""
    budget, key, seed, measured = _place(name)
    return row_mark(read_rows()[key], FixedMaterial(read_budget(budget), Path("out")), seed, measured)


# Tables.


def reproduced(out: Path, *arguments: str) -> str:
    """The Markdown that `reproduce` writes from finished rows of rendered scenes."""
    run("reproduce", *arguments, "--results", RESULTS / "mini", "--out", out)
    return (out / "tables.md").read_text()


def photo_tables(out: Path, keys: Sequence[str], against: str) -> str:
    """The Markdown of rows of photographs, whatever bundle they were measured with."""
    comparison = Comparison(read_budget("photos"), out, photos=Path("photos"), model="bundle")
    names = [name for name in result_files("photos") if _place(name)[1] in keys]
    results = {key: [read_row(RESULTS / name) for name in names if _place(name)[1] == key] for key in keys}
    chosen = {key: row for key, row in read_rows().items() if key in keys}
    out.mkdir(parents=True, exist_ok=True)
    summary = summarise_rows(results, against)  # type: ignore[arg-type]
    return write_tables(out, row_tables(summary, chosen, against, comparison, "Tables 1 and 3"), [])


# A toy training.


def toy() -> Any:
    """The module `tests/training/toy_training.py`: a run of the real loop on one linear layer."""
    path = ROOT / "tests" / "training" / "toy_training.py"
    spec = importlib.util.spec_from_file_location("golden_toy_training", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_thread() -> None:
    """What `tests/conftest.py` sets for tests."""
    import torch

    torch.set_num_threads(1)
