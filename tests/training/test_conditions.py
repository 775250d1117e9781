"""A condition without a region from shards to a student, and what does not belong together."""

import json

import pytest
import torch
from diffusers import SD3ControlNetModel

from refine_control.cache import building
from refine_control.cache.building import build_cache, cache_folder, write_cache
from refine_control.cache.reader import Cache
from refine_control.config import LossWeights, Recipe, SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.losses import output_loss, task_loss
from refine_control.miniature.scene_shards import build_scenes, scene_photos
from refine_control.models.backbone import Backbone
from refine_control.models.controlnet import for_condition
from refine_control.models.families import Encoding
from refine_control.models.loading import load_backbone, save_controlnet
from refine_control.photos.shards import Shards
from refine_control.pixels import from_images
from refine_control.records import LABELED, TEST, UNLABELED
from refine_control.storage import sha256_file, write_json
from refine_control.training import loop
from refine_control.training.batches import CacheBatches, MixedBatches
from refine_control.training.loop import Draw
from refine_control.training.objectives import KINDS, Distillation, Networks
from refine_control.training.run import _condition, train

WEIGHTS = "diffusion_pytorch_model.safetensors"
DRAW = Draw(0, "stage", 1, range(4))


@pytest.fixture(scope="module")
def world(tiny_backbone, tmp_path_factory):
    """Folders: the model, a teacher for canny, shards of its scenes, and caches of two roles with completions."""
    root = tmp_path_factory.mktemp("canny")
    tiny_backbone.pipeline.save_pretrained(root / "model")
    write_json(root / "model" / "refine_control.json", {"max_sequence_length": 0})
    teacher = for_condition(tiny_backbone.pipeline.controlnet, "canny", tiny_backbone.vae)
    save_controlnet(teacher, root / "teacher", 24)
    build_scenes(root / "shards", labeled=5, unlabeled=5, test=2, condition="canny")
    given = {"model": str(root / "model"), "teacher": str(root / "teacher"), "complete": 1}
    for role in (LABELED, UNLABELED):
        assert cache_folder(root / "shards" / role, root / role, **given)
        assert not cache_folder(root / "shards" / role, root / role, **given)
    return root


@pytest.fixture(scope="module")
def recipe(world):
    return Recipe.model_validate(
        {
            "name": "canny",
            "model": str(world / "model"),
            "teacher": str(world / "teacher"),
            "student": {"num_layers": 2},
            "objective": {"kind": "mixed", "x0_source": "teacher"},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 2, "batch_size": 4, "log_every": 1, "save_every": 1},
            "sampler": {"num_inference_steps": 1, "guidance_scale": 1.0},
            "data": {role: str(world / role) for role in (LABELED, UNLABELED)},
        }
    )


def changed(recipe, **sections):
    values = recipe.model_dump()
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) else section
    return Recipe.model_validate(values)


# Caches.


def test_a_cache_without_a_region_holds_no_mask_and_unlabeled_no_latents(world):
    labeled, unlabeled = (Cache(world / role) for role in (LABELED, UNLABELED))
    text = {"prompt_index", "prompt_embeds", "pooled_prompt_embeds"}
    assert set(unlabeled.arrays) == {"cond_latents", "completions"} | text
    assert set(labeled.arrays) == set(unlabeled.arrays) | {"latents"}
    assert (unlabeled.condition, unlabeled.encoding) == ("canny", Encoding(shift=False))


def test_a_row_is_what_the_controlnet_is_shown_without_the_shift(world, tiny_backbone):
    cache, shards = Cache(world / LABELED), Shards(world / "shards" / LABELED)
    for row, key in enumerate(cache.keys[:2]):
        photo = next(each for each in shards if each.key == key)
        shown, truth = (
            tiny_backbone.encode_images(from_images(picture[None]), shift)
            for picture, shift in ((photo.cond, False), (photo.image, True))
        )
        torch.testing.assert_close(cache.take("cond_latents", [row]), shown, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cache.take("latents", [row]), truth, rtol=1e-5, atol=1e-5)


def test_the_manifest_of_inpainting_does_not_name_the_condition(tiny_backbone, tmp_path):
    write_cache(list(scene_photos(0, 0, 2)), tmp_path / "cache", tiny_backbone, LABELED, source={})
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert not {"condition", "shift", "levels"} & manifest.keys()
    assert {"masked_latents.npy", "masks.npy"} < manifest["files"].keys()
    cache = Cache(tmp_path / "cache")
    assert (cache.condition, cache.encoding) == ("inpaint", Encoding())


def test_completions_of_another_condition_are_refused_before_anything_is_encoded(world, tiny_backbone, tmp_path):
    sampler = SamplerConfig(num_inference_steps=1, guidance_scale=1.0)
    with pytest.raises(InvalidInputError, match=r"the model, .*, is for inpaint, and the samples are .* canny"):
        build_cache(world / "shards" / LABELED, tmp_path / "cache", tiny_backbone, completions=sampler)
    assert not (tmp_path / "cache").exists()


def test_the_teacher_of_a_cache_takes_the_condition_of_its_samples(world, tmp_path):
    build_scenes(tmp_path / "shards", labeled=1, unlabeled=0, test=0, condition="depth")
    given = {"model": str(world / "model"), "teacher": str(world / "teacher")}
    with pytest.raises(InvalidInputError, match=r"teacher is for canny, and the samples are of the condition depth"):
        cache_folder(tmp_path / "shards" / LABELED, tmp_path / "cache", **given)
    assert not (tmp_path / "cache").exists()


# Batches and losses.


def test_batches_without_a_region_have_no_mask(world):
    labeled, unlabeled = Cache(world / LABELED), Cache(world / UNLABELED)
    batch = CacheBatches(labeled, 4).batch(DRAW)
    assert batch.mask is None
    assert batch.latents.shape == batch.cond_latents.shape == (4, 16, 8, 8)
    assert batch.take(torch.arange(2)).mask is None
    halves = CacheBatches(labeled, 2), CacheBatches(unlabeled, 2, x0="completions")
    mixed = MixedBatches(*halves)
    batch = mixed.batch(DRAW)
    assert (batch.mask, batch.num_labeled, list(batch.slots)) == (None, 2, [0, 2, 1, 3])
    last = DRAW._replace(slots=[0, 1], stage="stage unlabeled")
    rows = halves[1].rows(last, halves[0].turn(DRAW._replace(slots=[0, 1], stage="stage labeled")))
    assert torch.equal(batch.latents[2:], unlabeled.take("completions", rows))
    assert mixed.not_finite(DRAW) == []


def test_w_is_j_without_a_region(world, tiny_backbone, tiny_student):
    """Eq. 2 and Eq. 4 are means, whatever alpha says."""
    teacher, student = (
        for_condition(network, "canny", tiny_backbone.vae)
        for network in (tiny_backbone.pipeline.controlnet, tiny_student(2))
    )
    networks = Networks(tiny_backbone, teacher, student)
    batch = CacheBatches(Cache(world / LABELED), 4).batch(DRAW)
    seen = []
    for alpha, output_alpha in ((0.9, None), (0.6, 0.7)):
        weights = LossWeights(alpha=alpha, output_alpha=output_alpha)
        seen.append(Distillation(networks, KINDS["supervised"], weights).losses(batch, DRAW))
    with torch.no_grad():
        at = networks.noised(batch, DRAW)
        velocities = [ask(at, batch).velocity for ask in (networks.teacher_answer, networks.student_answer)]
    for losses in seen:
        torch.testing.assert_close(losses.task_loss.detach(), task_loss(at.target, velocities[1]))
        torch.testing.assert_close(losses.output_loss.detach(), output_loss(*velocities))
    assert torch.equal(seen[0].loss, seen[1].loss)
    assert seen[0].task_loss > 0


# Training.


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    return train(recipe, tmp_path_factory.mktemp("runs") / "canny")


def test_a_student_without_a_region_is_a_folder_that_stock_diffusers_loads(trained, recipe):
    student = SD3ControlNetModel.from_pretrained(trained.student)
    assert student.config["condition"] == "canny"
    assert student.config["extra_conditioning_channels"] == 0
    assert student.pos_embed_input.proj.weight.shape[1] == 16
    assert torch.cat([p.detach().flatten() for p in student.controlnet_blocks.parameters()]).any()
    lines = [json.loads(line) for line in (trained.student.parent / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["task_loss"] > 0 and line["output_loss"] > 0 for line in lines)


class Killed(BaseException):
    pass


def test_a_killed_run_without_a_region_ends_with_the_same_bytes(recipe, trained, tmp_path, monkeypatch):
    save = loop.save_checkpoint

    def killed(run_dir, step, *rest):
        save(run_dir, step, *rest)
        raise Killed

    monkeypatch.setattr(loop, "save_checkpoint", killed)
    with pytest.raises(Killed):
        train(recipe, tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "student").exists()
    again = train(recipe, tmp_path / "run")
    assert sha256_file(again.student / WEIGHTS) == sha256_file(trained.student / WEIGHTS)


def test_validation_paints_what_the_student_is_shown(recipe, world, tmp_path):
    few = {"steps": 1, "validate_every": 1, "num_validation_images": 2}
    train(changed(recipe, training=few, data={TEST: str(world / "shards" / TEST)}), tmp_path / "run")
    assert (tmp_path / "run" / "validation" / "step_00000001.png").stat().st_size


def test_stage_2_without_a_region_has_no_masked_image_to_begin_from(recipe, tmp_path):
    with pytest.raises(InvalidInputError, match=r"x0_source masked .*, and canny has none; set it to teacher"):
        train(changed(recipe, objective={"x0_source": "masked"}), tmp_path / "run")


def test_a_teacher_of_another_condition_is_refused(recipe, world, tmp_path):
    with pytest.raises(InvalidInputError, match=r"the ControlNet of the teacher is for inpaint, .* condition canny"):
        train(changed(recipe, teacher=None), tmp_path / "run")


def test_a_cache_of_another_condition_is_refused(recipe, trained, tmp_path):
    write_cache(list(scene_photos(0, 0, 4)), tmp_path / "cache", load_backbone(recipe.model), LABELED, source={})
    data = {LABELED: str(tmp_path / "cache")}
    started = changed(recipe, objective={"kind": "supervised"}, data=data, init_from=str(trained.student))
    with pytest.raises(InvalidInputError, match=r"is for canny, and the samples are of the condition inpaint"):
        train(started, tmp_path / "run")


def test_a_cache_in_other_levels_is_refused(recipe, world, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "encoding_of", lambda *_: Encoding(shift=False, levels=(0.5, 128.0)))
    build_cache(world / "shards" / LABELED, tmp_path / "cache", tiny_backbone)
    other = changed(recipe, objective={"kind": "supervised"}, data={LABELED: str(tmp_path / "cache")})
    with pytest.raises(InvalidInputError, match=r"without the VAE's shift, from 0\.5 for black to 128 for white"):
        train(other, tmp_path / "run")


def test_a_teacher_that_does_not_say_its_condition_says_it_once_its_samples_are_known(recipe, tiny_backbone):
    silent = for_condition(tiny_backbone.pipeline.controlnet, "canny", tiny_backbone.vae)
    silent.register_to_config(condition=None)
    parts = {**tiny_backbone.pipeline.components, "controlnet": silent}
    assert _condition(recipe, Backbone(type(tiny_backbone.pipeline)(**parts), 0)) == "canny"
    assert silent.config["condition"] == "canny"


def test_a_cache_with_the_shift_is_refused_for_a_teacher_without_it(recipe, world, tiny_backbone, tmp_path):
    stated = for_condition(tiny_backbone.pipeline.controlnet, "canny", tiny_backbone.vae)
    stated.register_to_config(condition_shift=True)
    backbone = Backbone(type(tiny_backbone.pipeline)(**{**tiny_backbone.pipeline.components, "controlnet": stated}), 0)
    build_cache(world / "shards" / LABELED, tmp_path / "cache", backbone)
    assert Cache(tmp_path / "cache").encoding.shift
    other = changed(recipe, objective={"kind": "supervised"}, data={LABELED: str(tmp_path / "cache")})
    with pytest.raises(
        InvalidInputError, match=r"with the VAE's shift, from -1 for black .* takes others; make it again"
    ):
        train(other, tmp_path / "run")
