"""`mini train --condition`: a teacher for another condition, published beside the bundle that it was trained on."""

import json

import pytest
from diffusers import SD3ControlNetModel
from typer.testing import CliRunner

from refine_control.cli.app import app
from refine_control.conditions.condition import own_condition
from refine_control.errors import InvalidInputError
from refine_control.miniature import stages
from refine_control.miniature.condition_teacher import train_condition_teacher
from refine_control.miniature.stages import CONDITION, Stage, condition_stage
from refine_control.models.card import read_card
from refine_control.models.loading import load_controlnet
from refine_control.storage import read_manifest, write_json


def mini_train(*arguments):
    result = CliRunner().invoke(app, ["mini", "train", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.mark.slow
def test_two_steps_publish_a_teacher_with_a_card_and_are_not_done_again(tiny_backbone, tmp_path, monkeypatch):
    tiny_backbone.pipeline.save_pretrained(tmp_path / "tiny")
    write_json(tmp_path / "tiny" / "refine_control.json", {"max_sequence_length": 0})
    monkeypatch.setattr(stages, "CONDITION", Stage(2, 2, 1e-3, 0.9))
    given = ("--from", tmp_path / "tiny", "--stage", "condition=2", "--check", 2, "--out", tmp_path / "out")
    code, output = mini_train("--condition", "canny", *given)
    assert code == 0, output
    folder = tmp_path / "out" / "controlnet"
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "diffusion_pytorch_model.safetensors", "manifest.json"),
        *("README.md", "refine_control.json", "scheduler"),
    }
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"controlnet", "work"}
    assert read_manifest(folder)["kind"] == "teacher"
    assert SD3ControlNetModel.from_pretrained(folder).config["condition"] == "canny"
    teacher, card = load_controlnet(str(folder)), read_card(folder)
    assert own_condition(teacher.config) == card.condition == "canny"
    assert len(teacher.transformer_blocks) == 23
    assert set(card.skill) == {"20 guided steps", "without the condition"}
    assert set(card.skill["20 guided steps"]) == {"edge_f1", "psnr"}
    assert "mini train --condition canny, seed 0, 2 steps of 2" in card.trained_by
    readme = (folder / "README.md").read_text()
    assert "StableDiffusion3ControlNetPipeline.from_pretrained" in readme
    assert "control_mask" not in readme
    weights = tmp_path / "out" / "work" / "teacher" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    same = {"start": tmp_path / "tiny", "stage": Stage(2, 2, 1e-3, 0.9), "count": 0}
    again = train_condition_teacher("canny", tmp_path / "out", **same)
    assert again["condition"] == "canny"
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(InvalidInputError, match="trained with other steps, seed, start or images"):
        train_condition_teacher("depth", tmp_path / "out", **same)


@pytest.mark.parametrize("stage", ["teacher=5", "condition", "condition=0"])
def test_another_stage_than_the_condition_s_is_refused(stage):
    with pytest.raises(
        InvalidInputError, match=f"--stage {stage}: a condition is trained in one stage; give condition="
    ):
        condition_stage([stage])


def test_a_teacher_of_no_condition_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InvalidInputError, match="there is no condition 'cany'"):
        train_condition_teacher("cany", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_teacher_of_inpainting_is_a_stage_of_the_bundle(tmp_path):
    with pytest.raises(InvalidInputError, match="train it with --stage teacher"):
        train_condition_teacher("inpaint", tmp_path / "out")
    assert condition_stage(["condition=7"]) == CONDITION._replace(steps=7)


def test_a_dry_run_writes_nothing(tmp_path):
    code, output = mini_train("--condition", "pose", "--out", tmp_path / "out", "--dry-run", "--json")
    assert code == 0
    planned = json.loads(output)
    assert (planned["condition"], planned["stages"]["condition"]["steps"]) == ("pose", CONDITION.steps)
    assert not (tmp_path / "out").exists()
