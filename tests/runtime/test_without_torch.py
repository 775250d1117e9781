"""An exported pipeline paints where neither torch nor diffusers nor transformers can be imported."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import refine_control
from refine_control.conditions.condition import Shown
from refine_control.config import SamplerConfig
from refine_control.pipeline.painting import paint

NEEDED = ("numpy", "onnxruntime", "tokenizers", "pydantic", "pyyaml", "pillow", "typer")
ABSENT = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "scipy", "onnx")

PAINT = """
import importlib.util, sys
import numpy as np
from refine_control.config import SamplerConfig
from refine_control.runtime.exported import ExportedPipeline

assert not [name for name in sys.argv[4].split() if importlib.util.find_spec(name)]
given = np.load(sys.argv[2])
sampler = SamplerConfig.model_validate_json(sys.argv[3])
pipeline = ExportedPipeline(sys.argv[1], threads=1)
np.save(sys.argv[2] + ".painted.npy", pipeline.paint(given["image"], given["mask"], "a red circle", sampler))
"""
COMMAND = "import sys; from refine_control.cli.app import main; sys.exit(main())"


def needed_distributions(names: tuple[str, ...]) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions of these names and all that they require."""
    known: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        if (name := canonicalize_name(waiting.pop())) in known:
            continue
        known[name] = importlib.metadata.distribution(name)
        required = map(Requirement, known[name].requires or ())
        waiting += [each.name for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    return known


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(code, *arguments)`: Python that sees these distributions and this package, and nothing else."""
    site = tmp_path_factory.mktemp("site")
    (site / "refine_control").symlink_to(Path(refine_control.__file__).parent)
    for distribution in needed_distributions(NEEDED).values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))

    def start(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        code = f"import sys; sys.path.insert(0, {str(site)!r})\n{code}"
        command = [sys.executable, "-I", "-S", "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]})

    return start


def test_a_model_with_t5_paints_without_torch(run, sd3, trace_exported, tmp_path):
    backbone, student = sd3(with_t5=True)
    sampler = SamplerConfig(num_inference_steps=2, guidance_scale=3, seed=4, sigmas="even")
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[9:40, 20:51] = True
    folder = trace_exported(backbone, student, image, mask, "a red circle", sampler)
    given = tmp_path / "given.npz"
    np.savez(given, image=image, mask=mask)
    result = run(PAINT, str(folder), str(given), sampler.model_dump_json(), " ".join(ABSENT))
    assert result.returncode == 0, result.stderr
    painted = np.load(f"{given}.painted.npy")
    expected = paint(backbone, student, Shown(image[None], mask[None]), ["a red circle"], sampler)[0]
    assert np.abs(painted.astype(int) - expected).max() <= 1


def test_the_command_line_answers_without_torch(run):
    answered = run(COMMAND, "--help")
    assert answered.returncode == 0, answered.stderr
    assert "inpaint" in answered.stdout
    refused = run(COMMAND, "mini", "check")
    assert (refused.returncode, refused.stderr) == (
        69,
        "refine-control: torch is not installed; run pip install refine-control\n",
    )
