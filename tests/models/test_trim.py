"""Layers that stock diffusers never reads: found from configs, and cut so that diffusers paints the same."""

import json

import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel

from refine_control.errors import InvalidInputError
from refine_control.models.trim import trim

SIZE = {
    "in_channels": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 1,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "axes_dims_rope": [2, 2, 4],
}
FLUX = {"_class_name": "FluxControlNetModel"}


def write_config(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def find(folder, **config):
    return [(s.unread, s.kept) for s in trim(write_config(folder, **config)).streams]


@pytest.mark.parametrize(("layers", "unread"), [(4, []), (5, []), (6, [5]), (8, [7]), (12, [10, 11]), (19, [])])
def test_published_flux_needs_no_more_than_the_config(tmp_path, layers, unread):
    kept = layers - len(unread)
    config = {**FLUX, "num_layers": layers, "num_single_layers": 0}
    assert find(tmp_path, **config) == [(unread, kept), ([], 0)]
    # a single layer computes from every double one
    assert find(tmp_path, **{**config, "num_single_layers": 15}) == [(unread, layers), ([13, 14], 13)]


def test_a_controlnet_that_embeds_its_picture_has_each_layer_read_again_and_again(tmp_path):
    assert find(tmp_path, **FLUX, num_layers=8, num_single_layers=0, conditioning_embedding_channels=16)[0] == ([], 8)


def test_a_layer_that_a_map_of_its_own_reads_stays(tmp_path):
    layers = [block * 6 // 19 for block in range(19)]
    config = {**FLUX, "num_layers": 6, "num_single_layers": 0, "layer_of_site": layers}
    assert find(tmp_path, **config)[0] == ([5], 6)
    with pytest.raises(InvalidInputError, match="double layer 5 stays: refine-control reads it"):
        trim(tmp_path, out=tmp_path / "out")


def test_the_last_layer_of_sd3s_teacher_is_unread_and_stays(tmp_path):
    heads = {"attention_head_dim": 64, "patch_size": 2, "sample_size": 128}
    config = {"_class_name": "SD3ControlNetModel", **heads, "num_attention_heads": 24}
    assert find(tmp_path, **config, num_layers=23) == [([22], 23)]
    assert find(tmp_path, **config, num_layers=12) == [([], 12)]
    assert find(tmp_path, **{**config, "num_attention_heads": 38}, num_layers=19) == [([], 19)]
    with pytest.raises(InvalidInputError, match="joint layer 22 stays: without it diffusers would feed other layers"):
        trim(write_config(tmp_path, **config, num_layers=23), out=tmp_path / "out")
    with pytest.raises(InvalidInputError, match=r"2 attention heads.*--model"):
        find(tmp_path, **{**config, "num_attention_heads": 2}, num_layers=12)


def test_a_model_states_the_number_of_blocks():
    assert [(s.num_layers, s.num_sites, s.unread) for s in trim("edge", "mini").streams] == [(12, 23, [])]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "ControlNetModel"}, "holds a ControlNetModel; layers can be found of SD3 and FLUX"),
        ({**FLUX, "num_single_layers": 0}, "num_layers is None"),
        ({**FLUX, "num_layers": -1, "num_single_layers": 0}, "num_layers is -1"),
    ],
)
def test_what_no_layers_can_be_counted_of_is_refused(tmp_path, config, message):
    with pytest.raises(InvalidInputError, match=message):
        trim(write_config(tmp_path, **config))


def random_flux(component, seed=0, **layers):
    """A network whose weights are random, also those that are zero at birth."""
    torch.manual_seed(seed)
    network = component(**SIZE, **layers)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2)
    return network.eval()


@torch.no_grad()
def velocity(transformer, controlnet):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(controlnet.dtype)

    inputs = {
        "hidden_states": draw(1, 4, 4),
        "encoder_hidden_states": draw(1, 3, 8),
        "pooled_projections": draw(1, 8),
        "timestep": torch.tensor([0.4]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }
    double, single = controlnet(controlnet_cond=draw(1, 4, 4), **inputs)
    return transformer(controlnet_block_samples=double, controlnet_single_block_samples=single, **inputs)[0]


@pytest.mark.parametrize(
    ("double", "single", "kept"), [(6, 0, (5, 0)), (12, 0, (10, 0)), (2, 4, (2, 3)), (0, 4, (0, 3))]
)
def test_stock_diffusers_gives_the_same_velocity_without_them(tmp_path, double, single, kept):
    transformer = random_flux(FluxTransformer2DModel, num_layers=19, num_single_layers=5)
    transformer.to(torch.bfloat16).save_pretrained(tmp_path / "model/transformer")
    controlnet = random_flux(FluxControlNetModel, 1, num_layers=double, num_single_layers=single).to(torch.bfloat16)
    controlnet.save_pretrained(tmp_path / "whole")
    report = trim(tmp_path / "whole", tmp_path / "model", tmp_path / "cut")
    cut = FluxControlNetModel.from_pretrained(tmp_path / "cut", torch_dtype=torch.bfloat16)
    assert (len(cut.controlnet_blocks), len(cut.controlnet_single_blocks)) == kept
    assert report.kept_params == sum(p.numel() for p in cut.parameters()) < report.num_params
    assert torch.equal(velocity(transformer, cut), velocity(transformer, controlnet))
    assert "the same pictures" in report.text
    assert ("single" in report.text) == bool(single)
    with pytest.raises(InvalidInputError, match="diffusers reads all its layers; nothing is written"):
        trim(tmp_path / "cut", tmp_path / "model", tmp_path / "again")


def test_weights_of_another_config_are_refused(tmp_path):
    random_flux(FluxControlNetModel, num_layers=6, num_single_layers=0).save_pretrained(tmp_path / "six")
    write_config(tmp_path / "six", **FLUX, num_layers=8, num_single_layers=0)
    with pytest.raises(InvalidInputError, match="hold 6 double layers, and its config"):
        trim(tmp_path / "six", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
