"""Each failure is reported by its sentence if its interval excludes zero; a good student has none."""

import pytest

from refine_control.metrics.statistics import Interval
from refine_control.recipe_files import load_recipe
from refine_control.study.signatures import (
    INIT,
    NORMALISED,
    X0,
    advised_once,
    prompt_signature,
    signatures,
    stage_signature,
)


def behind(excludes: bool = True, **means: float):
    return {m: Interval(v, v - (0.01 if excludes else 100), v + 0.01) for m, v in means.items()}


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ({"psnr": 5.4, "psnr_region": 2.0}, "the part to keep changes"),
        ({"psnr": 0.5, "psnr_region": 3.0}, "the masked region is hardly controlled"),
        ({"both": 35.0, "psnr": 2.0, "psnr_region": 2.0, "ssim": 0.2}, "obeys 35 points less"),
        ({"both": 3.0, "ssim": 0.08, "psnr": 1.0, "psnr_region": 1.0}, "blurry or incoherent"),
    ],
)
def test_each_failure_has_its_sentence(lacks, says):
    (sentence,) = signatures("ours", behind(**lacks))
    assert says in sentence
    assert sentence.startswith("ours ")


@pytest.mark.parametrize("lacks", [{"psnr": 0.4, "psnr_region": 0.4, "both": 2.0, "ssim": 0.01}, {"both": -20.0}, {}])
def test_a_good_student_has_none(lacks):
    assert signatures("ours", behind(**lacks)) == []


def test_what_is_not_distinguishable_from_zero_is_not_reported():
    assert signatures("ours", behind(False, psnr=5.4, psnr_region=2.0, both=30.0, ssim=0.2)) == []
    assert stage_signature(behind(False, both=20.0)) == []
    assert prompt_signature("ours", behind(False, interference=30.0)) == []


def test_a_second_stage_that_harms_and_a_global_prompt_that_confuses():
    (sentence,) = stage_signature(behind(psnr_region=0.7, both=16.0, psnr=3.0))
    assert "0.7 dB and 16.0 points" in sentence
    assert stage_signature(behind(psnr_region=-0.7)) == []
    assert "22 points more often" in prompt_signature("the teacher", behind(interference=22.0))[0]
    assert prompt_signature("the teacher", behind(interference=4.0)) == []


def test_the_same_advice_is_given_once():
    sentences = [s for name in ("fc", "ours") for s in signatures(name, behind(both=35.0, psnr=5.0, psnr_region=1.0))]
    kept, obeyed = advised_once(sentences)
    assert len(sentences) == 4
    assert kept.startswith("fc is 5.0 dB")
    assert "; ours is 5.0 dB" in kept
    assert obeyed.startswith(
        "fc obeys 35 points less than the teacher; ours obeys 35 points less than the teacher. Try"
    )
    assert advised_once([]) == []


def advice(*recipes: str) -> str:
    lacks = behind(both=35.0, psnr=5.0, psnr_region=1.0)
    return " ".join(signatures("ours", lacks, [load_recipe(name) for name in recipes]))


def test_what_a_student_does_already_is_not_advised():
    unknown = advice()
    for choice in (INIT, X0, NORMALISED, "weights.output above 0"):
        assert choice in unknown
    paper = advice("mini/ours_stage1", "mini/ours_stage2")
    assert "Try more steps, init: teacher, x0_source: teacher in stage 2, feature_normalisation: layer." in paper
    assert "weights.output above 0" not in paper
    inherit = advice("mini/inherit_stage1", "mini/inherit_stage2")
    assert "Try more steps, feature_normalisation: layer." in inherit
    assert advice("mini/balanced_stage1", "mini/balanced_stage2").endswith("Try more steps.")


def test_who_has_no_teacher_and_no_second_stage_is_not_advised_about_them():
    assert advice("mini/fc").endswith("Try more steps, init: teacher.")
    assert "weights.output above 0" in advice("mini/fc_inherit")


def test_blurry_and_a_harmful_second_stage_by_what_was_tried():
    blurry, harmed = behind(ssim=0.08, psnr=1.0, psnr_region=1.0), behind(psnr_region=0.7)
    for name, expected in (("ours", True), ("balanced", False)):
        recipes = [load_recipe(f"mini/{name}_stage{n}") for n in (1, 2)]
        assert (NORMALISED in signatures("ours", blurry, recipes)[0]) == expected
        assert (X0 in stage_signature(harmed, recipes)[0]) == expected
