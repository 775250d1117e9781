"""Laws of the house that a reader cannot see in one file: who may import whom, and what may be skipped."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "refine_control"

# A module may import from its own floor or a lower one. The longest prefix decides.
FLOORS = {
    **dict.fromkeys(
        ["", "errors", "storage", "comparison", "config", "recipe_files", "strict_yaml", "randomness", "pixels"], 0
    ),
    **dict.fromkeys(["flow", "injection", "losses"], 0),
    **dict.fromkeys(["data.records", "data.vocabulary"], 0),
    **dict.fromkeys(["models", "data"], 1),
    **dict.fromkeys(["evaluation.features", "evaluation.metrics", "evaluation.statistics", "evaluation.pictures"], 1),
    **dict.fromkeys(
        [
            "training",
            "pipeline",
            "data.cache",
            "data.cache_writer",
            "data.annotate",
            "data.annotator",
            "evaluation.bounds",
            "evaluation.cost",
            "evaluation.obedience",
        ],
        2,
    ),
    **dict.fromkeys(["evaluation", "export", "app"], 3),
    **dict.fromkeys(["cli", "cli_data", "cli_evaluation", "cli_options", "cli_output", "doctor"], 4),
}

# A foreign library enters by these doors alone; by none, it does not enter.
DOORS = {
    "diffusers": ["models", "pipeline", "training.bench"],
    "transformers": ["models", "pipeline", "evaluation.features"],
    "accelerate": ["training"],
    "typer": ["cli", "cli_data", "cli_evaluation", "cli_options"],
    "pydantic": ["config", "recipe_files", "comparison"],
    "yaml": ["strict_yaml"],
    "ray": ["data.engines"],
    "fastapi": ["data.review"],
    "uvicorn": ["data.review"],
    "httpx": ["data.vlm_server"],
    "skimage": ["data.offline_masks", "data.masks"],
    "gradio": ["app"],
    "torchvision": [],
    "pickle": [],
}


def name_of(path: Path) -> str:
    """`data/scenes.py` is data.scenes, `data/__init__.py` is data."""
    return ".".join(part for part in path.relative_to(SOURCE).with_suffix("").parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def floor_of(module: str) -> int | None:
    prefixes = [prefix for prefix in FLOORS if (within(module, prefix) if prefix else not module)]
    return FLOORS[max(prefixes, key=len)] if prefixes else None


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names of everything imported anywhere in the file, lazily or not; ours as refine_control.x."""
    package = ["refine_control", *module.split(".")] if module else ["refine_control"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + is_package] if node.level else []
            base = ".".join([*up, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                ours = base.removeprefix("refine_control").lstrip(".")
                inner = f"{ours}.{alias.name}".lstrip(".")
                is_module = within(base, "refine_control") and inner in MODULES
                yield f"{base}.{alias.name}" if is_module else base


def imported_by(module: str) -> set[str]:
    path = MODULES[module]
    return set(imports(ast.parse(path.read_text()), module, path.name == "__init__.py"))


def ours(names: set[str]) -> set[str]:
    return {name.removeprefix("refine_control").lstrip(".") for name in names if within(name, "refine_control")}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_own_floor_or_lower(module):
    own = floor_of(module)
    assert own is not None, f"{module} stands on no floor; give it one in FLOORS"
    above = {name: floor_of(name) for name in ours(imported_by(module)) if (floor_of(name) or 0) > own}
    assert above == {}, f"{module} is on floor {own}"


@pytest.mark.parametrize("module", [name for name in MODULES if floor_of(name) == 1])
def test_the_rooms_of_the_first_floor_do_not_import_each_other(module):
    room = module.partition(".")[0]
    others = {name for name in ours(imported_by(module)) if floor_of(name) == 1 and name.partition(".")[0] != room}
    assert others == set()


@pytest.mark.parametrize("library", DOORS)
def test_a_foreign_library_has_its_doors(library):
    users = {name for name in MODULES if any(within(imported, library) for imported in imported_by(name))}
    assert {name for name in users if not any(within(name, door) for door in DOORS[library])} == set()


def test_an_import_is_seen_wherever_and_however_it_is_written():
    code = """
import diffusers.models
from refine_control.data import vocabulary
from refine_control.errors import MissingError
def lazily():
    from .. import flow
    from . import __version__
    from ..models.mini import build_vae
"""
    assert set(imports(ast.parse(code), "training.loop", is_package=False)) == {
        "diffusers.models",
        "refine_control.data.vocabulary",
        "refine_control.errors",
        "refine_control.flow",
        "refine_control.training",
        "refine_control.models.mini",
    }
    assert floor_of("data.cache") == 2
    assert floor_of("data.scenes") == 1
    assert floor_of("nowhere") is None


def test_no_file_is_a_drawer():
    drawers = {"utils", "util", "common", "helpers", "misc"}
    assert [module for module in MODULES if drawers & set(module.split("."))] == []


# A skip that the list does not name is a failure: of a test, and of a whole file.

SKIPPED = """
import pytest
def test_gpu():
    pytest.skip("no GPU")
@pytest.mark.skip(reason="later")
@pytest.mark.parametrize("n", [1, 2])
def test_later(n):
    pass
"""


@pytest.mark.parametrize(
    ("content", "allowed", "code"),
    [
        (SKIPPED, "", 1),
        (SKIPPED, "test_it.py::test_gpu # needs a GPU", 1),
        (SKIPPED, "test_it.py::test_gpu\ntest_it.py::test_later", 0),
        ("import pytest\npytest.importorskip('no_such_module')\ndef test_it(): pass", "", 2),
        ("import pytest\n@pytest.mark.xfail\ndef test_it(): assert False", "", 0),
        ("def test_it(): pass", "", 0),
    ],
    ids=["none", "one", "both", "file", "xfail", "nothing skipped"],
)
def test_a_skip_that_is_not_listed_fails_the_run(tmp_path, content, allowed, code):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "allowed_skips.txt").write_text(f"# a comment\n{allowed}\n")
    (tmp_path / "test_it.py").write_text(content)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "torch.py").write_text("def set_num_threads(n): pass  # stands in for seconds of import\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == code, run.stdout
    assert ("does not name it" in run.stdout) == (code != 0)
