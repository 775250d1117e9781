"""The sdist and the wheel are whole: the package works where nothing of the repository is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refine_control.cli.doctor import EXTRAS

ROOT = Path(__file__).parent.parent
LARGEST_WHEEL = 50e6
"""Bytes."""
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tar")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist and with the wheel that is built of it, without a network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The bin folder of a new environment that has the wheel, and the libraries of the running one by a .pth file."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (wheel,) = built.glob("*.whl")
    given = ["--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", *given], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin"


def run(command: Path, *words: str | Path, cwd: Path) -> str:
    """The output of an installed command that sees nothing of the checkout."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    out = subprocess.run([command, *words], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_the_wheel_is_small_and_holds_the_package_alone(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < LARGEST_WHEEL
    with zipfile.ZipFile(wheel) as archive:
        names, metadata = archive.namelist(), archive.read(next(n for n in archive.namelist() if "/METADATA" in n))
    assert {re.sub(r"-.*", "", name.partition("/")[0]) for name in names} == {"refine_control"}
    assert [name for name in names if name.endswith(PICTURES) or "/test" in name] == []
    assert b"# refine-control" in metadata


def test_the_sdist_holds_what_tests_and_docs_need_and_no_photographs_of_others(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "Makefile", "constraints.txt", "mkdocs.yml", "README.md", "CITATION.cff", "LICENSE"}
    assert needed | {"tests/conftest.py", "docs/concepts.md", "src/refine_control/cli/app.py"} <= names
    assert [name for name in names if name.startswith(("docs/photos", "runs", "build", ".ci"))] == []


def test_a_clean_environment_has_the_package_and_its_data(installed, tmp_path):
    code = "import refine_control; print(refine_control.__file__)"
    assert str(installed.parent) in run(installed / "python", "-c", code, cwd=tmp_path)
    assert "inpaint" in run(installed / "refine-control", "--help", cwd=tmp_path)
    recipe = run(installed / "refine-control", "train", "mini/balanced_stage1", "--dry-run", cwd=tmp_path)
    assert "num_layers: 12" in recipe


@pytest.mark.slow
def test_a_clean_environment_is_diagnosed_and_inpaints(installed, tmp_path):
    report = run(installed / "refine-control", "doctor", cwd=tmp_path)
    assert "missing " not in report
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[20:44, 20:44] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ["--controlnet", "edge", "--prompt", "a red circle", "--image", "photo.png", "--mask", "mask.png"]
    run(installed / "refine-control", "inpaint", *words, "--out", "painted.png", cwd=tmp_path)
    painted = np.asarray(Image.open(tmp_path / "painted.png"), int)
    region = painted[26:38, 26:38].reshape(-1, 3).mean(0)
    assert region[0] > region[1:].max() + 40  # red


def test_each_extra_serves_code():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(extras) - {"dev"}
    sources = [path for path in (ROOT / "src").rglob("*.py") if path.name != "doctor.py"]
    texts = "\n".join(path.read_text() for path in [*sources, *ROOT.glob("docs/*.py"), ROOT / "mkdocs.yml"])
    unused = {module for modules in EXTRAS.values() for module in modules if not re.search(rf"\b{module}\b", texts)}
    assert unused == set()
