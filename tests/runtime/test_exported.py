"""An exported pipeline paints what PyTorch paints; its graphs here are PyTorch's own functions (see conftest)."""

import json
import logging

import numpy as np
import pytest

from refine_control import flow
from refine_control.conditions.condition import Shown
from refine_control.config import SamplerConfig
from refine_control.errors import DamagedError, InvalidInputError
from refine_control.miniature.vocabulary import MAX_TOKENS
from refine_control.models.backbone import Backbone
from refine_control.pipeline.painting import paint
from refine_control.pipeline.painting import sampling_sigmas as torch_sigmas
from refine_control.runtime.exported import ExportedPipeline, sampling_sigmas

PROMPT = "a red circle"
FEW = SamplerConfig(num_inference_steps=2, guidance_scale=1, conditioning_scale=0.8, seed=5, sigmas="even")
GUIDED = FEW.model_copy(update={"guidance_scale": 3.0, "sigmas": "scheduler"})
FRESH = FEW.model_copy(update={"stochastic": True, "num_inference_steps": 3})


@pytest.fixture
def photo():
    """A picture of 64 x 96 pixels and a hole whose edges lie between the latents."""
    image = np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8)
    mask = np.zeros((64, 96), bool)
    mask[9:50, 20:71] = True
    return image, mask


def difference(folder, backbone, controlnet, image, mask, sampler, prompt=PROMPT):
    """The widest difference from PyTorch's picture in uint8 levels."""
    ours = ExportedPipeline(folder).paint(image, mask, prompt, sampler)
    shown = Shown(image[None], None if mask is None else mask[None])
    theirs = paint(backbone, controlnet, shown, [prompt], sampler)[0]
    assert ours.dtype == np.uint8
    assert theirs.std() > 5
    return np.abs(ours.astype(int) - theirs).max()


@pytest.fixture
def shifted(tiny_backbone):
    """The tiny backbone with SD3's scheduler shift."""
    scheduler = type(tiny_backbone.pipeline.scheduler)(shift=3.0)
    components = {**tiny_backbone.pipeline.components, "scheduler": scheduler}
    return Backbone(type(tiny_backbone.pipeline)(**components), max_sequence_length=0)


@pytest.mark.parametrize("sampler", [FEW, GUIDED, FRESH], ids=["few", "guided", "fresh"])
def test_pictures_are_those_of_pytorch(shifted, tiny_student, write_exported, photo, sampler):
    student = tiny_student(3)
    assert difference(write_exported(shifted, student), shifted, student, *photo, sampler) <= 1


@pytest.mark.parametrize("layers", [None, [0] * 5 + [1] * 10 + [2] * 8], ids=["even", "own"])
def test_a_separate_controlnet_feeds_its_sites(tiny_backbone, tiny_student, write_exported, photo, layers):
    student = tiny_student(3)
    if layers:
        student.register_to_config(layer_of_site=layers)
    sites = layers or [site * 3 // 23 for site in range(23)]
    folder = write_exported(tiny_backbone, student, ("controlnet", "transformer"), layer_of_site=sites)
    assert difference(folder, tiny_backbone, student, *photo, FEW) <= 1


def test_a_condition_without_a_region_takes_no_mask(tiny_backbone, write_exported, photo):
    from refine_control.models.controlnet import from_transformer

    student = from_transformer(tiny_backbone.transformer, 2, extra_channels=0)
    student.register_to_config(condition="canny", condition_shift=True)
    folder = write_exported(tiny_backbone, student, condition="canny")
    assert difference(folder, tiny_backbone, student, photo[0], None, FEW) <= 1
    with pytest.raises(InvalidInputError, match=r"canny of .* takes no mask"):
        ExportedPipeline(folder).paint(*photo, PROMPT, FEW)


@pytest.mark.parametrize("with_t5", [True, False])
def test_the_embeddings_of_sd3(sd3, write_exported, photo, with_t5):
    """A wider transformer: T5's tokens, or zeros in their place, and CLIP's widened by zeros."""
    backbone, student = sd3(with_t5)
    folder = write_exported(backbone, student)
    embeds, pooled = ExportedPipeline(folder)._encode(PROMPT)
    expected, expected_pooled = backbone.encode_prompts([PROMPT])
    assert embeds.shape == (1, MAX_TOKENS + 9, 80)
    np.testing.assert_allclose(embeds, expected.numpy(), atol=1e-6)
    np.testing.assert_allclose(pooled, expected_pooled.numpy(), atol=1e-6)
    assert difference(folder, backbone, student, *photo, FEW) <= 1


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_are_those_of_pytorch(shifted, steps, shift):
    for sigmas in ("even", "scheduler"):
        sampler = SamplerConfig(num_inference_steps=steps, sigmas=sigmas)
        shifted.pipeline.scheduler.register_to_config(shift=shift)
        np.testing.assert_allclose(sampling_sigmas(sampler, shift), torch_sigmas(shifted, sampler), rtol=3e-7)
    assert sampling_sigmas(SamplerConfig(sigmas="even"), 2.0).dtype == np.float32
    np.testing.assert_allclose(
        sampling_sigmas(SamplerConfig(num_inference_steps=steps, sigmas="even"), shift),
        flow.even_sigmas(steps, shift),
        rtol=3e-7,
    )


def test_what_is_not_read_is_reported_once(tiny_backbone, tiny_student, write_exported, photo, caplog):
    known = ["a", "red", "circle"]
    pipeline = ExportedPipeline(write_exported(tiny_backbone, tiny_student(1), vocabulary=known))
    with caplog.at_level(logging.WARNING):
        whole = pipeline.paint(*photo, "a red unicorn circle", FEW)
        pipeline.paint(*photo, "a red unicorn circle", FEW)
    assert [record.getMessage() for record in caplog.records if "unicorn" in record.getMessage()] == [
        "this model has a closed vocabulary without 1 words of the prompts, 25 % of all their words: 'unicorn'; "
        "they are ignored"
    ]
    np.testing.assert_array_equal(whole, pipeline.paint(*photo, "a red circle", FEW))
    caplog.clear()
    pipeline.paint(*photo, "a " * 40, FEW)
    assert f"longer than the {MAX_TOKENS} tokens of text_encoder and text_encoder_2" in caplog.text


def test_progress_and_seed(tiny_backbone, tiny_student, write_exported, photo):
    pipeline, seen = ExportedPipeline(write_exported(tiny_backbone, tiny_student(1))), []
    first = pipeline.paint(*photo, PROMPT, FEW, progress=lambda *step: seen.append(step[:2]))
    assert seen == [(1, 2), (2, 2)]
    other = FEW.model_copy(update={"seed": 6})
    assert not np.array_equal(first, pipeline.paint(*photo, PROMPT, other))
    np.testing.assert_array_equal(first, pipeline.paint(*photo, PROMPT, FEW))


def test_what_cannot_be_painted_is_a_sentence(tiny_backbone, tiny_student, write_exported, photo):
    pipeline, (image, mask) = ExportedPipeline(write_exported(tiny_backbone, tiny_student(1))), photo
    assert pipeline.geometry == tiny_backbone.geometry
    for given in (None, mask[:32]):
        with pytest.raises(InvalidInputError, match=r"inpaint of .* takes a mask of the picture's size"):
            pipeline.paint(image, given, PROMPT, FEW)
    with pytest.raises(InvalidInputError, match="multiples of 8"):
        pipeline.paint(image[:60], mask[:60], PROMPT, FEW)
    for name, value in {"injection": "diffusers", "latents": "sample", "precision": "bf16"}.items():
        with pytest.raises(InvalidInputError, match=f"sampler.{name} is {value}"):
            pipeline.paint(image, mask, PROMPT, FEW.model_copy(update={name: value}))


def test_the_sampler_is_the_exports(tiny_backbone, tiny_student, write_exported, caplog):
    sampling = {"num_inference_steps": 3, "guidance_scale": 1.0, "conditioning_scale": 0.7, "sigmas": "even"}
    few = {"sampling": sampling, "most_steps": 4, "distilled_guidance": 3.0}
    pipeline = ExportedPipeline(write_exported(tiny_backbone, tiny_student(1), **few))
    chosen = pipeline.choose_sampler({"seed": 8, "guidance_scale": 5.0, "num_inference_steps": 9})
    assert chosen == SamplerConfig(**{**sampling, "num_inference_steps": 9, "seed": 8})
    assert "distilled in" in caplog.text
    assert "at most 4 steps" in caplog.text
    plain = ExportedPipeline(write_exported(tiny_backbone, tiny_student(1), sampling=sampling))
    assert plain.choose_sampler({"guidance_scale": 5.0}).guidance_scale == 5.0


def change(folder, **entries):
    """Another pipeline.json, with a manifest that knows it."""
    from refine_control.storage import read_manifest, sha256_file, write_json

    path = folder / "pipeline.json"
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    manifest = read_manifest(folder, verify=False)
    manifest["files"]["pipeline.json"] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(folder / "manifest.json", manifest)
    return folder


def test_a_folder_that_is_not_whole_is_a_sentence(tiny_backbone, tiny_student, write_exported, tmp_path):
    folder = write_exported(tiny_backbone, tiny_student(1))
    with pytest.raises(InvalidInputError, match="no exported pipeline; make one with `refine-control export"):
        ExportedPipeline(tmp_path)
    for entries in ({"version": 2}, {"shift": ...}, {"engine": "abacus"}, {"tokenizers": {"text_encoder": "../x"}}):
        with pytest.raises(DamagedError, match=r"pipeline.json cannot be read by this version: .*; export again"):
            ExportedPipeline(change(write_exported(tiny_backbone, tiny_student(1)), **entries))
    ExportedPipeline(change(write_exported(tiny_backbone, tiny_student(1)), added_later=1))
    (folder / "denoiser.onnx").write_text("other")
    with pytest.raises(DamagedError, match=r"denoiser.onnx is not the file its manifest describes"):
        ExportedPipeline(folder)
