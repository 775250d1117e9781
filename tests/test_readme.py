"""The README and the docs say what is there: commands run, options and files exist, links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import typer.main
import yaml

from refine_control import errors
from refine_control.cli import app as cli
from refine_control.cli.evaluation import reproduce
from refine_control.config import ObjectiveConfig, Recipe
from refine_control.photos.shards import ShardWriter
from refine_control.recipe_files import RECIPES, recipe_names
from refine_control.records import ROLES, Photo
from refine_control.storage import only_writer

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/refine_control"
FILES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
README = PAGES["README.md"]
SHOWN = {name: re.findall(r"^\$ (refine-control .*)$", text, flags=re.MULTILINE) for name, text in PAGES.items()}
COMMANDS = sorted({command for commands in SHOWN.values() for command in commands})
EXAMPLES = {"name.txt", "NAME.txt", "utils.py", "recipes/SCALE/rows.yaml", "recipes/SCALE/budgets.yaml"}
FILE_ENDINGS = {"py", "json", "jsonl", "yaml", "html", "md", "cff", "jpg", "png", "txt"}
INLINE = sorted(
    {
        " ".join(command.split())
        for text in PAGES.values()
        for command in re.findall(r"`[^`\n]*?(refine-control [^`]+)`", text)
    }
)

_COLUMNS = b"\x19\x18\x03URL\x19\x18\x04TEXT"
PARQUET = b"PAR1" + _COLUMNS + len(_COLUMNS).to_bytes(4, "little") + b"PAR1"
"""As much of a parquet file as names its columns."""
GROUP: Any = typer.main.get_command(cli.app)


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder that has what the commands name: folders, a photograph, a mask, shards of photographs."""
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        for word in shlex.split(command)[1:]:
            path = Path(word.partition("=")[2] or word)
            if path.suffix in (".jpg", ".png", ".parquet", ".tsv000") and not str(path).startswith("runs/"):
                path.write_bytes(PARQUET if path.suffix == ".parquet" else b"photo_id\tphoto_image_url\n")
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
    verbs = {" ".join(command.split()[1:3]) for command in SHOWN["README.md"]}
    assert {"data build", "cache runs/photos/labeled", "train mini/balanced_stage1", "train mini/fc_inherit"} <= verbs


# `doctor` reads the machine and `data inspect` the samples: both only report, so they have no --dry-run.
@pytest.mark.parametrize("command", [c for c in COMMANDS if " inspect " not in c and " doctor" not in c])
def test_every_command_is_one_that_we_have(command, somewhere, monkeypatch, capsys):
    words = shlex.split(command)
    monkeypatch.setattr(sys, "argv", words if "--dry-run" in words else [*words, "--dry-run"])
    try:
        code = cli.main()
    except SystemExit as end:
        code = end.code
    assert code in (0, None), capsys.readouterr().err
    assert capsys.readouterr().out.strip()


def parameters(words: list[str]) -> tuple[str, list[str], set[str]]:
    """The command that words name, those of them left over, and its options. Fails for a word that is no command."""
    command = GROUP
    path = []
    while isinstance(command, typer.main.TyperGroup) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {' '.join([*path, words[0]])}"
        command = command.commands[words[0]]
        path.append(words.pop(0))
    return " ".join(path), words, {option for parameter in command.params for option in parameter.opts} | {"--help"}


@pytest.mark.parametrize("shown", INLINE)
def test_every_command_in_a_sentence_has_its_options(shown):
    """Names such as FOLDER stand in them, so they are not run."""
    words = [word for word in re.sub(r"[\[\]]", "", shown).split()[1:] if word not in ("...", "COMMAND")]
    _, rest, options = parameters(words)
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= options


def test_options_of_a_command_are_seen():
    assert parameters(["bench", "step", "--repeats", "8"])[0] == "bench step"
    assert "--repeats" in parameters(["bench", "step"])[2]
    with pytest.raises(AssertionError, match="no command bench nothing"):
        parameters(["bench", "nothing"])


def test_every_make_target_is_one_that_we_have():
    named = {
        target for text in PAGES.values() for target in re.findall(r"(?:`|^\$ )make (\w+)", text, flags=re.MULTILINE)
    }
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_the_tree_is_there_and_whole():
    block = README.split("## Where things are")[1].split("```")[1]
    named = []
    for line in block.strip().splitlines():
        words = re.split(r"\s{2,}", line.rstrip())[0 if not line.startswith(" ") else 1]
        root = SOURCE if line.startswith("  ") else ROOT
        named += [root / word for word in words.split()]
    assert len(named) > 10
    assert [str(path) for path in named if not path.exists()] == []
    folders = {path.parent for path in SOURCE.glob("*/__init__.py")}
    assert {path.name for path in folders - set(named)} == set()


@pytest.mark.parametrize("page", PAGES)
def test_recipes_that_a_page_names_exist(page):
    assert set(re.findall(r"`((?:mini|sd3|flux)/[a-z]+_?\w+)`", PAGES[page])) <= set(recipe_names())


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), f"{page} links {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page} links {link}"


def test_every_page_is_linked_from_the_readme():
    assert [page for page in PAGES if page != "README.md" and f"({page})" not in README] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    """`tests/test_flow.py`, `miniature/scenes.py`, `recipes/mini/rows.yaml`."""
    for name in re.findall(r"`([\w/]+\.(?:py|yaml|txt))`", PAGES[page]):
        assert (ROOT / name).exists() or (SOURCE / name).exists() or name in EXAMPLES, f"{page} names {name}"
    for name in re.findall(r"`(tests/\w+)`", PAGES[page]):
        assert (ROOT / name).exists(), f"{page} names {name}"


@pytest.mark.parametrize("page", PAGES)
def test_functions_and_recipe_fields_that_a_page_names_exist(page):
    """`losses.task_loss` is in a module, `training.ema_decay` in a recipe."""
    names = re.findall(r"`([a-z_]+(?:\.[a-z]\w+)(?:\.\w+)*)[=`]", PAGES[page])
    for section, *inner in (name.split(".") for name in names if name.split(".")[-1] not in FILE_ENDINGS):
        if recipe_fields(section) or (SOURCE / section).is_dir() or (SOURCE / f"{section}.py").exists():
            known = inner[0] in recipe_fields(section) or is_in_source(section, *inner)
            assert known, f"{page} names {'.'.join([section, *inner])}"


def recipe_fields(section: str) -> set[str]:
    """The fields of a recipe's section; those of its weights are named without the objective."""
    field = {"weights": ObjectiveConfig.model_fields["weights"]}.get(section) or Recipe.model_fields.get(section)
    return set(getattr(field.annotation, "model_fields", {})) if field else set()


def is_in_source(*names: str) -> bool:
    """Is it a module, or a class, function, method or constant that a module defines?"""
    modules = [SOURCE.joinpath(*names[:depth]).with_suffix(".py") for depth in range(1, len(names) + 1)]
    depth = next((depth for depth, path in enumerate(modules, start=1) if path.exists()), None)
    if depth is None:
        return False
    nodes: list[ast.stmt] = ast.parse(modules[depth - 1].read_text()).body
    for name in names[depth:]:
        nodes = [node for node in nodes if name in defined_names(node)]
        if not nodes:
            return False
        nodes = getattr(nodes[0], "body", [])
    return True


def defined_names(node: ast.stmt) -> set[str]:
    """The names that a statement binds."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {getattr(node, "name", "")} | {target.id for target in targets if isinstance(target, ast.Name)}


def test_names_of_code_are_looked_up():
    assert is_in_source("losses", "task_loss")
    assert is_in_source("training", "loop")
    assert is_in_source("training", "loop", "Draw", "uniforms")
    assert not is_in_source("losses", "tusk_loss")
    assert not is_in_source("training", "loops")
    assert not is_in_source("training", "loop", "Draw", "forms")


def test_the_floors_are_those_of_the_test():
    spec = importlib.util.spec_from_file_location("floors", ROOT / "tests" / "test_floors.py")
    assert spec is not None
    assert spec.loader is not None
    floors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(floors)
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", PAGES["CONTRIBUTING.md"], flags=re.MULTILINE)
    assert [set(re.findall(r"\w+", folders)) for _, folders in rows] == floors.FLOORS
    assert [int(number) for number, _ in rows] == list(range(len(floors.FLOORS)))


def test_extras_that_pages_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra
        for text in PAGES.values()
        for group in re.findall(r"'\.\[([\w,-]+)\]'", text)
        for extra in group.split(",")
    }
    assert named
    assert named <= set(extras)


def test_all_extras_are_listed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = PAGES["docs/commands.md"].split("## Extras")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == set(extras)


def test_all_exit_codes_are_listed():
    classes = [each for each in vars(errors).values() if isinstance(each, type) and hasattr(each, "exit_code")]
    listed = set(re.findall(r"^\| (\d+) \|", PAGES["docs/commands.md"], flags=re.MULTILINE))
    assert listed == {str(each.exit_code) for each in classes} | {"0", "1"}


def test_all_commands_targets_and_budgets_are_listed():
    listed_commands = set()
    first_table = PAGES["docs/commands.md"].split("\n## ")[0]
    for cell in re.findall(r"^\| (`.*?) \|", first_table, flags=re.MULTILINE):
        first, *others = re.findall(r"`([\w ]+)`", cell)
        group = first.partition(" ")[0]
        listed_commands |= {first, *(f"{group} {other}" for other in others)}
    groups = {name: command.commands for name, command in GROUP.commands.items() if hasattr(command, "commands")}
    commands = set(GROUP.commands) - set(groups) | {f"{name} {inner}" for name in groups for inner in groups[name]}
    assert listed_commands == commands

    page = PAGES["docs/reproduce.md"]
    targets = get_args(get_type_hints(reproduce)["target"])
    assert set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) - {"mini", "sd3"} == set(targets)

    cells = re.findall(r"^\| `(mini|sd3)` \| (.*?) \|", page, flags=re.MULTILINE)
    listed = {(scale, budget) for scale, names in cells for budget in re.findall(r"`(\w+)`", names)}
    files = {scale: yaml.safe_load((RECIPES / scale / "budgets.yaml").read_text()) for scale in ("mini", "sd3")}
    assert listed == {(scale, budget) for scale, budgets in files.items() for budget in budgets}
