"""Depth maps by transformers' Depth-Anything with random weights: near is bright, whatever the model calls it."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, Dinov2Model

from refine_control.conditions import depth
from refine_control.errors import InvalidInputError, MissingError

BACKBONE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
BACKBONE |= {"mlp_ratio": 1, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}


def model(folder, **options) -> DepthAnythingForDepthEstimation:
    """The smallest network of the class, saved to a folder."""
    torch.manual_seed(0)
    sizes = {"reassemble_hidden_size": 16, "neck_hidden_sizes": [4, 4, 4, 4], "fusion_hidden_size": 4}
    config = DepthAnythingConfig(backbone_config=Dinov2Config(**BACKBONE), head_hidden_size=4, **sizes, **options)
    network = DepthAnythingForDepthEstimation(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.3)
        network.head.conv3.bias.fill_(3)  # so that the last ReLU lets something through
    network.save_pretrained(folder)
    return network


@pytest.fixture
def image():
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((48, 32), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(48, 32), (64, 64), (31, 100), (1024, 700)])
def test_the_network_reads_what_its_own_processor_makes(size):
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    image = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    resized = {"size": {"height": 518, "width": 518}, "ensure_multiple_of": 14, "keep_aspect_ratio": True}
    colours = {"image_mean": depth.MEAN.tolist(), "image_std": depth.STD.tolist()}
    processor = DPTImageProcessorPil(resample=Image.Resampling.BICUBIC, **resized, **colours)
    theirs = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    ours = depth.network_input(image)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-3


def test_near_is_bright(tmp_path, image, monkeypatch):
    monkeypatch.setattr(depth, "network_input", lambda image, side=28: NETWORK_INPUT(image, side))
    for kind in ("relative", "metric"):
        network = model(tmp_path / kind, depth_estimation_type=kind, max_depth=20)
        made = depth.depth_network(str(tmp_path / kind))(image)
        with torch.inference_mode():
            said = network(torch.from_numpy(NETWORK_INPUT(image, 28))[None]).predicted_depth[0].numpy()
        assert np.ptp(said) > 0
        assert (made.shape, made.dtype) == (image.shape, np.uint8)
        assert (made.min(), made.max()) == (0, 255)
        assert np.array_equal(made[..., 0], made[..., 2])
        nearness = Image.fromarray(1 / said if kind == "metric" else said)
        whole = np.asarray(nearness.resize((48, 32), Image.Resampling.BICUBIC))
        assert np.abs(made[..., 0] - (whole - whole.min()) / np.ptp(whole) * 255).max() <= 0.51


NETWORK_INPUT = depth.network_input


def test_a_plane_is_black():
    assert depth.picture(np.full((4, 4), 3.0), 8, 6).shape == (8, 6, 3)
    assert not depth.picture(np.full((4, 4), 3.0), 8, 6).any()


def test_a_model_that_is_not_there_or_of_another_kind_is_said_in_a_sentence(tmp_path):
    with pytest.raises(MissingError, match="hf download nobody/nothing"):
        depth.depth_network("nobody/nothing")
    with pytest.raises(InvalidInputError, match="no model folder at"):
        depth.depth_network(str(tmp_path / "nowhere"))
    Dinov2Model(Dinov2Config(**BACKBONE)).save_pretrained(tmp_path / "other")
    with pytest.raises(InvalidInputError, match="a model of type 'dinov2', not a Depth-Anything"):
        depth.depth_network(str(tmp_path / "other"))
    model(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(MissingError, match=r"and no model\.safetensors"):
        depth.depth_network(str(tmp_path / "bare"))


def test_data_build_makes_what_is_not_given(tmp_path, image):
    from refine_control.photos.build import build
    from refine_control.photos.shards import Shards

    model(tmp_path / "model")
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        Image.fromarray(image if name == "a" else image[::-1]).save(tmp_path / "in" / f"{name}.png")
        (tmp_path / "in" / f"{name}.txt").write_text("a thing")
    Image.fromarray(image).convert("L").save(tmp_path / "in" / "b.cond.png")
    options = {"condition": "depth", "test_fraction": 0, "unlabeled_fraction": 0, "size": 32}
    assert build(tmp_path / "in", tmp_path / "bare", **options).rejects == {"no_condition": 1}
    build(tmp_path / "in", tmp_path / "out", preparer=str(tmp_path / "model"), **options)
    a, b = Shards(tmp_path / "out" / "labeled")
    assert np.array_equal(a.cond, depth.depth_network(str(tmp_path / "model"))(a.image))
    assert np.array_equal(b.cond[..., 0], np.asarray(Image.fromarray(image).convert("L"))[:, 8:40])
