"""FLUX students of tiny random models of the exact classes, held against the installed diffusers."""

import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxTransformer2DModel

from refine_control import losses
from refine_control.config import LossWeights, SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.export.exporting import export_format
from refine_control.export.format import Work, find_format
from refine_control.export.source import Samples, Source
from refine_control.injection import sites_of_layer
from refine_control.models import flux
from refine_control.models.backbone import predict_velocity
from refine_control.models.controlnet import (
    Control,
    build_student,
    control_residuals,
    equal_layer_of_site,
    injection_of,
    join,
    own_layer_of_site,
    site_groups,
    site_residuals,
    trainable_parameters,
)
from refine_control.models.families import find_family, layer_counts
from refine_control.models.fit import check_controlnet
from refine_control.models.loading import load_controlnet, load_painter, load_student, save_controlnet
from refine_control.pipeline.painting import complete_latents

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


def controlnet(double, single, seed=1, transformer=None, **more):
    component = flux.FluxInpaintingControlNet if "extra_condition_channels" in more else FluxControlNetModel
    net = randomised(component(num_layers=double, num_single_layers=single, **{**SIZE, **more}), seed)
    if transformer is not None:
        join(net, transformer)
    return net


@pytest.fixture(scope="module")
def transformer():
    double, single = BLOCKS
    network = randomised(FluxTransformer2DModel(num_layers=double, num_single_layers=single, **SIZE), 0)
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def drawn():
    """Noisy latents (2,4,4,4), a sigma for each, prompt embeddings, a condition, and pooled embeddings."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return draw(2, 4, 4, 4), torch.tensor([0.3, 0.8]), draw(2, 3, 8), draw(2, 4, 4, 4), draw(2, 8)


def answer(transformer, net, drawn, injection="exact"):
    """Residuals by layer, and the velocity with them."""
    latents, sigmas, embeds, _, pooled = drawn
    residuals = control_residuals(net, *drawn, conditioning_scale=0.7, guidance=3.5)
    asked = latents, sigmas, embeds, pooled, residuals, injection_of(net, injection)
    return residuals, predict_velocity(transformer, *asked, guidance=3.5)


def by_stock(transformer, net, drawn):
    """The velocity as stock's pipeline computes it of packed tokens."""
    latents, sigmas, embeds, cond, pooled = drawn
    given = {"timestep": sigmas, "guidance": torch.full((2,), 3.5), "encoder_hidden_states": embeds}
    given |= {"pooled_projections": pooled, "txt_ids": torch.zeros(3, 3), "return_dict": False}
    given |= {"img_ids": FluxControlNetPipeline._prepare_latent_image_ids(2, 2, 2, "cpu", torch.float32)}
    tokens, control = (FluxControlNetPipeline._pack_latents(each, 2, each.shape[1], 4, 4) for each in (latents, cond))
    double, single = net(hidden_states=tokens, controlnet_cond=control, conditioning_scale=0.7, **given)
    injected = {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
    tokens = transformer(hidden_states=tokens, **injected, **given)[0]
    return FluxControlNetPipeline._unpack_latents(tokens, 4, 4, 1)


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
        ({"num_layers": 0}, "has no double layers"),
    ],
)
def test_unknown_flux_controlnets_are_refused(changed, message):
    given = {"num_layers": 6, "num_single_layers": 0, **changed}
    with pytest.raises(InvalidInputError, match=f"{message}.*as none that is known of FLUX"):
        find_family({"num_layers": 19, "num_single_layers": 38}, given)


def test_controlnets_of_sd3_and_flux_are_not_exchanged(transformer, tiny_backbone):
    teacher = tiny_backbone.pipeline.controlnet
    with pytest.raises(InvalidInputError, match="has no single layers in its config"):
        check_controlnet(teacher.config, transformer.config, "here")
    with pytest.raises(InvalidInputError, match="has single layers beside double ones"):
        check_controlnet(controlnet(2, 3).config, tiny_backbone.transformer.config, "here")


# injection


@pytest.mark.parametrize("layers", [(6, 0), (5, 8), (1, 1), (7, 9)])
def test_a_published_controlnet_is_injected_as_stock_does_it(transformer, drawn, layers):
    net = controlnet(*layers, transformer=transformer)
    with torch.no_grad():
        _, ours = answer(transformer, net, drawn)
        stock = by_stock(transformer, net, drawn)
        silent = predict_velocity(transformer, *drawn[:3], drawn[4], guidance=3.5)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-6)
    assert not torch.allclose(ours, silent, atol=1e-3)


@pytest.mark.parametrize("layers", [(4, 5), (2, 3), (3, 9), (7, 1), (5, 6), (5, 0)])
def test_a_student_has_stocks_groups_where_they_use_every_layer_else_even_ones(transformer, drawn, layers):
    teacher = controlnet(6, bool(layers[1]), transformer=transformer)
    student = randomised(build_student(transformer, teacher, layers[0], "random", 0, num_single_layers=layers[1]), 3)
    placed, kinds, first = own_layer_of_site(student), find_family(transformer.config).sites, 0
    assert sites_of_layer(placed) == site_groups(student, sum(BLOCKS))
    assert sorted(set(placed)) == list(range(sum(layers)))
    for kind, count in zip(kinds, layers, strict=True):
        of_kind, placed = placed[: kind.count], placed[kind.count :]
        if count:
            assert ([layer - first for layer in of_kind] == kind.stock(count)) == (not kind.dead_layers(count))
        first += count
    with torch.no_grad():
        ours, stock = (answer(transformer, student, drawn, rule)[1] for rule in ("exact", "diffusers"))
        torch.testing.assert_close(stock, by_stock(transformer, student, drawn), rtol=0, atol=1e-6)
    dead = any(kind.dead_layers(count) for kind, count in zip(kinds, layers, strict=True) if count)
    assert torch.allclose(ours, stock, atol=1e-6) == (not dead)


def test_residuals_of_several_controlnets_are_added_site_by_site(transformer, drawn):
    """One has no single layers: its residuals are those of the double blocks alone."""
    nets = [controlnet(6, 0, transformer=transformer), controlnet(3, 2, seed=2, transformer=transformer)]
    latents, sigmas, embeds, cond, pooled = drawn
    asked = latents, sigmas, embeds, pooled, sum(BLOCKS)
    with torch.no_grad():
        alone = [site_residuals([Control(net, cond)], *asked) for net in nets]
        for order in ((0, 1), (1, 0)):
            both = site_residuals([Control(nets[number], cond) for number in order], *asked)
            assert len(both) == sum(BLOCKS)
            torch.testing.assert_close(both[:7], [a + b for a, b in zip(*alone, strict=False)])
            assert all(torch.equal(a, b) for a, b in zip(both[7:], alone[1][7:], strict=True))


# students


@pytest.mark.parametrize("init", ["transformer", "teacher", "random"])
@pytest.mark.parametrize("extra", [0, 4])
def test_a_student_is_born_of_the_transformer_the_teacher_or_nothing(transformer, init, extra):
    more = {"extra_condition_channels": extra} if extra else {}
    teacher = controlnet(6, 5, transformer=transformer, **more)
    config = dict(transformer.config)
    student, again = (build_student(transformer, teacher, 2, init, 4, num_single_layers=3) for _ in range(2))
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
        ((8, 0), r"student\.num_layers is 8; this transformer admits 1 to 7"),
        ((2, 10), r"student\.num_single_layers is 10; this transformer admits 0 to 9"),
        ((2, 3), "num_single_layers is 3 and the teacher has 0 single layers"),
    ],
)
def test_numbers_of_layers_that_do_not_suit_are_refused(transformer, layers, message):
    with pytest.raises(InvalidInputError, match=message):
        build_student(transformer, controlnet(6, 0), layers[0], "transformer", 0, num_single_layers=layers[1])


def test_sd3_has_no_single_layers(tiny_backbone):
    with pytest.raises(InvalidInputError, match=r"num_single_layers is 1; this transformer admits 0 to 0"):
        build_student(tiny_backbone.transformer, None, 2, "transformer", 0, num_single_layers=1)


def test_a_teacher_of_another_width_is_refused(transformer):
    with pytest.raises(InvalidInputError, match="its width is 24, that of the transformer 16"):
        check_controlnet(controlnet(6, 0, num_attention_heads=3).config, transformer.config, "here")


# training


def losses_of(transformer, teacher, student, drawn, feature=1.0):
    """Eq. 4 and Eq. 5 of one batch."""
    with torch.no_grad():
        taught, target = answer(transformer, teacher, drawn)
    learnt, velocity = answer(transformer, student, drawn)
    at_sites = [taught[layer] for layer in own_layer_of_site(teacher)]
    targets = losses.group_targets(at_sites, site_groups(student, sum(BLOCKS)))
    weights, features = LossWeights(task=0, output=1, feature=feature), losses.layer_losses(targets, learnt)
    return losses.combine(weights, output=losses.output_loss(target, velocity), features=features)


@pytest.mark.parametrize("feature", [0.0, 1.0])
@pytest.mark.parametrize(("taught", "learnt"), [((6, 5), (2, 3)), ((6, 0), (3, 0))])
def test_a_training_step_lowers_the_loss_and_reaches_every_parameter(transformer, drawn, taught, learnt, feature):
    teacher = controlnet(*taught, transformer=transformer).requires_grad_(False)
    student = build_student(transformer, teacher, learnt[0], "teacher", 0, num_single_layers=learnt[1])
    parameters = trainable_parameters(student)
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
    teacher = controlnet(6, 5, transformer=transformer)
    student = build_student(transformer, teacher, 2, "random", 0, num_single_layers=3)
    f = list(torch.randn(11, 1, 2, 3, generator=torch.Generator().manual_seed(0)))
    # 7 double blocks read the teacher's layers 0 0 1 1 2 2 3, the student's 0 0 0 0 1 1 1;
    # 9 single ones 6 6 7 7 8 8 9 9 10 and 2 2 2 3 3 3 4 4 4
    assert own_layer_of_site(teacher) == [0, 0, 1, 1, 2, 2, 3, 6, 6, 7, 7, 8, 8, 9, 9, 10]
    means = [(2 * f[0] + 2 * f[1]) / 4, (2 * f[2] + f[3]) / 3]
    means += [(2 * f[6] + f[7]) / 3, (f[7] + 2 * f[8]) / 3, (2 * f[9] + f[10]) / 3]
    targets = losses.group_targets([f[layer] for layer in own_layer_of_site(teacher)], site_groups(student, 16))
    assert losses.layer_losses(targets, means).max() < 1e-10
    moved = losses.layer_losses(targets, [*means[:4], means[4] + 1])
    torch.testing.assert_close(moved, torch.tensor([0, 0, 0, 0, 9.0]))


# folders and pictures, of the model in a folder


@pytest.fixture(scope="module")
def painters(tiny_flux):
    """The model around each teacher."""
    return {kind: load_painter(tiny_flux / "model", tiny_flux / kind) for kind in ("inpaint", "plain")}


def student_of(painters, kind, *layers):
    backbone, teacher = painters[kind]
    single = {"num_single_layers": layers[1]}
    return randomised(build_student(backbone.transformer, teacher, layers[0], "transformer", 0, **single), 3)


@pytest.mark.parametrize(("kind", "layers"), [("inpaint", (3, 0)), ("inpaint", (5, 0)), ("plain", (2, 1))])
def test_a_saved_student_is_loaded_strictly_and_by_stock(painters, tmp_path, caplog, kind, layers):
    backbone, student = painters[kind][0], student_of(painters, kind, *layers)
    save_controlnet(student, tmp_path / "student", backbone.num_blocks, kind="student")
    assert ("stock diffusers injects" in caplog.text) == (layers == (5, 0))
    _, loaded = load_student(backbone, tmp_path / "student")
    assert type(loaded) is type(student)
    assert layer_counts(loaded.config) == layers
    assert own_layer_of_site(loaded) == own_layer_of_site(student) == equal_layer_of_site(layers, backbone.transformer)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), student.parameters(), strict=True))
    if kind == "plain":
        stock = FluxControlNetModel.from_pretrained(tmp_path / "student")
        assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), student.parameters(), strict=True))


def test_a_folder_whose_map_is_none_is_refused(painters, tmp_path):
    student = student_of(painters, "plain", 2, 1)
    student.register_to_config(layer_of_site=[0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2])  # a single layer at a double block
    save_controlnet(student, tmp_path / "student", 7)
    with pytest.raises(InvalidInputError, match=r"layer_of_site .* is not the layer of each of 11 sites"):
        load_student(painters["plain"][0], tmp_path / "student")


def test_folders_of_other_models_are_refused(tiny_flux, tiny_backbone):
    with pytest.raises(InvalidInputError, match="has single layers beside double ones"):
        load_student(tiny_backbone, tiny_flux / "inpaint")
    for net, words in (
        ("edge", "the ControlNet of edge has no single layers in its config"),
        (None, "holds no ControlNet; name one"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            load_painter(tiny_flux / "model", net)
    assert load_controlnet(tiny_flux / "inpaint").config["extra_condition_channels"] == 4


def test_a_controlnet_without_a_mask_is_exported_for_stock(painters, tmp_path):
    shapes = {"noisy_latents": (16, 4, 4), "control_cond": (16, 4, 4), "prompt_embeds": (12, 8)}
    shapes["pooled_prompt_embeds"] = (32,)
    inputs = {
        name: torch.randn(2, *shape, generator=torch.Generator().manual_seed(5)) for name, shape in shapes.items()
    }
    inputs |= {"sigmas": torch.tensor([0.3, 0.8]), "conditioning_scale": torch.tensor(0.7)}
    plain, masked = (Source(kind, None, *painters[kind], SamplerConfig()) for kind in ("plain", "inpaint"))
    work = Work(plain, Samples(inputs, inputs["noisy_latents"], ["a", "b"]), tmp_path)
    exported = export_format(work, find_format("diffusers"), tmp_path / "out")
    assert exported.relative_error < 5e-3
    FluxControlNetModel.from_pretrained(tmp_path / "out", variant="fp16")
    with pytest.raises(InvalidInputError, match="plain is of FLUX, and the format onnx is for SD3's students"):
        find_format("onnx").check(plain)
    with pytest.raises(InvalidInputError, match="inpaint reads a mask, and stock diffusers has no FLUX pipeline"):
        find_format("diffusers").check(masked)


@pytest.mark.parametrize("layers", [(4, 2), (2, 1)])
def test_a_picture_is_that_of_the_stock_pipeline(painters, layers):
    """A teacher and a student whose groups are stock's."""
    backbone, teacher = painters["plain"]
    net = teacher if layers == (4, 2) else student_of(painters, "plain", *layers)
    generator = torch.Generator().manual_seed(3)
    noise, pixels = torch.randn(1, 16, 4, 8, generator=generator), torch.rand(1, 3, 32, 64, generator=generator) * 2 - 1
    text, prompt = backbone.encode_prompts(["a red circle"]), "a red circle"
    sampler = SamplerConfig(num_inference_steps=3, guidance_scale=3.5, conditioning_scale=0.6)
    stock = FluxControlNetPipeline(**{**backbone.pipeline.components, "controlnet": net})
    stock.set_progress_bar_config(disable=True)
    with torch.no_grad():
        latents = complete_latents(backbone, net, backbone.encode_images(pixels), text, None, sampler, noise)
        ours = (backbone.decode_latents(latents) / 2 + 0.5).clamp(0, 1)
        theirs = stock(
            prompt,
            control_image=pixels,
            height=32,
            width=64,
            num_inference_steps=3,
            guidance_scale=3.5,
            controlnet_conditioning_scale=0.6,
            latents=flux.pack(noise),
            max_sequence_length=12,
            output_type="pt",
        ).images
        other = complete_latents(
            backbone,
            net,
            backbone.encode_images(pixels),
            text,
            None,
            sampler.model_copy(update={"guidance_scale": 1.0}),
            noise,
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert not torch.allclose(other, latents, atol=1e-2)
