"""Families of SD3's classes: the options of published ControlNets on tiny networks, against the installed diffusers."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from refine_control import flow
from refine_control.cache.building import write_cache
from refine_control.cache.reader import Cache
from refine_control.conditions.condition import take_condition
from refine_control.config import LossWeights, SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.injection import layer_of_site, stock_injects_exactly
from refine_control.miniature import networks as mini
from refine_control.models.backbone import Backbone, decode_latents, predict_velocity
from refine_control.models.controlnet import (
    build_student,
    control_residuals,
    injected,
    injection_of,
    join,
    own_layer_of_site,
    site_groups,
    trainable_parameters,
)
from refine_control.models.families import condition_encoding, find_family
from refine_control.models.fit import check_controlnet
from refine_control.models.loading import load_controlnet, load_student, save_controlnet
from refine_control.models.skeleton import PUBLISHED as PUBLISHED_MODELS
from refine_control.pipeline.painting import complete_latents
from refine_control.pixels import from_images
from refine_control.recipe_files import load_recipe
from refine_control.records import UNLABELED, Photo
from refine_control.training.loop import Draw
from refine_control.training.objectives import KINDS, Batch, Distillation, Networks

SMALL = {**mini.TRANSFORMER, "attention_head_dim": 8, "caption_projection_dim": 16}
DUAL = tuple(range(13))
MEDIUM = {"qk_norm": "rms_norm", "dual_attention_layers": DUAL}
LARGE = {"qk_norm": "rms_norm", "num_layers": 38}
SINGLE = {"joint_attention_dim": None, "use_pos_embed": False, "pos_embed_type": None, "pos_embed_max_size": None}
SINGLE |= {"force_zeros_for_pooled_projection": False, "num_layers": 19}
PUBLISHED = {
    "SD3 inpainting": ({}, {"num_layers": 23, "extra_conditioning_channels": 1}),
    "SD3 12": ({}, {"num_layers": 12}),
    "SD3 6": ({}, {"num_layers": 6}),
    "SD3.5-medium": (MEDIUM, {"num_layers": 23, **MEDIUM}),
    "SD3.5-large": (LARGE, SINGLE),
}
"""Transformer and ControlNet: what their configs say beside sizes."""
GENERATOR = torch.Generator().manual_seed(0)
LATENTS, COND = (torch.randn(2, 16, 8, 8, generator=GENERATOR) for _ in range(2))
EMBEDS, POOLED = torch.randn(2, 18, 64, generator=GENERATOR), torch.randn(2, 64, generator=GENERATOR)
SIGMAS = torch.tensor([0.3, 0.8])


class World(NamedTuple):
    name: str
    backbone: Backbone
    teacher: SD3ControlNetModel

    @property
    def transformer(self):
        return self.backbone.transformer

    def cond(self):
        ones = torch.ones(2, self.teacher.config["extra_conditioning_channels"], 8, 8)
        return torch.cat([COND, ones], 1)

    def residuals(self, controlnet, pooled=POOLED):
        return control_residuals(controlnet, LATENTS, SIGMAS, EMBEDS, self.cond(), pooled)

    def student(self, num_layers, init="teacher", layers=None):
        return disturbed(build_student(self.transformer, self.teacher, num_layers, init, 0, layers))


def disturbed(controlnet):
    """Noise in what is zero at birth."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in (controlnet.controlnet_blocks, controlnet.pos_embed_input):
            for parameter in part.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return controlnet.eval()


@pytest.fixture(scope="module", params=PUBLISHED)
def world(request, tmp_path_factory):
    """A backbone of a published model's options, its VAE without a spread, and a ControlNet of a published config."""
    of_transformer, of_controlnet = PUBLISHED[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini, "TRANSFORMER", {**SMALL, **of_transformer})
        patch.setattr(mini, "VAE", {**mini.VAE, "block_out_channels": (8, 8, 16, 16)})
        pipeline = mini.new_pipeline(tmp_path_factory.mktemp("family"), seed=0)
    pipeline.vae.register_to_config(shift_factor=0.1, scaling_factor=1.7)
    with torch.no_grad():
        pipeline.vae.encoder.conv_out.bias[16:] = -60  # log variance: stock's draw is the mean
    torch.manual_seed(1)
    teacher = disturbed(SD3ControlNetModel(**{**SMALL, **of_controlnet}))
    check_controlnet(teacher.config, pipeline.transformer.config, "teacher")
    join(teacher, pipeline.transformer)
    pipeline.register_modules(controlnet=teacher)
    return World(request.param, Backbone(pipeline, max_sequence_length=0), teacher)


EXPECTED = {
    "SD3 inpainting": ("SD3-medium", 23, False, True, True, True, (), None),
    "SD3 12": ("SD3-medium", 23, False, False, True, True, (), None),
    "SD3 6": ("SD3-medium", 23, False, False, True, True, (), None),
    "SD3.5-medium": ("SD3.5-medium", 23, False, False, True, True, DUAL, "rms_norm"),
    "SD3.5-large": ("SD3.5-large", 37, True, True, False, False, (), None),
}


def test_a_published_config_has_its_family(world):
    f = find_family(world.transformer.config, world.teacher.config)
    facts = f.name, f.sites[0].count, f.pooled, f.shift, f.own_positions, f.text, f.dual_attention_layers, f.qk_norm
    assert facts == EXPECTED[world.name]
    dead = [] if f.sites[0].count == 37 or len(world.teacher.transformer_blocks) < 23 else [22]
    assert f.sites[0].dead_layers(len(world.teacher.transformer_blocks)) == dead


def test_the_recipes_of_sd35m_name_a_model_and_a_teacher_that_a_plan_knows():
    recipe = load_recipe("sd35m/balanced_stage1")
    transformer, teacher = (PUBLISHED_MODELS[str(name)] for name in (recipe.model, recipe.teacher))
    check_controlnet(teacher["controlnet"], transformer["transformer"], "teacher")
    family = find_family(transformer["transformer"], teacher["controlnet"])
    assert (family.name, family.shift, family.dual_attention_layers) == ("SD3.5-medium", False, DUAL)
    assert family.conditioning_scale == recipe.sampler.conditioning_scale == 0.8


def test_finished_students_keep_even_groups_and_new_ones_run_in_stock():
    (sites,) = find_family({"num_layers": 24}).sites
    assert all(sites.layer_of_site(count) == layer_of_site(count) for count in range(1, 24))
    for blocks, options in ((24, MEDIUM), (38, LARGE)):
        (sites,) = find_family({**options, "num_layers": blocks}).sites
        maps = {count: sites.layer_of_site(count) for count in range(1, blocks)}
        assert all(stock_injects_exactly(count, blocks, maps[count]) for count in maps if 2 * count <= blocks)
        assert all(sorted(set(layers)) == list(range(count)) for count, layers in maps.items())
    assert maps[12] != layer_of_site(12, 37)
    assert maps[19] == layer_of_site(19, 37)
    assert maps[37] == list(range(37))


def by_stock(world, given):
    """The velocity with what the installed diffusers makes of residuals by itself."""
    arguments = {"encoder_hidden_states": EMBEDS, "pooled_projections": POOLED, "timestep": SIGMAS * 1000}
    return world.transformer(LATENTS, block_controlnet_hidden_states=given, **arguments, return_dict=False)[0]


@pytest.mark.parametrize("num_layers", [3, 5, 12, None], ids=str)
def test_injection_is_stock_s_where_that_is_right_and_exact_elsewhere(world, num_layers):
    controlnet = world.teacher if num_layers is None else world.student(num_layers)
    groups, blocks = site_groups(controlnet, world.backbone.num_blocks - 1), world.backbone.num_blocks
    with torch.no_grad():
        residuals = world.residuals(controlnet)
        given = [residuals[layer] for layer, group in enumerate(groups) for _ in group]
        expected, stock = by_stock(world, [*given, given[-1]]), by_stock(world, residuals)
        velocity = [LATENTS, SIGMAS, EMBEDS, POOLED, residuals]
        ours = predict_velocity(world.transformer, *velocity, injection_of(controlnet))
        assert torch.equal(ours, expected)
        assert torch.equal(predict_velocity(world.transformer, *velocity, "diffusers"), stock)
    right = stock_injects_exactly(len(residuals), blocks, own_layer_of_site(controlnet))
    assert torch.equal(ours, stock) == right
    even = blocks == 24 and not world.transformer.config["qk_norm"]
    assert right == (2 * len(residuals) <= blocks and not (even and num_layers == 5))


def test_many_to_one_groups_cover_every_site_once(world):
    groups = site_groups(world.student(6, "random"), world.backbone.num_blocks - 1)
    assert [site for group in groups for site in group] == list(range(world.backbone.num_blocks - 1))
    assert len(groups) == 6
    layers = [0] * (world.backbone.num_blocks - 2) + [1]
    assert site_groups(world.student(2, layers=layers), len(layers))[1] == [len(layers) - 1]


def test_a_student_of_the_teacher_has_its_last_layer_of_each_group(world):
    student, sites = build_student(world.transformer, world.teacher, 5, "teacher", 0), world.backbone.num_blocks - 1
    of_site = layer_of_site(len(world.teacher.transformer_blocks), sites)
    sources = [of_site[group[-1]] for group in site_groups(student, sites)]
    for part in ("transformer_blocks", "controlnet_blocks"):
        for layer, source in enumerate(sources):
            copied, block = getattr(student, part)[layer], getattr(world.teacher, part)[source]
            assert all(torch.equal(copied.state_dict()[name], value) for name, value in block.state_dict().items())
    dual = world.teacher.config["dual_attention_layers"]
    assert student.config["dual_attention_layers"] == tuple(i for i, s in enumerate(sources) if s in dual)
    if world.name == "SD3.5-medium":
        assert sources == [4, 9, 14, 19, 22]
        assert student.config["dual_attention_layers"] == (0, 1)


def test_a_teacher_with_a_map_of_its_own_is_followed(world):
    sites = world.backbone.num_blocks - 1
    teacher = world.student(3, layers=[0] * (sites - 2) + [1, 2])
    student = build_student(world.transformer, teacher, 2, "teacher", 0)
    for layer, source in ((0, 0), (1, 2)):
        assert torch.equal(student.controlnet_blocks[layer].weight, teacher.controlnet_blocks[source].weight)


@pytest.mark.parametrize("init", ["transformer", "random"])
def test_a_student_of_the_transformer_or_of_nothing_is_of_the_teacher_s_kind(world, init):
    student = build_student(world.transformer, world.teacher, 14, init, 0)
    own = student.state_dict()
    same = [torch.equal(own[n], v) for n, v in world.transformer.state_dict().items() if n in own and v.dim() > 1]
    assert all(same) if init == "transformer" else not all(same)
    keys = ("joint_attention_dim", "use_pos_embed", "force_zeros_for_pooled_projection", "extra_conditioning_channels")
    assert [student.config[key] for key in keys] == [world.teacher.config[key] for key in keys]
    blocks = {type(block) for block in (*student.transformer_blocks, *world.teacher.transformer_blocks)}
    assert len(blocks) == 1
    first = tuple(layer for layer in world.transformer.config["dual_attention_layers"] if layer < 14)
    assert tuple(student.config["dual_attention_layers"]) == first
    assert not torch.cat([p.flatten() for p in student.controlnet_blocks.parameters()]).any()


def test_the_pooled_projection_is_read_where_the_family_says_so(world):
    with torch.no_grad():
        zero, real = world.residuals(world.teacher, torch.zeros(2, 64)), world.residuals(world.teacher)
    assert torch.equal(zero[-1], real[-1]) != find_family(world.transformer.config, world.teacher.config).pooled


def test_a_folder_holds_the_network_and_no_more(world, tmp_path):
    student = world.student(5)
    with torch.no_grad():
        expected = world.residuals(student)
        stock_pipeline(world, injected(student, world.backbone.num_blocks))  # stock gives that one positions
        save_controlnet(student, tmp_path / "s", world.backbone.num_blocks)
        loaded = load_student(world.backbone, tmp_path / "s")[1]
        assert all(torch.equal(a, b) for a, b in zip(world.residuals(loaded), expected, strict=True))
    assert site_groups(loaded, world.backbone.num_blocks - 1) == site_groups(student, world.backbone.num_blocks - 1)
    stock = SD3ControlNetModel.from_pretrained(tmp_path / "s").state_dict()
    assert stock.keys() == student.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, stock[name]) for name, value in student.state_dict().items())


def test_channels_that_a_config_leaves_out_are_those_of_the_weights(world, tmp_path):
    world.student(2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    extra = config.pop("extra_conditioning_channels")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_controlnet(tmp_path).config["extra_conditioning_channels"] == extra
    (tmp_path / "config.json").write_text(json.dumps({**config, "extra_conditioning_channels": 2}))
    with pytest.raises(InvalidInputError, match="another shape for 1 tensors, first pos_embed_input"):
        load_controlnet(tmp_path)


def test_a_training_step_reaches_every_parameter_of_the_student(world):
    student = world.student(5, "transformer")
    networks = Networks(world.backbone, world.teacher, student)
    extra = world.teacher.config["extra_conditioning_channels"]
    mask = torch.zeros(2, 1, 8, 8)
    batch = Batch(LATENTS, COND, mask if extra else None, EMBEDS, POOLED, range(2), 2)
    losses = Distillation(networks, KINDS["self_supervised"], LossWeights()).losses(batch, Draw(0, "s", 0, range(2)))
    losses.loss.backward()
    grads = {name: p.grad for name, p in trainable_parameters(student).items()}
    assert losses.loss.isfinite()
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads.values())
    still = {name for name, grad in grads.items() if not grad.any() and "_k." not in name}
    pooled = find_family(world.transformer.config, student.config).pooled  # else zeros, which no weight multiplies
    unread = set() if pooled else {"time_text_embed.text_embedder.linear_1.weight"}
    queries = "transformer_blocks.4.attn.add_q_proj", "transformer_blocks.4.attn.norm_added_q"  # of the last text
    assert {name for name in still if not name.startswith(queries)} == unread
    assert all(p.grad is None for p in world.transformer.parameters())


def stock_pipeline(world, controlnet):
    components = {**world.backbone.pipeline.components, "controlnet": controlnet}
    pipeline = StableDiffusion3ControlNetPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class CardsProcessor(VaeImageProcessor):
    """What the card of stabilityai's canny ControlNet has stock make of edges."""

    def __init__(self):
        super().__init__(do_normalize=False)

    def preprocess(self, image, **how):
        return 255 * super().preprocess(image, **how) / 2 + 1 / 2

    def postprocess(self, image, output_type, **_):
        return super().postprocess(image, output_type, [True] * len(image))


@pytest.mark.parametrize(("guidance", "condition"), [(1.0, "depth"), (3.0, "depth"), (1.0, "canny")])
def test_a_picture_is_the_one_of_the_stock_pipeline(world, tmp_path, guidance, condition):
    """A student's folder by stock alone, and our sampling of the condition's mean."""
    if world.teacher.config["extra_conditioning_channels"]:
        return  # tests/pipeline/test_painting.py compares pictures of the inpainting pipeline
    student, backbone, vae = world.student(4), world.backbone, world.backbone.vae
    take_condition(student, condition, "the student")
    encoding = condition_encoding(student.config)
    assert encoding.levels == ((0.5, 128) if (world.name, condition) == ("SD3.5-large", "canny") else (-1, 1))
    if condition == "canny" and encoding.levels == (-1, 1):
        return  # as depth
    picture = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    text, empty = (backbone.encode_prompts([words]) for words in ("a red circle", ""))
    sampler = SamplerConfig(num_inference_steps=2, guidance_scale=guidance, conditioning_scale=0.8, sigmas="even")
    save_controlnet(student, tmp_path / "s", backbone.num_blocks)
    with torch.no_grad():
        cond = backbone.encode_condition(from_images(picture[None]), encoding)
        latents = complete_latents(backbone, student, cond, text, empty, sampler, LATENTS[:1])
        ours = (decode_latents(vae, latents) / 2 + 0.5).clamp(0, 1)
        given = {"num_inference_steps": 2, "sigmas": flow.even_sigmas(2)[:-1].tolist(), "guidance_scale": guidance}
        given |= {"controlnet_conditioning_scale": 0.8, "latents": LATENTS[:1].clone(), "max_sequence_length": 0}
        pipeline = stock_pipeline(world, SD3ControlNetModel.from_pretrained(tmp_path / "s"))
        if encoding.levels != (-1, 1):
            pipeline.image_processor = CardsProcessor()
        given |= {"control_image": Image.fromarray(picture), "height": 64, "width": 64, "output_type": "pt"}
        stock = pipeline("a red circle", **given).images
    torch.testing.assert_close(ours, stock, rtol=0, atol=2e-5)


def test_a_cache_holds_edges_in_the_levels_of_its_teacher(world, tmp_path):
    """The samples say what they are; the teacher's config does not."""
    if world.name != "SD3.5-large":
        return  # tests/training/test_conditions.py reads caches of the others
    teacher, pipeline = world.student(2), world.backbone.pipeline
    edges, full = np.zeros((64, 64, 3), np.uint8), np.ones((64, 64), bool)
    edges[20:24] = 255
    photo = Photo("a", edges, full, "a red circle", "a red circle", {}, edges)
    for kind, levels in (("depth", (-1, 1)), ("canny", (0.5, 128))):
        backbone = Backbone(type(pipeline)(**{**pipeline.components, "controlnet": teacher}), max_sequence_length=0)
        write_cache([photo], tmp_path / kind, backbone, UNLABELED, source={}, condition=kind)
        cache = Cache(tmp_path / kind)
        assert cache.encoding == (True, levels)
        black, white = levels
        pixels = torch.where(from_images(edges[None]) > 0, white, black)
        torch.testing.assert_close(
            cache.take("cond_latents", [0]), backbone.encode_images(pixels), rtol=1e-5, atol=1e-5
        )


def test_the_shift_of_a_condition_may_be_stated():
    zero = {"num_layers": 6, "joint_attention_dim": 64}
    for stated, shift in (({}, False), ({"condition_shift": True}, True)):
        family = find_family({"num_layers": 24}, {**zero, **stated})
        assert (family.pooled, family.shift) == (False, shift)


JOINT = {"num_layers": 23, "joint_attention_dim": 4096}


@pytest.mark.parametrize(
    ("transformer", "controlnet", "words"),
    [
        ({"qk_norm": "layer_norm"}, JOINT, "the transformer normalises queries by layer_norm"),
        ({"dual_attention_layers": [0, 1]}, JOINT, r"dual attention in blocks \[0, 1\], as none of SD3-medium"),
        ({}, {**JOINT, "joint_attention_dim": None}, "reads no prompt, as none that is known of SD3-medium does"),
        ({}, {**JOINT, "use_pos_embed": False}, "has no table of positions, as none that is known of SD3-medium"),
        ({}, {**JOINT, "qk_norm": "rms_norm"}, "normalises queries by rms_norm, as"),
        ({}, {**JOINT, "dual_attention_layers": [0]}, r"has dual attention in layers \[0\], as"),
        ({}, {**JOINT, "extra_conditioning_channels": 3}, "reads 3 channels beside the latents, as"),
        (MEDIUM, JOINT, "normalises queries by None, as none that is known of SD3.5-medium does"),
        (MEDIUM, {**JOINT, **MEDIUM, "dual_attention_layers": [23]}, r"dual attention in layers \[23\]"),
        (LARGE, {**SINGLE, "use_pos_embed": True}, "has a table of positions, as none that is known of SD3.5-large"),
        (LARGE, {**SINGLE, "extra_conditioning_channels": 1}, "reads 1 channels"),
    ],
)
def test_what_is_not_known_is_refused_by_what_is_different(transformer, controlnet, words):
    with pytest.raises(InvalidInputError, match=words):
        find_family({"num_layers": 24, **transformer}, controlnet, "here")
