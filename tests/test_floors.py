"""Laws of the house that a reader cannot see in one file: who may import whom, and what may be skipped."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "refine_control"

# A folder imports from itself and from folders on lower floors, never from a folder on its own floor or above. The
# modules that lie in no folder are the ground: the mathematics, the records, files, seeds and errors.
GROUND = "ground"
FLOORS = [
    {GROUND},
    {"models", "metrics"},
    {"conditions", "runtime"},
    {"photos"},
    {"pipeline", "annotation"},
    {"cache"},
    {"training", "baselines"},
    {"miniature"},
    {"export"},
    {"study", "bench", "app"},
    {"cli"},
]
# What the package itself offers to users, imported when it is first used.
OFFERED = {"": {"pipeline.inpainter"}}
LARGEST_SHARE = 1 / 5  # of all lines, for one folder

# A foreign library enters by these doors alone; by none, it does not enter.
DOORS = {
    "diffusers": ["models", "pipeline", "baselines", "miniature.networks", "bench.step", "export"],
    "transformers": [
        "models",
        "pipeline",
        "baselines",
        "annotation",
        "metrics.features",
        "miniature.networks",
        "conditions.depth",
        "conditions.pose",
    ],
    "accelerate": ["training", "models.components"],
    "peft": ["models.own_transformer"],
    "huggingface_hub": ["models.hub", "metrics.features.weights", "export"],
    "typer": ["cli"],
    "pydantic": ["config", "recipe_files", "study.plan"],
    "yaml": ["strict_yaml"],
    "ray": ["annotation.engines"],
    "fastapi": ["annotation.review", "app"],
    "uvicorn": ["local_server"],
    "httpx": ["annotation.vlm_server"],
    "skimage": ["annotation.offline_masks", "annotation.masks", "conditions.canny"],
    "onnx": ["export"],
    "onnxscript": ["export"],
    "onnxruntime": ["runtime", "export"],
    "openvino": ["runtime", "export"],
    "nncf": ["export"],
    "torchao": ["export", "training.optimizer"],
    "tokenizers": ["runtime", "miniature.networks", "export.web"],
    "gradio": ["app"],
    "torchvision": [],
    "pickle": [],
}


def name_of(path: Path) -> str:
    """`miniature/scenes.py` is data.scenes, `data/__init__.py` is data."""
    return ".".join(part for part in path.relative_to(SOURCE).with_suffix("").parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def folder_of(module: str) -> str:
    folder, dot, _ = module.partition(".")
    is_folder = dot or (module in MODULES and MODULES[module].name == "__init__.py" and module)
    return folder if is_folder else GROUND


def floor_of(module: str) -> int | None:
    return next((number for number, floor in enumerate(FLOORS) if folder_of(module) in floor), None)


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
def test_a_module_imports_from_its_own_folder_or_a_lower_floor(module):
    floor = floor_of(module)
    assert floor is not None, f"the folder of {module} is on no floor; add it to FLOORS"
    others = {name for name in ours(imported_by(module)) if folder_of(name) != folder_of(module)}
    others -= OFFERED.get(module, set())
    assert {name for name in others if (floor_of(name) or 0) >= floor} == set(), f"{module} is on floor {floor}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: ours(imported_by(module)) & MODULES.keys() - {module} for module in MODULES}
    graph = {module: names - OFFERED.get(module, set()) for module, names in graph.items()}
    while leaves := {module for module, names in graph.items() if not names & graph.keys()}:
        graph = {module: names for module, names in graph.items() if module not in leaves}
    assert graph == {}


def test_no_folder_holds_more_than_a_fifth_of_the_lines():
    lines: dict[str, int] = {}
    for module, path in MODULES.items():
        lines[folder_of(module)] = lines.get(folder_of(module), 0) + len(path.read_text().splitlines())
    total = sum(lines.values())
    assert {folder: count for folder, count in lines.items() if count > LARGEST_SHARE * total} == {}


@pytest.mark.parametrize("library", DOORS)
def test_a_foreign_library_has_its_doors(library):
    users = {name for name in MODULES if any(within(imported, library) for imported in imported_by(name))}
    assert {name for name in users if not any(within(name, door) for door in DOORS[library])} == set()


def test_an_import_is_seen_wherever_and_however_it_is_written():
    code = """
import diffusers.models
from refine_control.models import devices
from refine_control.errors import MissingError
def lazily():
    from .. import flow
    from . import __version__
    from ..models.card import BUNDLE
"""
    assert set(imports(ast.parse(code), "training.loop", is_package=False)) == {
        "diffusers.models",
        "refine_control.models.devices",
        "refine_control.errors",
        "refine_control.flow",
        "refine_control.training",
        "refine_control.models.card",
    }
    assert floor_of("errors") == 0
    assert floor_of("cache.reader") == floor_of("cache") == 5
    assert floor_of("nowhere.at_all") is None


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


# Size of functions, and records where the keys of a mapping are known.

LONGEST_FUNCTION = 60
LONG_FUNCTIONS = {"training.loop.fit"}  # the one loop reads best as one screen after another
UNTYPED_MAPPINGS = 60


def functions(module: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{module}.{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_function_but_the_loop_is_longer_than_sixty_lines():
    lengths = {name: length for module in MODULES for name, length in functions(module) if length > LONGEST_FUNCTION}
    assert {name: length for name, length in lengths.items() if name not in LONG_FUNCTIONS} == {}


def test_mappings_without_known_keys_are_few():
    counts = {module: path.read_text().count("dict[str, Any]") for module, path in MODULES.items()}
    assert sum(counts.values()) < UNTYPED_MAPPINGS, {module: count for module, count in counts.items() if count}
