"""A card says what was measured, with intervals, and nothing that nobody stated."""

import ast
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from refine_control.config import SamplerConfig, StudentCard
from refine_control.errors import InvalidInputError
from refine_control.export.card_facts import (
    _MARK,
    Run,
    describe_data,
    public_name,
    public_recipe,
    read_evaluation,
    refuse_private,
)
from refine_control.export.model_card import model_card
from refine_control.recipe_files import load_recipe
from refine_control.storage import sha256_file, write_json
from refine_control.study.evaluate import _hashed
from refine_control.study.row_tables import HEADINGS

SD3, TEACHER = "stabilityai/stable-diffusion-3-medium-diffusers", "alimama-creative/SD3-Controlnet-Inpainting"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def run(trained):
    """A student of SD3 with its evaluation."""
    recipe = load_recipe("sd3/ours_stage1")
    measured = read_evaluation(trained.evaluation, trained.student / WEIGHTS)
    config = {"num_layers": 12}
    return Run("me/it", config, 1234, SamplerConfig(), recipe, 7, None, SD3, HEADINGS, evaluated=measured)


def parsed(card: str) -> ModelCardData:
    """The front matter as the hub's own class reads it, every fault of it an error."""
    data = ModelCard(card, ignore_metadata_errors=False).data
    assert isinstance(data, ModelCardData)
    return data


def test_the_front_matter_is_read_back_by_the_hubs_own_class(run):
    data = parsed(model_card(run))
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("diffusers", "image-to-image", "it")
    assert data.base_model == [SD3, TEACHER]
    assert (data.license, data.license_name) == ("other", "stabilityai-ai-community")
    psnr, both = data.eval_results or ()
    assert (psnr.metric_type, psnr.metric_name, psnr.metric_value) == ("psnr", "PSNR dB", 18.5)
    assert psnr.metric_args == {"interval_95": [17.5, 20.5], "samples": 20}
    assert (psnr.dataset_name, psnr.dataset_revision) == ("photographs, 20 held-out samples", "a" * 16)
    assert (both.metric_type, both.metric_value) == ("both", 40.0)


def test_the_text_has_each_metric_with_its_interval_beside_the_teachers(run):
    card = model_card(run)
    assert "| PSNR dB | 18.5 [17.5, 20.5] | 24 [23, 26] | 6 [5, 8] |" in card
    assert "| both obeyed % | 40 [39, 42] |  |  |" in card
    assert "95 % bootstrap interval; test set: photographs, 20 held-out samples" in card
    assert f"| base model | `{SD3}` | Stability AI Community License |" in card
    assert f"| teacher | `{TEACHER}` | Stability AI Community License |" in card
    assert "A ControlNet of 12 layers and 1,234 parameters for inpainting" in card
    assert "Its teacher has 23 layers and 3,000 parameters" in card
    assert "28 steps with guidance | 56 |" in card
    assert "| ms a pass (x86_64, cpu) | 250 |" in card
    assert "![Pictures of the test set, side by side](grid.png)" in card


def test_what_nobody_stated_is_not_invented(run):
    card = model_card(replace(run, model=None, evaluated=None))
    data = parsed(card)
    assert (data.license, data.eval_results) == (None, None)
    assert "| base model | not stated | not stated |" in card
    assert "Licence of these weights: not stated." in card
    assert "No evaluation came with this model." in card
    assert "grid.png" not in card
    assert "ComfyUI" not in card


def test_a_card_without_an_evaluation_has_what_the_students_own_card_says(run):
    skill = {"teacher, 4 guided steps": {"both": 97.0}, "4 steps": {"both": 95.5, "psnr": 25.25}}
    own = StudentCard(sampling=SamplerConfig(), most_steps=4, distilled_guidance=3.0, skill=skill)
    card = model_card(replace(run, evaluated=None, card=own))
    results = parsed(card).eval_results
    assert [(each.metric_type, each.metric_value, each.metric_config) for each in results or ()] == [
        ("psnr", 25.25, "4 steps"),
        ("both", 95.5, "4 steps"),
    ]
    assert "| 4 steps | 95.5 |" in card
    assert "no intervals were recorded" in card
    assert "- trained for at most 4 steps\n- guidance scale 3 is distilled in\n" in card


@pytest.mark.parametrize("condition", ["inpaint", "canny"])
@pytest.mark.parametrize("model", ["mini", SD3, None])
def test_every_program_of_a_card_is_python_and_names_the_repository(run, condition, model):
    changed = {"model": model, "config": {"num_layers": 12, "condition": condition}, "scheduler": "SomeScheduler"}
    card = model_card(replace(run, **changed))
    programs = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(programs) == (2 if condition == "inpaint" else 1)
    for program in programs:
        ast.parse(program)
        assert '"me/it"' in program
    assert ("ControlNetInpaintingPipeline" in programs[-1]) == (condition == "inpaint")
    assert 'SomeScheduler.from_pretrained("me/it", subfolder="scheduler")' in programs[-1]
    assert (f'"{SD3}"' in programs[-1]) == (model == SD3)
    assert ("BUNDLE as MODEL" in programs[-1]) == (model == "mini")


def test_the_warning_about_stock_diffusers_stands_above_its_code(run):
    card = model_card(replace(run, warning="stock diffusers injects it shifted"))
    assert "Warning: stock diffusers injects it shifted.\n\n```python\nfrom diffusers" in card


def test_an_evaluation_of_other_weights_is_refused(trained, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other")
    with pytest.raises(InvalidInputError, match=r"is no evaluation of .*: it measured other weights as mine"):
        read_evaluation(trained.evaluation, other)


@pytest.mark.parametrize("content", ["{}", "[]", "no", '{"models": {"a": 1}}'])
def test_an_evaluation_that_cannot_be_read_is_refused(trained, tmp_path, content):
    shutil.copytree(trained.evaluation, tmp_path / "evaluation")
    (tmp_path / "evaluation" / "metrics.json").write_text(content)
    with pytest.raises(InvalidInputError, match="is no evaluation that can be read"):
        read_evaluation(tmp_path / "evaluation", trained.student / WEIGHTS)


def test_names_that_others_can_use(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models--some--model").mkdir()
    assert [public_name(name) for name in (None, "mini", SD3, "some/model")] == [None, "mini", SD3, "some/model"]
    assert public_name("/cache/models--some--model/snapshots/abc") == "some/model"
    assert [public_name(name) for name in ("runs/model", "/data/model", "model")] == [None, None, None]
    (tmp_path / "some" / "model").mkdir(parents=True)  # a local folder goes before the hub
    assert public_name("some/model") is None


def test_a_public_recipe_keeps_every_setting_but_the_places():
    recipe = load_recipe("sd3/ours_stage1", ["data.labeled=/data/cache", "init_from=/runs/before", "training.steps=9"])
    public = public_recipe(recipe)
    assert (public.model, public.teacher, public.init_from) == (recipe.model, recipe.teacher, "INIT_FROM")
    assert public.data.labeled is None
    same = {"model", "teacher", "init_from", "data"}
    assert public.model_dump(exclude=same) == recipe.model_dump(exclude=same)


@pytest.mark.parametrize("text", ["in /home/me/run", '"/data/cache"', "(/mnt/a)", r"C:\\Users\\me\\x", "a=/tmp/x/y"])
def test_a_private_path_is_refused(text):
    with pytest.raises(InvalidInputError, match="which is private"):
        refuse_private("a text", text)


@pytest.mark.parametrize("text", ["https://stability.ai/license/a", "me/it", "scheduler/", "a / b", "1/2/3", "and/or"])
def test_what_is_no_path_is_not(text):
    refuse_private("a text", text)


def test_the_data_are_described_by_the_cache_and_the_shards_that_it_was_made_of(tmp_path):
    cache, shards = tmp_path / "cache", tmp_path / "built" / "labeled"
    for folder in (cache, shards):
        folder.mkdir(parents=True)
    counts = {"photos": 30, "sources": {"coco": 20, "own": 10}, "licenses": {"CC-BY-4.0": 30}, "seed": 5}
    write_json(shards / "manifest.json", {"files": {}, **counts})
    made_of = {"shards": sha256_file(shards / "manifest.json")}
    write_json(cache / "manifest.json", {"files": {}, "count": 1234, "source": made_of})
    recipe = load_recipe("mini/balanced_stage1", [f"data.labeled={cache}"])
    counted = "labeled data: 1,234 samples in the cache that the run's manifest names"
    words = "30 pictures, sources: coco 20, own 10, licences: CC-BY-4.0 30, seed 5"
    assert describe_data(recipe, None) == [counted]
    assert describe_data(recipe, tmp_path / "built") == [f"{counted}; {words}"]
    write_json(shards / "manifest.json", {"files": {}, **counts, "seed": 6})
    with pytest.raises(InvalidInputError, match="cache was not made of"):
        describe_data(recipe, tmp_path / "built")
    (gone,) = describe_data(load_recipe("mini/balanced_stage1", [f"data.labeled={tmp_path}/gone"]), None)
    assert gone == "labeled data: the cache is not at hand, the number of samples is not stated"


def test_the_marks_of_an_evaluation_are_read_as_it_writes_them():
    here = Path(__file__)
    assert _MARK.findall(f"<li>{_hashed('mine', here)}</li>") == [("mine", sha256_file(here)[:16])]
