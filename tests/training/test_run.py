"""`train` from a recipe to a student folder: once, again, and by two processes."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import SD3ControlNetModel
from safetensors.torch import load_file

from refine_control.config import Recipe
from refine_control.data.cache import write_cache
from refine_control.data.records import LABELED
from refine_control.data.scene_shards import scene_photos
from refine_control.errors import InvalidInputError
from refine_control.models.loading import load_backbone
from refine_control.storage import write_json
from refine_control.training.run import train

CODE = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from refine_control.config import Recipe
from refine_control.training.loop import leave_process_group
from refine_control.training.run import train
train(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
leave_process_group()
"""


@pytest.fixture(scope="module")
def recipe(tiny_backbone, tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    tiny_backbone.pipeline.save_pretrained(root / "tiny")
    write_json(root / "tiny" / "refine_control.json", {"max_sequence_length": 0})
    backbone = load_backbone(root / "tiny")
    write_cache(list(scene_photos(0, 0, 6)), root / "cache", backbone, LABELED, source={})
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": str(root / "tiny"),
            "student": {"num_layers": 2},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 2, "batch_size": 4, "log_every": 1},
            "data": {"labeled": str(root / "cache")},
        }
    )


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    return train(recipe, tmp_path_factory.mktemp("runs") / "tiny")


def test_the_student_is_a_folder_that_stock_diffusers_loads(recipe, trained):
    student = SD3ControlNetModel.from_pretrained(trained.student)
    assert student.config["num_layers"] == 2
    manifest = json.loads((trained.student / "manifest.json").read_text())
    assert manifest["recipe"] == recipe.model_dump(mode="json")
    assert (manifest["kind"], manifest["steps"], trained.steps) == ("student", 2, 2)
    assert torch.cat([p.detach().flatten() for p in student.controlnet_blocks.parameters()]).any()


def test_the_same_command_again_does_nothing_and_another_recipe_is_refused(recipe, trained):
    run_dir = trained.student.parent
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.is_file()}
    assert train(recipe, run_dir) == (trained.student, 2, 0.0)
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.is_file()} == before
    with pytest.raises(InvalidInputError, match="another recipe"):
        train(recipe.model_copy(update={"name": "other"}), run_dir)


def test_two_processes_make_the_student_of_one(recipe, trained, tmp_path):
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    (tmp_path / "train.py").write_text(CODE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(tmp_path / "train.py"), str(tmp_path / "recipe.json"), str(tmp_path / "two")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert run.returncode == 0, run.stderr
    one, two = (
        load_file(f / "diffusion_pytorch_model.safetensors") for f in (trained.student, tmp_path / "two/student")
    )
    assert one.keys() == two.keys()
    # AdamW's first steps are as long for a gradient of rounding as for any: compared where gradients are not tiny
    close = [torch.isclose(one[k], two[k], rtol=1e-3, atol=1e-4).float().mean().item() for k in one]
    assert sum(close) / len(close) > 0.99
