"""Groups of sites by relevance: what is measured, and how a student keeps its groups in training and in its folder."""

import json
import logging

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel

from refine_control.cache.building import write_cache
from refine_control.conditions.condition import Shown
from refine_control.config import Recipe, SamplerConfig, SigmaConfig
from refine_control.errors import InvalidInputError
from refine_control.injection import layer_of_site, relevant_layer_of_site
from refine_control.miniature.scene_shards import scene_photos
from refine_control.models.controlnet import own_layer_of_site, place
from refine_control.models.loading import load_backbone, load_controlnet, load_student, save_controlnet
from refine_control.pipeline.painting import make_pipeline, paint, run_pipeline
from refine_control.recipe_files import load_recipe
from refine_control.records import LABELED
from refine_control.storage import write_json
from refine_control.training import placement
from refine_control.training.loop import Draw
from refine_control.training.objectives import Batch, Networks, noised
from refine_control.training.placement import Sites, measure_sites
from refine_control.training.run import new_student, student_card, train

GENERATOR = torch.Generator().manual_seed(5)
BATCH = Batch(
    torch.randn(3, 16, 8, 8, generator=GENERATOR),
    torch.randn(3, 16, 8, 8, generator=GENERATOR),
    (torch.rand(3, 1, 8, 8, generator=GENERATOR) > 0.5).float(),
    torch.randn(3, 18, 64, generator=GENERATOR),
    torch.randn(3, 64, generator=GENERATOR),
    range(3),
    3,
)
DRAW = Draw(3, "placement", 0, range(3))
UNEVEN = [0] * 12 + [1] * 11
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
MASKS = np.zeros((2, 64, 64), bool)
MASKS[:, 10:40, 20:50] = True
SHOWN = Shown(IMAGES, MASKS)
SAMPLER = SamplerConfig(num_inference_steps=2, guidance_scale=1.0, conditioning_scale=1.0)


@torch.no_grad()
def test_relevance_is_what_a_velocity_without_the_residual_differs_by(tiny_backbone, monkeypatch):
    monkeypatch.setattr(placement, "_AT_ONCE", 2)
    teacher, transformer = tiny_backbone.pipeline.controlnet, tiny_backbone.transformer
    measured = measure_sites(tiny_backbone, teacher, BATCH, DRAW, SigmaConfig(shift=2.0))
    at = noised(BATCH.latents, DRAW, SigmaConfig(), 2.0)
    relevance, products = np.zeros(23), np.zeros((23, 23))
    for i in range(3):  # sample by sample, in stock's own calls
        x, prompt, time = at.noisy_latents[i : i + 1], BATCH.prompt_embeds[i : i + 1], 1000 * at.sigmas[i : i + 1]
        cond = torch.cat([BATCH.cond_latents[i], 1 - BATCH.mask[i]])[None]
        f = list(teacher(x, cond, 1.0, prompt, torch.zeros(1, 64), time, return_dict=False)[0])
        pooled = BATCH.pooled_prompt_embeds[i : i + 1]

        def v(residuals, x=x, prompt=prompt, pooled=pooled, time=time):
            return transformer(x, prompt, pooled, time, [*residuals, residuals[-1]], return_dict=False)[0]

        exact = v(f)
        for s in range(23):
            without = [0 * r if t == s else r for t, r in enumerate(f)]
            relevance[s] += (v(without) - exact).square().mean().item() / 3
            products[s] += [(f[s] * r).mean().item() / 3 for r in f]
    np.testing.assert_allclose(measured.relevance, relevance, rtol=1e-3)
    np.testing.assert_allclose(measured.products, products, rtol=1e-3, atol=1e-6)
    assert relevance.min() > 0


def test_a_student_is_compared_with_its_own_groups_and_injects_by_them(tiny_backbone, tiny_student):
    teacher, student = tiny_backbone.pipeline.controlnet, tiny_student(2)
    place(student, UNEVEN)
    networks = Networks(tiny_backbone, teacher, student)
    assert networks.groups == [list(range(12)), list(range(12, 23))]
    at = networks.noised(BATCH, DRAW)
    with torch.no_grad():
        shared = networks.student_answer(at, BATCH)
        each = [shared.residuals[layer] for layer in [*UNEVEN, 1]]
        text = BATCH.prompt_embeds, BATCH.pooled_prompt_embeds, 1000 * at.sigmas
        expected = tiny_backbone.transformer(at.noisy_latents, *text, each, return_dict=False)[0]
    assert torch.equal(shared.velocity, expected)
    assert own_layer_of_site(networks.copy_student()) == UNEVEN


# From a recipe to a folder.


@pytest.fixture(scope="module", autouse=True)
def few_samples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "SAMPLES", 3)
        yield


@pytest.fixture(scope="module")
def recipe(tiny_backbone, tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    tiny_backbone.pipeline.save_pretrained(root / "tiny")
    write_json(root / "tiny" / "refine_control.json", {"max_sequence_length": 0})
    write_cache(list(scene_photos(0, 0, 6)), root / "cache", load_backbone(root / "tiny"), LABELED, source={})
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": str(root / "tiny"),
            "student": {"num_layers": 5, "init": "teacher", "placement": "relevance"},
            "optimizer": {"learning_rate": 1e-2},
            "training": {"steps": 2, "batch_size": 2, "log_every": 1},
            "data": {"labeled": str(root / "cache")},
        }
    )


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    return train(recipe, tmp_path_factory.mktemp("runs") / "tiny").student


@pytest.fixture(scope="module")
def layers(recipe):
    """The map that the recipe's own measurement gives."""
    seen, measure = [], placement.measure_sites
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "measure_sites", lambda *given: seen.append(measure(*given)) or seen[-1])
        student = new_student(recipe, load_backbone(recipe.model))[1]
    (sites,) = seen
    assert own_layer_of_site(student) == relevant_layer_of_site(*sites, 5)
    return own_layer_of_site(student)


def test_a_trained_student_keeps_its_groups_in_its_folder(recipe, trained, layers, tiny_backbone):
    assert json.loads((trained / "config.json").read_text())["layer_of_site"] == layers != layer_of_site(5)
    backbone = load_backbone(recipe.model)
    student = load_student(backbone, trained)[1]
    assert own_layer_of_site(student) == layers
    stock = SD3ControlNetModel.from_pretrained(trained)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), stock.parameters(), strict=True))
    # the pipeline and the batches inject by the groups of the folder, and by stock's rule where that is asked for
    pictures = paint(tiny_backbone, student, SHOWN, ["", ""], SAMPLER)
    one = run_pipeline(make_pipeline(tiny_backbone, student), tiny_backbone, IMAGES[0], MASKS[0], "", SAMPLER)
    assert np.abs(one.astype(int) - pictures[0]).max() <= 1
    as_stock = SAMPLER.model_copy(update={"injection": "diffusers"})
    assert not np.array_equal(paint(tiny_backbone, student, SHOWN, ["", ""], as_stock), pictures)
    bare = load_controlnet(trained)
    bare.register_to_config(layer_of_site=None)
    assert not np.array_equal(paint(tiny_backbone, bare, SHOWN, ["", ""], SAMPLER), pictures)


def test_a_student_of_the_teacher_starts_from_the_last_layer_of_each_of_its_groups(recipe, monkeypatch):
    backbone, identity = load_backbone(recipe.model), Sites(np.ones(23), np.eye(23))
    monkeypatch.setattr(placement, "measure_sites", lambda *given: identity)
    student, teacher = new_student(recipe, backbone)[1], backbone.pipeline.controlnet
    for layer in range(5):
        last = max(site for site, of in enumerate(own_layer_of_site(student)) if of == layer)
        assert torch.equal(student.controlnet_blocks[layer].weight, teacher.controlnet_blocks[last].weight)


def test_stock_diffusers_is_warned_of(tiny_backbone, tiny_student, tmp_path, caplog):
    student = tiny_student(2)
    with caplog.at_level(logging.WARNING):
        save_controlnet(student, tmp_path / "equal", 24)
        place(student, layer_of_site(2))
        save_controlnet(student, tmp_path / "alike", 24)
    assert not caplog.records
    place(student, [0] * 20 + [1] * 3)
    save_controlnet(
        student, tmp_path / "uneven", 24, card=student_card(load_recipe("mini/edge")), backbone=tiny_backbone
    )
    (record,) = caplog.records
    assert record.getMessage().startswith("stock diffusers injects a ControlNet of 2 layers into 24 blocks shifted; ")
    assert record.getMessage().endswith("layers of equal placement")
    assert f"Warning: {record.getMessage()}." in (tmp_path / "uneven" / "README.md").read_text()
    assert "layer_of_site" not in json.loads((tmp_path / "equal" / "config.json").read_text())


def test_a_start_keeps_its_groups_and_another_placement_is_refused(recipe, trained, layers, monkeypatch):
    backbone = load_backbone(recipe.model)
    monkeypatch.setattr(placement, "measure_sites", None)  # nothing is measured again
    start = recipe.model_copy(update={"init_from": str(trained)})
    assert own_layer_of_site(new_student(start, backbone)[1]) == layers
    equal = start.model_copy(update={"student": recipe.student.model_copy(update={"placement": "equal"})})
    with pytest.raises(InvalidInputError, match=r"has the placement relevance and student\.placement is equal; make"):
        new_student(equal, backbone)


def test_a_start_of_equal_groups_is_refused_by_a_recipe_of_others(recipe, tiny_student, tmp_path):
    save_controlnet(tiny_student(5), tmp_path / "student", 24)
    start = recipe.model_copy(update={"init_from": str(tmp_path / "student")})
    with pytest.raises(InvalidInputError, match=r"has the placement equal and student\.placement is relevance"):
        new_student(start, load_backbone(recipe.model))


@pytest.mark.parametrize("wrong", ["abc", [0] * 23, [0, 1] * 11 + [1], [0] * 12 + [1] * 10, [0.0] * 12 + [1.0] * 11])
def test_a_folder_whose_groups_are_none_is_refused(tiny_backbone, tiny_student, tmp_path, wrong):
    tiny_student(2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_of_site": wrong}))
    with pytest.raises(
        InvalidInputError, match=r"layer_of_site in its config\.json that is not the layer of each of 23"
    ):
        load_student(tiny_backbone, tmp_path)


def test_too_many_layers_and_a_recipe_without_data_are_refused(recipe):
    backbone = load_backbone(recipe.model)
    many = recipe.model_copy(update={"student": recipe.student.model_copy(update={"num_layers": 24})})
    with pytest.raises(InvalidInputError, match="num_layers is 24; this transformer admits 1 to 23"):
        new_student(many, backbone)
    bare = recipe.model_copy(update={"data": recipe.data.model_copy(update={"labeled": None})})
    with pytest.raises(InvalidInputError, match=r"no data\.labeled"):
        new_student(bare, backbone)


def test_the_samples_that_are_measured_are_those_of_the_student_s_seed(recipe, monkeypatch):
    backbone, asked = load_backbone(recipe.model), []

    def noted(backbone, teacher, batch, draw, sigmas, guidance):
        asked.append((batch.latents, draw.seed))
        return Sites(np.ones(23), np.eye(23))

    monkeypatch.setattr(placement, "measure_sites", noted)
    for seed in (1, 1, 2):
        student = recipe.student.model_copy(update={"seed": seed})
        new_student(recipe.model_copy(update={"student": student}), backbone)
    (first, _), (again, _), (other, seed) = asked
    assert torch.equal(first, again)
    assert (len(first), seed) == (placement.SAMPLES, 2)
    assert not torch.equal(first, other)
