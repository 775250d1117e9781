"""FLUX through the verbs' own functions: a cache, two stages and few steps of the recipes, resumed, and painted."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel
from PIL import Image

from refine_control.cache.building import completion_sampler, write_cache
from refine_control.cache.reader import Cache
from refine_control.conditions.condition import control_cond, show
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.miniature.scene_shards import scene_photos
from refine_control.models.card import own_sampling, read_card
from refine_control.models.loading import load_backbone, load_controlnet, load_painter
from refine_control.models.skeleton import FLUX, FLUX_TEACHER, skeleton
from refine_control.pipeline.files import generate_file
from refine_control.pipeline.inpainter import Inpainter, TorchPainter
from refine_control.pipeline.painting import paint, sampling_path
from refine_control.pipeline.pictures import read_photograph
from refine_control.recipe_files import load_recipe
from refine_control.records import LABELED, UNLABELED
from refine_control.training import loop
from refine_control.training.memory import plan_memory
from refine_control.training.run import train

PHOTOS = list(scene_photos(0, 0, 4))
FAST = ("training.steps=2", "training.batch_size=2", "training.device_batch_size=2", "optimizer.warmup_steps=0")
FAST += ("training.log_every=1", "training.save_every=1", "training.precision=fp32", "optimizer.learning_rate=1e-3")


@pytest.fixture(scope="module")
def caches(tiny_flux, tmp_path_factory):
    """Of both roles; the unlabelled one with paths of the teacher at guidance 3.5."""
    root = tmp_path_factory.mktemp("caches")
    backbone = load_backbone(tiny_flux / "model", load_controlnet(tiny_flux / "inpaint"))
    paths = {"completions": completion_sampler(4, 3.5, even=True), "path": 4}
    write_cache(PHOTOS, root / LABELED, backbone, LABELED, source={})
    write_cache(PHOTOS, root / UNLABELED, backbone, UNLABELED, source={}, **paths)
    return backbone, root


@pytest.fixture
def recipe(tiny_flux, caches):
    def make(name, *changed, teacher="inpaint"):
        named = [f"model={tiny_flux / 'model'}", f"teacher={tiny_flux / teacher}"]
        data = [f"data.{role}={caches[1] / role}" for role in (LABELED, UNLABELED)]
        return load_recipe(f"flux/{name}", [*named, *data, *FAST, *changed])

    return make


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_cache_holds_latents_and_paths_as_sd3_s_do(caches):
    backbone, root = caches
    cache = Cache(root / UNLABELED)
    pictures, mask = show(PHOTOS).tensors()
    seen = backbone.encode_images(pictures)
    torch.testing.assert_close(cache.take("cond_latents", range(4)), seen, rtol=1e-5, atol=1e-5)
    assert cache.take("prompt_embeds", [0]).shape == (1, 12, 8)
    assert cache.take("completions", [0]).shape == (1, 16, 8, 8)
    noise = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    text, calls = backbone.encode_prompts([photo.prompt for photo in PHOTOS]), []
    teacher, forward = backbone.pipeline.controlnet, backbone.pipeline.controlnet.forward
    teacher.forward = lambda **given: calls.append(given) or forward(**given)
    try:
        sampler = completion_sampler(2, 3.5)
        list(sampling_path(backbone, teacher, control_cond(seen, mask), text, None, sampler, noise))
    finally:
        del teacher.forward
    assert len(calls) == 2  # the guidance is embedded: no pass without a prompt
    assert [call["guidance"].tolist() for call in calls] == [[3.5] * 4] * 2
    assert all(call["controlnet_cond"].shape == (4, 16, 68) for call in calls)


def test_both_stages_and_few_steps_train_resume_and_paint(recipe, tmp_path, monkeypatch):
    first = train(recipe("balanced_stage1"), tmp_path / "first")
    assert first.steps == 2
    assert all(np.isfinite(row["loss"]) for row in metrics(tmp_path / "first") if "loss" in row)
    fit, stopped = loop.Draw.normals, []

    def interrupted(self, *asked):
        if self.step == 1 and not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        return fit(self, *asked)

    monkeypatch.setattr(loop.Draw, "normals", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe("balanced_stage1"), tmp_path / "again")
    assert [folder.name for folder in (tmp_path / "again" / "checkpoints").iterdir()] == ["step_00000001"]
    again = train(recipe("balanced_stage1"), tmp_path / "again")
    weights = [(run.student / "diffusion_pytorch_model.safetensors").read_bytes() for run in (first, again)]
    assert weights[0] == weights[1]
    second = train(recipe("balanced_stage2", f"init_from={tmp_path / 'first'}"), tmp_path / "second")
    edge = train(recipe("edge", f"init_from={tmp_path / 'second'}"), tmp_path / "edge")
    assert (
        len({*weights, *((run.student / "diffusion_pytorch_model.safetensors").read_bytes() for run in (second, edge))})
        == 3
    )
    card = read_card(edge.student)
    assert card is not None
    assert (card.distilled_guidance, card.sampling.guidance_scale) == (3.5, 3.5)
    assert "with FLUX" in (edge.student / "README.md").read_text()


def test_a_student_of_single_layers_too_follows_the_relevance_of_its_sites(recipe, tiny_flux, tmp_path):
    backbone = load_backbone(tiny_flux / "model", load_controlnet(tiny_flux / "plain"))
    photos = [replace(photo, cond=photo.image, mask=np.ones_like(photo.mask)) for photo in PHOTOS]
    write_cache(photos, tmp_path / "edges", backbone, LABELED, source={}, condition="canny")
    changed = f"data.labeled={tmp_path / 'edges'}", "student.num_layers=2", "student.num_single_layers=1"
    changed += ("student.placement=relevance",)
    run = train(recipe("balanced_stage1", *changed, teacher="plain"), tmp_path / "run")
    layers = json.loads((run.student / "config.json").read_text())["layer_of_site"]
    assert [sorted({*layers[:7]}), layers[7:]] == [[0, 1], [2] * 4]
    stock = FluxControlNetModel.from_pretrained(run.student)
    assert (len(stock.transformer_blocks), len(stock.single_transformer_blocks)) == (2, 1)


def test_what_flux_does_not_do_is_refused(recipe, tmp_path):
    with pytest.raises(InvalidInputError, match=r"student\.backbone is whole, and FLUX's transformer is not trained"):
        train(recipe("edge", "student.backbone=whole"), tmp_path / "a")
    with pytest.raises(InvalidInputError, match=r"num_single_layers is 2 and the teacher has 0"):
        train(recipe("balanced_stage1", "student.num_single_layers=2"), tmp_path / "b")


def test_pictures_are_painted_from_files(recipe, tiny_flux, tmp_path):
    """`inpaint` with the ControlNet that reads a mask, `generate` with the other."""
    Image.fromarray(PHOTOS[0].image).save(tmp_path / "photo.png")
    Image.fromarray(PHOTOS[0].mask).save(tmp_path / "mask.png")
    model, sampler = str(tiny_flux / "model"), SamplerConfig(num_inference_steps=2, guidance_scale=3.5)
    inpainter = Inpainter(TorchPainter(*load_painter(model, tiny_flux / "inpaint", "cpu")), model)
    given = read_photograph(tmp_path / "photo.png"), PHOTOS[0].mask, "a red circle"
    painted = np.asarray(inpainter.repaint(*given, sampler, whole=True, feather=0).image)
    expected = paint(*load_painter(model, tiny_flux / "inpaint"), show(PHOTOS[:1]), ["a red circle"], sampler)[0]
    assert np.array_equal(painted[PHOTOS[0].mask], expected[PHOTOS[0].mask])
    assert np.array_equal(painted[~PHOTOS[0].mask], PHOTOS[0].image[~PHOTOS[0].mask])
    controls = [(str(tiny_flux / "plain"), tmp_path / "photo.png")]
    out = generate_file(controls, "a red circle", tmp_path / "out.png", model=model, sampler=sampler, size=64)
    assert np.asarray(Image.open(out)).std() > 1
    with pytest.raises(InvalidInputError, match="reads a mask; use it by `refine-control inpaint`"):
        generate_file([(str(tiny_flux / "inpaint"), tmp_path / "photo.png")], "a", out, model=model, size=64)


def test_a_flux_model_is_sampled_at_the_guidance_that_is_distilled_into_it(tiny_flux, tmp_path):
    for name in ("model_index.json", "transformer/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((tiny_flux / "model" / name).read_bytes())
    assert own_sampling(str(tmp_path)) == {"guidance_scale": 3.5}
    config = json.loads((tmp_path / "transformer/config.json").read_text()) | {"guidance_embeds": False}
    (tmp_path / "transformer/config.json").write_text(json.dumps(config))
    assert own_sampling(str(tmp_path)) == {"guidance_scale": 1.0}


def test_a_step_is_planned_by_configs_alone(recipe, caches):
    backbone, _ = caches
    plan, teacher = plan_memory(recipe("balanced_stage1"), size=(8, 8)), backbone.pipeline.controlnet
    sizes = [sum(p.nbytes for p in network.parameters()) for network in (backbone.transformer, teacher)]
    assert sum(sizes) < plan.frozen < 1.1 * sum(sizes)  # and the student's text stream that nobody reads
    assert plan.student < sizes[1]


def test_the_published_models_have_their_published_sizes():
    backbone = skeleton(FLUX, FLUX_TEACHER)
    sizes = [sum(p.numel() for p in n.parameters()) for n in (backbone.transformer, backbone.pipeline.controlnet)]
    assert sizes == [11_901_408_320, 2_140_889_088]
