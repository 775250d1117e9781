"""FLUX students of tiny random models of the exact classes, held against the installed diffusers."""

from itertools import pairwise

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxTransformer2DModel,
)

from refine_control import flow, losses
from refine_control.baselines.flux import schedule
from refine_control.config import LossWeights
from refine_control.errors import InvalidInputError
from refine_control.models import flux
from refine_control.models.families import find_family
from refine_control.models.loading import load_controlnet, load_painter

SIZE = {"in_channels": 16, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 8}
SIZE |= {"pooled_projection_dim": 8, "guidance_embeds": True, "axes_dims_rope": (2, 2, 4)}
BLOCKS = (7, 9)


def randomised(network, seed):
    """The network with noise in every weight, those that are zero at birth too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def controlnet(double, single, seed=1, **more):
    component = flux.FluxInpaintingControlNet if "extra_condition_channels" in more else FluxControlNetModel
    return randomised(component(num_layers=double, num_single_layers=single, **{**SIZE, **more}), seed)


@pytest.fixture(scope="module")
def transformer():
    double, single = BLOCKS
    network = randomised(FluxTransformer2DModel(num_layers=double, num_single_layers=single, **SIZE), 0)
    return network.requires_grad_(False)


def family_of(transformer, net=None):
    return find_family(transformer.config, None if net is None else net.config)


@pytest.fixture(scope="module")
def drawn():
    """Noisy tokens (2,4,16), a sigma for each, and a condition."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    condition = flux.Condition(draw(2, 4, 16), draw(2, 3, 8), draw(2, 8), 3.5, 0.7, (4, 4))
    return draw(2, 4, 16), torch.tensor([0.3, 0.8]), condition


def injected(transformer, net, drawn):
    """Residuals one for each block, and the velocity with them."""
    maps = flux.site_maps(net, family_of(transformer))
    residuals = flux.control_residuals(net, *drawn)
    return residuals, flux.velocity(transformer, flux.at_sites(residuals, maps), *drawn)


# families


@pytest.mark.parametrize(
    ("layers", "reads", "scale"),
    [((6, 0, 4), 5, 0.9), ((6, 0, 0), 5, 0.5), ((4, 1, 0), 4, 0.5), ((5, 10, 0), 5, 0.5)],
)
def test_published_flux_controlnets_are_known(layers, reads, scale):
    double, single, extra = layers
    published = {"num_layers": double, "num_single_layers": single, "extra_condition_channels": extra}
    family = find_family({"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}, published)
    assert (family.name, family.pooled, family.shift, family.guidance) == ("FLUX.1", True, True, True)
    assert [sites.count for sites in family.sites] == [19, 38]
    assert family.conditioning_scale == scale
    assert double - len(family.sites[0].dead_layers(double)) == reads


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_mode": 10}, "chooses one of 10 kinds of condition by a number"),
        ({"conditioning_embedding_channels": 16}, "embeds the picture by convolutions"),
        ({"extra_condition_channels": 3}, "reads 3 channels beside"),
        ({"num_layers": 20}, "has 20 double layers"),
        ({"num_single_layers": 39}, "has 39 single layers"),
        ({"num_layers": 0}, "has no layers"),
    ],
)
def test_unknown_flux_controlnets_are_refused(changed, message):
    given = {"num_layers": 6, "num_single_layers": 0, **changed}
    with pytest.raises(InvalidInputError, match=f"{message}.*as none that is known of FLUX"):
        find_family({"num_layers": 19, "num_single_layers": 38}, given)


def test_controlnets_of_sd3_and_flux_are_not_exchanged(transformer, tiny_backbone):
    teacher = tiny_backbone.pipeline.controlnet
    with pytest.raises(InvalidInputError, match="has no single layers in its config"):
        family_of(transformer, teacher)
    with pytest.raises(InvalidInputError, match="has single layers beside double ones"):
        find_family(tiny_backbone.transformer.config, controlnet(2, 3).config)


# injection


@pytest.mark.parametrize("layers", [(6, 0), (5, 8), (1, 1), (0, 4), (7, 9)])
def test_a_published_controlnet_is_injected_as_stock_does_it(transformer, drawn, layers):
    net = controlnet(*layers)
    with torch.no_grad():
        residuals, ours = injected(transformer, net, drawn)
        stock = flux.velocity(transformer, residuals, *drawn)
        silent = flux.velocity(transformer, flux.Residuals(None, None), *drawn)
    assert torch.equal(ours, stock)
    assert not torch.allclose(ours, silent, atol=1e-3)


@pytest.mark.parametrize("layers", [(4, 5), (2, 3), (3, 9), (7, 1), (5, 6)])
def test_a_student_has_stocks_groups_where_they_use_every_layer_else_even_ones(transformer, drawn, layers):
    student = randomised(flux.build_student(transformer, None, *layers, "transformer", 0), 3)
    family = family_of(transformer)
    maps = flux.site_maps(student, family)
    for sites, count, layer_of_site in zip(family.sites, layers, maps, strict=True):
        stock = sites.stock(count)
        dead = sites.dead_layers(count)
        assert sorted(set(layer_of_site)) == list(range(count))
        assert (layer_of_site == stock) == (not dead)
        assert (f"layer_of_{sites.blocks}" in student.config) == bool(dead)
    with torch.no_grad():
        residuals, ours = injected(transformer, student, drawn)
        stock = flux.velocity(transformer, residuals, *drawn)
    assert torch.equal(ours, stock) == all(not s.dead_layers(n) for s, n in zip(family.sites, layers, strict=True))


# students


@pytest.mark.parametrize("init", ["transformer", "teacher", "random"])
@pytest.mark.parametrize("extra", [0, 4])
def test_a_student_is_born_of_the_transformer_the_teacher_or_nothing(transformer, init, extra):
    more = {"extra_condition_channels": extra} if extra else {}
    teacher = controlnet(6, 5, **more)
    config = dict(transformer.config)
    student = flux.build_student(transformer, teacher, 2, 3, init, 4)
    again = flux.build_student(transformer, teacher, 2, 3, init, 4)
    assert dict(transformer.config) == config
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    assert student.controlnet_x_embedder.in_features == 16 + extra
    assert (len(student.controlnet_blocks), len(student.controlnet_single_blocks)) == (2, 3)
    source = transformer if init == "transformer" else teacher
    # stock's groups: double blocks 0-3 and 4-6 of the student; the teacher's layer of block i is i // 2
    chosen = [[1, 3], [1, 2, 4]] if init == "teacher" else [[0, 1], [0, 1, 2]]

    def equal(part, number, layer):
        pairs = zip(getattr(student, part)[layer].parameters(), getattr(source, part)[number].parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    for part, numbers in zip(("transformer_blocks", "single_transformer_blocks"), chosen, strict=True):
        assert all(equal(part, n, layer) for layer, n in enumerate(numbers)) == (init != "random")
    zero = [not any(p.any() for p in block.parameters()) for block in student.controlnet_blocks]
    assert zero == [init != "teacher"] * 2
    if init == "teacher":
        assert all(equal("controlnet_single_blocks", n, layer) for layer, n in enumerate(chosen[1]))
        assert torch.equal(student.controlnet_x_embedder.weight, teacher.controlnet_x_embedder.weight)
    if init != "random":
        assert torch.equal(student.x_embedder.weight, source.x_embedder.weight)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((8, 0), "8 double layers: this transformer admits 0 to 7"),
        ((2, 3), "3 single layers and the teacher 0"),
        ((0, 0), "at least one"),
    ],
)
def test_numbers_of_layers_that_do_not_suit_are_refused(transformer, layers, message):
    with pytest.raises(InvalidInputError, match=message):
        flux.build_student(transformer, controlnet(6, 0), *layers, "transformer", 0)


def test_a_teacher_of_another_width_is_refused(transformer):
    with pytest.raises(InvalidInputError, match="teacher's num_attention_heads is 3 and the transformer's 2"):
        flux.build_student(transformer, controlnet(6, 0, num_attention_heads=3), 2, 0, "random", 0)


@pytest.mark.parametrize("extra", [0, 4])
def test_a_saved_student_is_loaded_strictly_and_by_stock(transformer, drawn, tmp_path, extra):
    tokens, sigma, condition = drawn
    more = {"extra_condition_channels": extra} if extra else {}
    teacher = controlnet(6, 5, **more)
    condition = condition._replace(control=torch.cat([condition.control, torch.ones(2, 4, extra)], 2))
    student = randomised(flux.build_student(transformer, teacher, 5, 2, "transformer", 0), 3)
    flux.save_flux_controlnet(student, tmp_path / "student", kind="student")
    family = family_of(transformer)
    loaded = flux.load_flux_controlnet(tmp_path / "student", family)
    with torch.no_grad():
        _, ours = injected(transformer, student, (tokens, sigma, condition))
        assert torch.equal(injected(transformer, loaded, (tokens, sigma, condition))[1], ours)
    assert flux.site_maps(loaded, family) == flux.site_maps(student, family)
    assert flux.site_maps(student, family)[0] != family.sites[0].stock(5)
    if not extra:
        stock = FluxControlNetModel.from_pretrained(tmp_path / "student")
        assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), student.parameters(), strict=True))


def test_a_folder_whose_map_is_none_is_refused(transformer, tmp_path):
    student = flux.build_student(transformer, None, 5, 2, "transformer", 0)
    student.register_to_config(layer_of_transformer_blocks=[0, 1, 2, 3, 4])
    flux.save_flux_controlnet(student, tmp_path / "student")
    with pytest.raises(InvalidInputError, match="layer_of_transformer_blocks is no map of 7 blocks to 5 layers"):
        flux.load_flux_controlnet(tmp_path / "student", family_of(transformer))


# training


def losses_of(transformer, teacher, student, drawn, feature=1.0):
    """Eq. 4 and Eq. 5 of one batch."""
    family = family_of(transformer)
    with torch.no_grad():
        taught, target = injected(transformer, teacher, drawn)
    learnt, answer = injected(transformer, student, drawn)
    maps = [flux.site_maps(net, family) for net in (teacher, student)]
    features = flux.feature_losses(taught, learnt, *maps)
    weights = LossWeights(task=0, output=1, feature=feature)
    return losses.combine(weights, output=losses.output_loss(target, answer), features=features)


@pytest.mark.parametrize("feature", [0.0, 1.0])
@pytest.mark.parametrize(("taught", "learnt"), [((6, 5), (2, 3)), ((6, 0), (3, 0))])
def test_a_training_step_lowers_the_loss_and_reaches_every_parameter(transformer, drawn, taught, learnt, feature):
    teacher = controlnet(*taught).requires_grad_(False)
    student = flux.build_student(transformer, teacher, *learnt, "teacher", 0)
    parameters = flux.trainable_parameters(student)
    frozen = {name for name, _ in student.named_parameters()} - parameters.keys()
    assert {name.split(".")[2] for name in frozen} == (set() if learnt[1] else {"attn", "ff_context"})
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    before = losses_of(transformer, teacher, student, drawn, feature)
    assert before.feature_losses.shape == (sum(learnt),)
    before.loss.backward()
    assert {name for name, p in parameters.items() if p.grad is None or not p.grad.isfinite().all()} == set()
    optimizer.step()
    after = losses_of(transformer, teacher, student, drawn, feature)
    assert after.loss < before.loss
    assert after.loss.isfinite()


def test_equation_5_holds_for_each_kind_of_block_by_itself(transformer):
    family = family_of(transformer)
    teacher, student = controlnet(6, 5), flux.build_student(transformer, None, 2, 3, "random", 0)
    generator = torch.Generator().manual_seed(0)
    given = flux.Residuals(*(list(torch.randn(n, 1, 2, 3, generator=generator)) for n in (6, 5)))
    maps = flux.site_maps(teacher, family), flux.site_maps(student, family)
    # 7 double blocks read the teacher's layers 0 0 1 1 2 2 3, the student's 0 0 0 0 1 1 1;
    # 9 single ones 0 0 1 1 2 2 3 3 4 and 0 0 0 1 1 1 2 2 2
    double, single = given
    means = [
        [(2 * double[0] + 2 * double[1]) / 4, (2 * double[2] + double[3]) / 3],
        [(2 * single[0] + single[1]) / 3, (single[1] + 2 * single[2]) / 3, (2 * single[3] + single[4]) / 3],
    ]
    assert flux.feature_losses(given, flux.Residuals(*means), *maps).max() < 1e-10
    moved = flux.Residuals(means[0], [means[1][0], means[1][1], means[1][2] + 1])
    torch.testing.assert_close(flux.feature_losses(given, moved, *maps), torch.tensor([0, 0, 0, 0, 9.0]))


# pictures


@pytest.mark.parametrize("layers", [(2, 3), (6, 0)])
def test_a_picture_is_that_of_the_stock_pipeline(transformer, layers):
    torch.manual_seed(2)
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.36,
        shift_factor=0.12,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    net = controlnet(*layers)
    pipeline = FluxControlNetPipeline(scheduler, vae, None, None, None, None, transformer, net)
    generator = torch.Generator().manual_seed(3)
    noise, picture = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 16, 16, generator=generator)
    embeds, pooled = torch.randn(1, 3, 8, generator=generator), torch.randn(1, 8, generator=generator)
    with torch.no_grad():
        stock = pipeline(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            control_image=picture,
            height=16,
            width=16,
            num_inference_steps=3,
            guidance_scale=3.5,
            controlnet_conditioning_scale=0.6,
            latents=flux.pack(noise),
            generator=torch.Generator().manual_seed(4),
            output_type="pt",
        ).images
        drawn = vae.encode(picture).latent_dist.sample(torch.Generator().manual_seed(4))
        condition = flux.Condition(flux.pack((drawn - 0.12) * 0.36), embeds, pooled, 3.5, 0.6, (8, 8))
        tokens, sigmas = flux.pack(noise), schedule(scheduler, 3, 16)
        for sigma, following in pairwise(sigmas):
            v = injected(transformer, net, (tokens, sigma, condition))[1]
            tokens = flow.euler_step(tokens, v, sigma[None], following[None])
        ours = vae.decode(flux.unpack(tokens, 8, 8) / 0.36 + 0.12).sample
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), stock, rtol=0, atol=1e-5)


# folders


def test_a_flux_folder_is_refused_where_sd3_is_needed(tmp_path):
    controlnet(2, 0).save_pretrained(tmp_path / "net")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    for refused in (
        lambda: load_controlnet(tmp_path / "net"),
        lambda: load_painter("mini", tmp_path / "net"),
        lambda: load_painter(tmp_path / "model"),
    ):
        with pytest.raises(InvalidInputError, match=r"holds a Flux\w+: FLUX has single blocks.*SD3 is needed here"):
            refused()
