"""Table 2's baselines by their own classes, tiny and random, saved and loaded as the published ones are."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DEISMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from refine_control.baselines import flux as flux_inpainting
from refine_control.baselines.models import KNOWN, cannot_be_had, load_baseline, recommended
from refine_control.baselines.painting import denoising_step, facts, model_pixels, paint, working_size
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError, MissingError
from refine_control.miniature import networks as mini
from refine_control.models.flux import FluxInpaintingControlNet, pack, unpack
from refine_control.randomness import slot_normals

SIDE = 32
WIDTH = 16
SAMPLER = SamplerConfig(num_inference_steps=2, guidance_scale=3.0, conditioning_scale=0.9, seed=5)
PROMPTS = ["a red circle", "a blue ring", "a green square"]
UNET = "unet/diffusion_pytorch_model.safetensors"


def pictures(side=SIDE, seed=0):
    """Three pictures and holes that end inside latent pixels."""
    images = np.random.default_rng(seed).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    masks = np.zeros((3, side, side), bool)
    masks[:, side // 4 : side // 2 + 3, side // 8 : side // 2] = True
    masks[1, : side // 3] = True
    return images, masks


def disturbed(network):
    """Noise everywhere, so that nothing that is zero at birth hides a mistake."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def clip(vocabulary, length):
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return CLIPTextModel(
        CLIPTextConfig(vocab_size=vocabulary, max_position_embeddings=length, projection_dim=WIDTH, **sizes, **marks)
    )


def vae(channels, levels, **changed):
    config = {**mini.VAE, "latent_channels": channels, "block_out_channels": (8,) * levels, "norm_num_groups": 4}
    config |= {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return disturbed(AutoencoderKL(**config | {"layers_per_block": 1, **changed}))


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    """A 9-channel U-Net, a VAE of factor 4, CLIP and DEIS: DreamShaper's parts."""
    root = tmp_path_factory.mktemp("sd")
    torch.manual_seed(1)
    tokenizer = mini.write_tokenizer(root / "words")
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=9,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    StableDiffusionInpaintPipeline(
        vae=vae(4, 3, scaling_factor=0.7),
        text_encoder=clip(len(tokenizer), tokenizer.model_max_length),
        tokenizer=tokenizer,
        unet=disturbed(unet),
        scheduler=DEISMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root / "tiny")
    return root / "tiny"


def t5_tokenizer():
    from transformers import T5Tokenizer

    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], extra_ids=0)


FLUX = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": WIDTH, "guidance_embeds": True}
FLUX |= {"pooled_projection_dim": WIDTH, "axes_dims_rope": (4, 6, 6), "in_channels": 64}
PUBLISHED = {"patch_size", "num_layers", "num_single_layers", "extra_condition_channels", *FLUX}


def save_controlnet(network, folder):
    """With the keys and the class name of the published config, and no others."""
    network.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if k in PUBLISHED} | {"_class_name": "FluxControlNetModel"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    """FLUX with three double blocks and one single, and a ControlNet of two double blocks, in its own folder."""
    from transformers import T5Config, T5EncoderModel

    root = tmp_path_factory.mktemp("flux")
    torch.manual_seed(2)
    tokenizer, letters = mini.write_tokenizer(root / "words"), t5_tokenizer()
    t5 = T5Config(vocab_size=len(letters), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(16, 4, scaling_factor=0.36, shift_factor=0.12),
        text_encoder=clip(len(tokenizer), tokenizer.model_max_length),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=letters,
        transformer=disturbed(FluxTransformer2DModel(num_layers=3, num_single_layers=1, **FLUX)),
    ).save_pretrained(root / "tiny")
    controlnet = disturbed(FluxInpaintingControlNet(num_layers=2, num_single_layers=0, **FLUX))
    save_controlnet(controlnet, root / "tiny" / "controlnet")
    return root / "tiny"


@pytest.fixture(scope="module")
def sd(sd_folder):
    return load_baseline(sd_folder, device="cpu")


@pytest.fixture(scope="module")
def flux(flux_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux_inpainting, "MAX_SEQUENCE_LENGTH", 24)
        yield load_baseline(flux_folder, size=SIDE, device="cpu")


@pytest.fixture(params=["sd", "flux"])
def baseline(request):
    return request.getfixturevalue(request.param)


def difference(a, b):
    return np.abs(a.astype(int) - b).max()


def test_a_picture_does_not_know_its_batch_nor_the_global_generator(baseline):
    images, masks = pictures()
    torch.manual_seed(1)
    together = paint(baseline, images, masks, PROMPTS, SAMPLER)
    torch.manual_seed(2)
    alone = paint(baseline, images, masks, PROMPTS, SAMPLER, batch_size=1)
    part = paint(baseline, images[1:], masks[1:], PROMPTS[1:], SAMPLER, first=1)
    assert together.shape == images.shape
    assert together.dtype == np.uint8
    assert together.std() > 1
    assert difference(together, alone) <= 1
    assert difference(together[1:], part) <= 1
    other = paint(baseline, images[1:], masks[1:], PROMPTS[1:], SAMPLER, first=0)
    assert difference(part, other) > 1


@pytest.mark.parametrize(
    ("before", "after", "pixel", "hole"),
    [(12, 4, 5, [1]), (4, 8, 1, [2, 3]), (10, 4, 2, [0, 1]), (6, 6, 4, [4])],
    ids=["a third", "twice", "not a whole number", "as it is"],
)
def test_whatever_a_hole_overlaps_is_hole(before, after, pixel, hole):
    masks = np.zeros((1, before, before), bool)
    masks[0, pixel, pixel] = True
    _, mask = model_pixels(np.zeros((1, before, before, 3), np.uint8), masks, after, after)
    assert mask.shape == (1, 1, after, after)
    assert [tuple(at) for at in torch.nonzero(mask[0, 0]).tolist()] == [(y, x) for y in hole for x in hole]


@pytest.mark.parametrize("side", [SIDE, 56, 20])
def test_the_hole_is_not_seen_and_the_rest_is(baseline, side):
    images, masks = pictures(side)
    painted = paint(baseline, images, masks, PROMPTS, SAMPLER)
    assert painted.shape == images.shape
    other = np.where(masks[..., None], 255 - images, images)
    assert difference(painted, paint(baseline, other, masks, PROMPTS, SAMPLER)) == 0
    other = np.where(masks[..., None], images, 255 - images)
    assert difference(painted, paint(baseline, other, masks, PROMPTS, SAMPLER)) > 1


def test_prompt_seed_and_guidance_count(baseline):
    images, masks = pictures()
    painted = paint(baseline, images[:1], masks[:1], PROMPTS[:1], SAMPLER)
    assert difference(painted, paint(baseline, images[:1], masks[:1], ["a white star"], SAMPLER)) > 0
    for changed in ({"seed": 6}, {"guidance_scale": 9.0}):
        sampler = SAMPLER.model_copy(update=changed)
        assert difference(painted, paint(baseline, images[:1], masks[:1], PROMPTS[:1], sampler)) > 0


def test_bf16_paints_almost_the_same(baseline, request):
    images, masks = pictures()
    sampler = SAMPLER.model_copy(update={"precision": "bf16"})
    other = baseline
    if baseline.controlnet is not None:
        with pytest.raises(InvalidInputError, match="was loaded in fp32"):
            paint(baseline, images, masks, PROMPTS, sampler)
        folder = request.getfixturevalue("flux_folder")
        other = load_baseline(folder, size=SIDE, device="cpu", precision="bf16")
        assert {n.dtype for n in (other.denoiser, other.controlnet)} == {torch.bfloat16}
        assert other.pipeline.vae.dtype == torch.float32
    painted = paint(baseline, images, masks, PROMPTS, SAMPLER).astype(float)
    half = paint(other, images, masks, PROMPTS, sampler)
    another = paint(baseline, images, masks, PROMPTS, SAMPLER.model_copy(update={"seed": 6}))
    assert 0 < np.abs(painted - half).mean() < 0.5 * np.abs(painted - another).mean()


def test_a_draw_of_the_latents_is_refused(sd):
    with pytest.raises(InvalidInputError, match="mean"):
        paint(sd, *pictures(), PROMPTS, SAMPLER.model_copy(update={"latents": "sample"}))


def test_what_the_unet_reads(sd, monkeypatch):
    """Noise, mask (1 = inpaint) and the mean latents of the picture whose hole is gray: 4 + 1 + 4 channels."""
    images, masks = pictures()
    read, forward = [], sd.denoiser.forward

    def spy(sample, *args, **given):
        read.append(sample)
        return forward(sample, *args, **given)

    monkeypatch.setattr(sd.denoiser, "forward", spy)
    paint(sd, images, masks, PROMPTS, SAMPLER)
    first = read[0]
    assert first.shape == (6, 9, 8, 8)  # without and with the prompt
    assert torch.equal(first[:3], first[3:])
    assert torch.equal(first[:3, :4], slot_normals((4, 8, 8), range(3), 5, "initial noise"))
    assert torch.equal(first[:3, 4].bool(), torch.from_numpy(masks)[:, ::4, ::4])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    pixels = torch.where(torch.from_numpy(masks)[:, None], 0.0, pixels)
    with torch.no_grad():
        wanted = 0.7 * sd.pipeline.vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(first[:3, 5:], wanted, rtol=0, atol=1e-5)


def test_the_unet_is_run_as_stock_runs_it(sd, sd_folder):
    from PIL import Image

    images, masks = pictures()
    stock = StableDiffusionInpaintPipeline.from_pretrained(sd_folder)
    stock.set_progress_bar_config(disable=True)
    hidden = np.where(masks[0, ..., None], 127.5, images[0]) / 127.5 - 1
    with torch.no_grad():
        latents = stock.vae.encode(torch.from_numpy(hidden).float().permute(2, 0, 1)[None]).latent_dist.mean
        wanted = stock(
            PROMPTS[0],
            image=Image.fromarray(images[0]),
            mask_image=Image.fromarray(masks[0]),
            masked_image_latents=0.7 * latents,
            height=SIDE,
            width=SIDE,
            num_inference_steps=2,
            guidance_scale=3.0,
            latents=slot_normals((4, 8, 8), [0], 5, "initial noise"),
        ).images[0]
    painted = paint(sd, images[:1], masks[:1], PROMPTS[:1], SAMPLER)
    assert difference(painted[0], np.asarray(wanted)) <= 1


# FLUX


def test_tokens_are_squares_channel_by_channel_and_stock_packs_alike():
    latents = torch.arange(2 * 17 * 4 * 6).reshape(2, 17, 4, 6).float()
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 68)
    # token 4 of 2 rows of 3: rows 2 and 3, columns 2 and 3
    for channel in (0, 16):
        square = latents[1, channel, 2:4, 2:4].flatten()
        assert torch.equal(tokens[1, 4, 4 * channel : 4 * channel + 4], square)
    assert torch.equal(tokens, FluxControlNetPipeline._pack_latents(latents, 2, 17, 4, 6))
    assert torch.equal(unpack(tokens, 4, 6), latents)


def control_tokens(vae, pixels, mask):
    """The masked picture's latents, then what is kept."""
    hidden = torch.where(mask > 0.5, torch.tensor(-1.0), pixels)
    latents = (vae.encode(hidden).latent_dist.mean - 0.12) * 0.36
    return pack(torch.cat([latents, 1 - mask[:, :, ::8, ::8]], 1))


def by_stock(flux, control, prompt, noise, scale):
    """Stock FluxControlNetPipeline with its control tokens exchanged for `control`: latents (1,16,4,4)."""
    controlnet = flux.controlnet
    forward = controlnet.forward
    controlnet.forward = lambda **given: forward(**{**given, "controlnet_cond": control})
    try:
        tokens = flux.pipeline(
            prompt,
            control_image=torch.zeros(1, 3, SIDE, SIDE),
            height=SIDE,
            width=SIDE,
            num_inference_steps=3,
            guidance_scale=3.5,
            controlnet_conditioning_scale=scale,
            latents=pack(noise),
            max_sequence_length=24,
            output_type="latent",
        ).images
    finally:
        del controlnet.forward
    return unpack(tokens, 4, 4)


@pytest.mark.parametrize("scale", [0.0, 0.9])
def test_flux_is_run_as_stock_runs_it(flux, scale):
    images, masks = pictures()
    pixels, mask = model_pixels(images[:1], masks[:1], SIDE, SIDE)
    noise = slot_normals((16, 4, 4), [0], 0, "noise")
    changed = {"num_inference_steps": 3, "guidance_scale": 3.5, "conditioning_scale": scale}
    sampler = SAMPLER.model_copy(update=changed)
    with torch.no_grad():
        ours = flux_inpainting.complete(flux.pipeline, pixels, mask, PROMPTS[:1], sampler, noise)
        wanted = by_stock(flux, control_tokens(flux.pipeline.vae, pixels, mask), PROMPTS[:1], noise, scale)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
    filled = flux_inpainting.complete(flux.pipeline, pixels, 1 - mask, PROMPTS[:1], sampler, noise)
    assert torch.equal(filled, ours) == (scale == 0)


def test_the_published_controlnet_has_the_size_of_its_file():
    """Beta's config; its file is 4.28 GB of bf16."""
    with torch.device("meta"):
        network = FluxInpaintingControlNet(num_layers=6, num_single_layers=0, guidance_embeds=True)
    assert 4.275e9 < 2 * sum(p.numel() for p in network.parameters()) < 4.285e9
    assert network.controlnet_x_embedder.in_features == 68
    assert (len(network.controlnet_blocks), len(network.controlnet_single_blocks)) == (6, 0)


def test_a_stock_controlnet_does_not_fit(flux_folder, tmp_path):
    folder = shutil.copytree(flux_folder, tmp_path / "flux")
    save_controlnet(FluxControlNetModel(num_layers=2, num_single_layers=0, **FLUX), folder / "controlnet")
    refused(folder, "controlnet_x_embedder")


# loading


def refused(folder, word, kind=InvalidInputError, **given):
    with pytest.raises(kind, match=word) as caught:
        load_baseline(folder, device="cpu", **given)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


@pytest.fixture
def copy(sd_folder, tmp_path):
    return shutil.copytree(sd_folder, tmp_path / "copy")


def test_a_folder_that_is_no_inpainting_pipeline_is_refused(copy):
    index = copy / "model_index.json"
    told = json.loads(index.read_text())
    index.write_text(json.dumps({**told, "_class_name": "StableDiffusionXLPipeline"}))
    refused(copy, "StableDiffusionXLPipeline")
    index.write_text("[]")
    refused(copy, "does not hold a JSON object")
    index.unlink()
    refused(copy, "model_index.json", MissingError)
    refused(copy / "nowhere", "no model folder")


def test_why_a_baseline_cannot_be_had_is_said(copy):
    assert cannot_be_had(copy) is None
    assert "hf download nobody/nothing" in (cannot_be_had("nobody/nothing") or "")
    assert "dreamshaper8, sd2, flux" in (cannot_be_had("dreamshaper") or "")


def test_a_unet_that_was_not_trained_to_inpaint_is_refused(copy):
    config = {**UNet2DConditionModel.load_config(copy / "unet"), "in_channels": 4}
    UNet2DConditionModel.from_config(config).save_pretrained(copy / "unet")
    refused(copy, "takes 4 channels")


def test_missing_or_foreign_weights_are_refused(copy, flux_folder, tmp_path):
    tensors = load_file(copy / UNET)
    lacking = {k: v for k, v in tensors.items() if k != "conv_in.bias"}
    for changed, word in ((lacking, "conv_in.bias"), ({**tensors, "more": torch.zeros(1)}, "more")):
        save_file(changed, copy / UNET)
        refused(copy, word)
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"] * float("nan")}, copy / UNET)
    refused(copy, "not finite")
    (copy / UNET).rename(copy / UNET.replace("safetensors", "bin"))
    refused(copy, r"only .*\.bin", MissingError)
    shutil.copytree(flux_folder, tmp_path / "flux", ignore=shutil.ignore_patterns("controlnet"))
    refused(tmp_path / "flux", "alimama-creative", MissingError)


def test_the_position_table_of_older_text_encoders_is_no_foreign_weight(copy):
    path = copy / "text_encoder" / "model.safetensors"
    old = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
    save_file({**old, "text_model.embeddings.position_ids": torch.arange(18)[None]}, path)
    assert load_baseline(copy, device="cpu").denoiser.config["in_channels"] == 9


@pytest.mark.parametrize("size", [30, 2])
def test_a_size_that_does_not_suit_is_refused(sd_folder, size):
    refused(sd_folder, "multiple of 4", size=size)


def test_published_models_have_their_steps_and_rows(sd):
    assert set(KNOWN) == {"dreamshaper8", "sd2", "flux"}
    assert all(set(card.paper) == {"psnr", "ssim", "fid", "lpips", "cmmd"} for card in KNOWN.values())
    sampler = recommended(sd, SAMPLER)
    assert (sampler.num_inference_steps, sampler.guidance_scale, sampler.seed) == (50, 7.5, 5)


def test_what_is_done_to_the_pictures_is_said(sd, flux):
    assert facts(sd, SIDE, SIDE, SAMPLER)["resolution"] == "32 x 32"
    assert "64 x 96 pictures are resized" in facts(sd, 64, 96, SAMPLER)["resolution"]
    assert working_size(sd, 64, 96) == (32, 48)
    assert working_size(flux, 100, 64) == (48, 32)
    told = facts(flux, SIDE, SIDE, SAMPLER)
    assert "embedded guidance 3, true guidance 1, conditioning scale 0.9" in told["sampler"]
    assert "DEISMultistepScheduler, 2 steps" in facts(sd, SIDE, SIDE, SAMPLER)["sampler"]


def test_what_is_measured_is_one_step(sd, flux):
    controlled, whole = denoising_step(sd)
    assert controlled is None
    assert whole().shape == (1, 4, 8, 8)
    controlled, whole = denoising_step(flux)
    assert [r.shape for r in controlled()] == [(1, 4, 32)] * 2
    assert whole().shape == (1, 16, 4, 4)


@pytest.mark.parametrize("folder", ["sd_folder", "flux_folder"])
def test_a_prompt_that_a_baseline_cuts_is_warned_of(folder, request, caplog):
    baseline = load_baseline(request.getfixturevalue(folder), size=SIDE, device="cpu")
    images, masks = pictures()
    sampler = SAMPLER.model_copy(update={"num_inference_steps": 1})
    with caplog.at_level("WARNING", logger="refine_control"):
        paint(baseline, images[:1], masks[:1], ["red " * 17 + "ring"], sampler)
    warning = next(r.getMessage() for r in caplog.records if r.name.startswith("refine_control"))
    assert "18 tokens" in warning
    assert "'red ring'" in warning
