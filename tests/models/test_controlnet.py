"""What a ControlNet sees, what it injects, how a student is born and which of its parameters learn."""

import ast
import re
from pathlib import Path

import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetInpaintingPipeline

from refine_control.conditions.condition import (
    control_cond,
    has_region,
    mask_at_latents,
    masked_pixels,
    own_condition,
)
from refine_control.errors import InvalidInputError
from refine_control.injection import expand_residuals, groups
from refine_control.models.backbone import encode_images
from refine_control.models.controlnet import (
    build_student,
    control_residuals,
    for_condition,
    from_transformer,
    injected,
    trainable_parameters,
)
from refine_control.models.families.sd3 import takes_shift

SOURCE = Path(__file__).parents[2] / "src" / "refine_control"
GENERATOR = torch.Generator().manual_seed(0)
PIXELS = torch.rand(2, 3, 64, 64, generator=GENERATOR) * 2 - 1
MASK = torch.zeros(2, 1, 64, 64)
MASK[0, :, 8:30, 10:40], MASK[1, :, 40:, :9] = 1, 1
LATENTS = torch.randn(2, 16, 8, 8, generator=GENERATOR)
EMBEDS = torch.randn(2, 18, 64, generator=GENERATOR)
POOLED = torch.randn(2, 64, generator=GENERATOR)
SIGMAS = torch.tensor([0.3, 0.8])


def residuals_of(controlnet, **changed):
    given = {
        "noisy_latents": LATENTS,
        "sigmas": SIGMAS,
        "prompt_embeds": EMBEDS,
        "pooled_prompt_embeds": POOLED,
        **changed,
    }
    return control_residuals(controlnet, cond=control_cond(LATENTS, MASK), **given)


def test_the_seventeenth_channel_is_one_where_the_picture_is_kept():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:4, 5] = 1
    cond = control_cond(LATENTS[:1], mask)
    assert cond.shape == (1, 17, 8, 8)
    assert torch.equal(cond[:, :16], LATENTS[:1])
    assert torch.equal(cond[:, 16:] == 0, mask == 1)
    assert torch.equal(cond[:, 16:] == 1, mask == 0)


def test_the_mask_is_inverted_in_one_place_alone():
    """`1 - mask` as an operand: the condition, and weights that tell the hole from the rest."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        module, text = ".".join(path.relative_to(SOURCE).with_suffix("").parts), path.read_text()
        tree = ast.parse(text if re.search(r"\b1(\.0)? - ", text) else "")  # as the formatter writes it
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and ast.unparse(node.left) in "1.0":
                    names = {n.id for n in ast.walk(node.right) if isinstance(n, ast.Name)}
                    names |= {n.attr for n in ast.walk(node.right) if isinstance(n, ast.Attribute)}
                    if any("mask" in name or name == "small" for name in names):
                        found.add(f"{module}.{function.name}")
    weights = {"losses.mask_weight", "miniature.objectives.weighted_losses", "bench.stock_step._distillation"}
    assert found == {"conditions.condition.control_cond", *weights}


def test_control_cond_is_what_the_stock_pipeline_prepares(tiny_backbone):
    pipeline, vae = tiny_backbone.pipeline, tiny_backbone.vae
    prepare = StableDiffusion3ControlNetInpaintingPipeline.prepare_image_with_mask
    with torch.no_grad():
        torch.manual_seed(3)
        stock = prepare(pipeline, PIXELS, MASK, 64, 64, 2, 1, torch.device("cpu"), torch.float32)
        torch.manual_seed(3)
        drawn = vae.encode(masked_pixels(PIXELS, MASK)).latent_dist.sample()
        ours = control_cond((drawn - vae.config.shift_factor) * vae.config.scaling_factor, MASK)
    assert torch.equal(stock, ours)


def test_the_hole_is_black_and_the_latents_are_the_mean_shifted_and_scaled(tiny_backbone):
    vae, hidden = tiny_backbone.vae, masked_pixels(PIXELS, MASK)
    assert bool((hidden[MASK.expand_as(hidden) == 1] == -1).all())
    assert torch.equal(hidden[MASK.expand_as(hidden) == 0], PIXELS[MASK.expand_as(hidden) == 0])
    with torch.no_grad():
        mean = vae.encode(PIXELS).latent_dist.mean
        torch.testing.assert_close(encode_images(vae, PIXELS), (mean - 0.1) * 1.7)
        decoded = tiny_backbone.decode_latents((mean - 0.1) * 1.7)
        torch.testing.assert_close(decoded, vae.decode(mean).sample, rtol=0, atol=1e-4)


def test_a_mask_at_latents_stays_as_it_is():
    small = mask_at_latents(MASK, LATENTS)
    assert set(small.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(mask_at_latents(small, LATENTS), small)


def test_the_pooled_prompt_is_zeros(tiny_backbone):
    teacher = tiny_backbone.pipeline.controlnet
    with torch.no_grad():
        by_pooled = [
            teacher(LATENTS, control_cond(LATENTS, MASK), 1.0, EMBEDS, pooled, SIGMAS * 1000, return_dict=False)[0]
            for pooled in (torch.zeros(2, 64), torch.ones(2, 64))
        ]
        ours = residuals_of(teacher)
    assert all(torch.equal(a, b) for a, b in zip(ours, by_pooled[0], strict=True))
    assert not torch.equal(ours[-1], by_pooled[1][-1])


def test_the_conditioning_scale_is_a_factor(tiny_backbone):
    teacher = tiny_backbone.pipeline.controlnet
    with torch.no_grad():
        plain, half = residuals_of(teacher), residuals_of(teacher, conditioning_scale=0.5)
    assert all(torch.equal(0.5 * a, b) for a, b in zip(plain, half, strict=True))


def test_a_student_of_the_transformer_copies_its_first_blocks_and_leaves_its_config(tiny_backbone):
    transformer = tiny_backbone.transformer
    config, weights = dict(transformer.config), {k: v.clone() for k, v in transformer.state_dict().items()}
    student = from_transformer(transformer, 5)
    assert dict(transformer.config) == config
    assert config["num_layers"] == 24
    assert student.config["num_layers"] == len(student.transformer_blocks) == 5
    assert student.config["extra_conditioning_channels"] == 1
    own, copied = student.state_dict(), 0
    for name, value in weights.items():
        assert torch.equal(transformer.state_dict()[name], value)
        if name in own and not name.startswith("proj_out"):
            assert torch.equal(own[name], value), name
            copied += 1
    assert copied > 5 * 20
    assert not torch.cat([p.flatten() for p in student.controlnet_blocks.parameters()]).any()
    with torch.no_grad():
        student.transformer_blocks[0].attn.to_q.weight.add_(1)
    assert torch.equal(transformer.state_dict()["transformer_blocks.0.attn.to_q.weight"], weights[
        "transformer_blocks.0.attn.to_q.weight"
    ])  # fmt: skip


@pytest.mark.parametrize("count", [0, 24])
def test_a_student_of_no_such_size_is_refused(tiny_backbone, count):
    with pytest.raises(InvalidInputError, match="1 to 23"):
        from_transformer(tiny_backbone.transformer, count)


def build(backbone, init, seed=0, layers=5):
    return build_student(backbone.transformer, backbone.pipeline.controlnet, layers, init, seed)


def test_a_student_of_the_teacher_has_the_last_layer_of_each_group(tiny_backbone):
    teacher, student = tiny_backbone.pipeline.controlnet, build(tiny_backbone, "teacher")
    own, theirs = student.state_dict(), teacher.state_dict()
    for j, group in enumerate(groups(5)):
        for kind in ("transformer_blocks", "controlnet_blocks"):
            part = {k: v for k, v in own.items() if k.startswith(f"{kind}.{j}.")}
            assert part
            assert all(torch.equal(v, theirs[k.replace(f".{j}.", f".{group[-1]}.", 1)]) for k, v in part.items())
    for part in ("pos_embed_input.proj.weight", "context_embedder.weight"):
        assert torch.equal(own[part], theirs[part])


def test_a_student_of_all_layers_of_the_teacher_is_the_teacher(tiny_backbone):
    copied = build(tiny_backbone, "teacher", layers=23)
    with torch.no_grad():
        pairs = zip(residuals_of(copied), residuals_of(tiny_backbone.pipeline.controlnet), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_random_student_is_a_function_of_its_seed_and_leaves_the_global_generator(tiny_backbone):
    before = torch.get_rng_state()
    first, again, other = (build(tiny_backbone, "random", seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    name = "transformer_blocks.0.attn.to_q.weight"
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], tiny_backbone.transformer.state_dict()[name])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_exactly_the_parameters_that_get_a_gradient_are_trained(tiny_student, count):
    controlnet = tiny_student(count)
    trained = trainable_parameters(controlnet)
    assert {n for n, p in controlnet.named_parameters() if p.requires_grad} == set(trained)
    controlnet.requires_grad_(True)
    torch.stack([r.square().mean() for r in residuals_of(controlnet)]).sum().backward()
    reached = {n: p.grad for n, p in controlnet.named_parameters() if p.grad is not None}
    assert set(reached) == set(trained)
    assert len(dict(controlnet.named_parameters())) - len(reached) == 6
    # what multiplies the pooled zeros, and the last block's text queries: in the graph, but always zero
    queries = f"transformer_blocks.{count - 1}.attn.add_q_proj."
    silent = {"time_text_embed.text_embedder.linear_1.weight", f"{queries}weight", f"{queries}bias"}
    assert {n for n, grad in reached.items() if not grad.any()} == silent


def test_injection_shares_the_parameters(tiny_backbone, tiny_student):
    controlnet = tiny_student(5)
    exact, stock = injected(controlnet, 24), injected(controlnet, 24, "diffusers")
    assert type(controlnet) is SD3ControlNetModel
    assert all(a is b for a, b in zip(controlnet.parameters(), exact.parameters(), strict=True))
    with torch.no_grad():
        plain = residuals_of(controlnet)
        for name, wrapped in (("exact", exact), ("diffusers", stock)):
            arguments = (LATENTS, control_cond(LATENTS, MASK), 1.0, EMBEDS, torch.zeros(2, 64), SIGMAS * 1000)
            found = wrapped(*arguments, return_dict=False)[0]
            expected = expand_residuals(plain, 24, name)
            assert len(found) == 24
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert torch.equal(wrapped(*arguments).controlnet_block_samples[9], expected[9])
        controlnet.controlnet_blocks[0].bias.add_(1)
        assert torch.equal(residuals_of(exact)[0], residuals_of(controlnet)[0])


# Other conditions.


def test_a_teacher_for_another_condition_begins_as_the_inpainting_one_with_nothing_masked(tiny_backbone):
    teacher, vae = tiny_backbone.pipeline.controlnet, tiny_backbone.vae
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    other = for_condition(teacher, "canny", vae)
    assert (other.config["condition"], other.config["extra_conditioning_channels"]) == ("canny", 0)
    assert not has_region(other.config)
    assert not takes_shift(other.config)
    assert takes_shift(teacher.config)
    with torch.no_grad():
        shifted, unshifted = (encode_images(vae, PIXELS, shift) for shift in (True, False))
        torch.testing.assert_close(unshifted - shifted, torch.full_like(shifted, 0.1 * 1.7))
        kept = control_cond(shifted, torch.zeros(2, 1, 64, 64))
        expected, ours = (
            control_residuals(network, LATENTS, SIGMAS, EMBEDS, cond, POOLED)
            for network, cond in ((teacher, kept), (other, unshifted))
        )
        for one, two in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        other.pos_embed_input.proj.bias.add_(1)  # a copy
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert "condition" not in teacher.config


@pytest.mark.parametrize("init", ["transformer", "teacher", "random"])
def test_a_student_says_its_condition_and_has_the_channels_of_its_teacher(tiny_backbone, init):
    transformer = tiny_backbone.transformer
    teacher = for_condition(tiny_backbone.pipeline.controlnet, "depth", tiny_backbone.vae)
    student = build_student(transformer, teacher, 2, init, 0, condition="depth")
    assert own_condition(student.config) == "depth"
    assert student.pos_embed_input.proj.weight.shape[1] == 16
    assert own_condition(build(tiny_backbone, init, layers=1).config) == "inpaint"


def test_a_student_without_a_teacher_has_the_channels_of_its_condition(tiny_backbone):
    students = {
        name: build_student(tiny_backbone.transformer, None, 1, "transformer", 0, condition=name)
        for name in ("inpaint", "canny")
    }
    assert {name: student.config["extra_conditioning_channels"] for name, student in students.items()} == {
        "inpaint": 1,
        "canny": 0,
    }
