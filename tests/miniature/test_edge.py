"""The shipped student for few steps, and how one is published."""

import json

import numpy as np
import pytest

from refine_control.errors import InvalidInputError
from refine_control.miniature import edge
from refine_control.miniature.check import measure_skill
from refine_control.miniature.obedience import load_classifier
from refine_control.models.card import BUNDLE, CARD, EDGE, read_card
from refine_control.models.loading import load_controlnet, save_controlnet
from refine_control.storage import read_manifest


def test_the_shipped_student_is_what_its_manifest_and_card_say():
    read_manifest(EDGE)
    card, controlnet = read_card("edge"), load_controlnet("edge")
    assert len(controlnet.transformer_blocks) == 12
    assert card.sampling.guidance_scale == 1
    assert card.sampling.num_inference_steps == card.most_steps == 4
    assert card.license == "Apache-2.0"
    assert set(card.skill) == {"teacher, 20 guided steps", "teacher, 4 guided steps", "1 step", "2 steps", "4 steps"}
    teacher = card.skill["teacher, 20 guided steps"]["both"]
    assert all(card.skill[way]["both"] >= 0.96 * teacher for way in ("1 step", "2 steps", "4 steps"))
    assert sum(path.stat().st_size for path in EDGE.rglob("*") if path.is_file()) < 5e6


@pytest.mark.parametrize("steps", [1, 4])
def test_the_shipped_student_obeys_without_guidance(steps):
    backbone, sampler = edge.load_backbone("mini"), edge.few_sampler(read_card("edge"), steps)
    skill = measure_skill(backbone, load_classifier(BUNDLE), 32, 3, "local", sampler, load_controlnet("edge"))
    assert skill["both"] >= 85  # chance is 2


def test_what_is_published_is_the_student_in_fp16_with_what_was_measured(tmp_path, monkeypatch):
    seen = []

    def measure(backbone, classifier, count, seed, prompts, sampler, controlnet):
        steps = sampler.num_inference_steps
        seen.append((steps, sampler.guidance_scale > 1, controlnet is not None, count, prompts))
        return {"both": float(steps)}

    monkeypatch.setattr(edge, "measure_skill", measure)
    backbone = edge.load_backbone("mini")
    recipe = {"name": "mini/edge", "training": {"seed": 5, "steps": 7}}
    bare = read_card("edge").model_copy(update={"skill": None, "license": None, "trained_by": None})
    student = load_controlnet("edge")
    save_controlnet(
        student, tmp_path / "run" / "student", 24, card=bare, backbone=backbone, kind="student", recipe=recipe
    )
    card = edge.publish_edge(tmp_path / "run", tmp_path / "out", count=3)
    assert seen == [(20, True, False, 3, "local"), (4, True, False, 3, "local")] + [
        (n, False, True, 3, "local") for n in (1, 2, 4)
    ]
    assert card.skill["2 steps"] == {"both": 2.0}
    assert card.trained_by == "mini/edge, seed 5, 7 steps"
    assert json.loads((tmp_path / "out" / CARD).read_text())["skill"] == card.skill
    published = load_controlnet(tmp_path / "out")
    for name, tensor in student.state_dict().items():
        np.testing.assert_array_equal(published.state_dict()[name], tensor.half().float())


def test_only_students_for_few_steps_are_published(tmp_path, tiny_student):
    save_controlnet(tiny_student(1), tmp_path / "student", 24, kind="student")
    with pytest.raises(InvalidInputError, match="is no student for few steps; train one by mini/edge"):
        edge.publish_edge(tmp_path / "student", tmp_path / "out")
    assert not (tmp_path / "out").exists()
