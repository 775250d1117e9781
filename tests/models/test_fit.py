"""Sizes that a model paints, and what fits what, from configurations alone."""

import pytest

from refine_control.errors import InvalidInputError
from refine_control.models.fit import Geometry, check_controlnet, geometry
from refine_control.models.loading import read_geometry

SD3 = {"patch_size": 2, "sample_size": 128, "pos_embed_max_size": 192, "num_layers": 24, "in_channels": 16}
SD3 |= {"attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
CONTROL = {**SD3, "num_layers": 23, "extra_conditioning_channels": 1}


def test_the_sizes_of_sd3_and_of_the_mini_model():
    assert geometry({"block_out_channels": (128, 256, 512, 512)}, SD3) == Geometry(16, 3072, 1024)
    assert read_geometry("mini") == Geometry(8, 96, 64)


def test_without_a_table_the_size_of_the_samples_bounds_the_side():
    assert geometry({"block_out_channels": (1, 1)}, {**SD3, "pos_embed_max_size": None}).largest == 256


@pytest.mark.parametrize("size", [(16, 16), (3072, 16), (1024, 1040)])
def test_sizes_that_are_painted(size):
    Geometry(16, 3072, 1024).check(*size)


@pytest.mark.parametrize(
    ("size", "word"),
    [
        ((0, 16), "16 x 0"),
        ((1000, 1000), "multiples of 16"),
        ((16, 24), "24 x 16"),
        ((3088, 16), "3072"),
        ((10**6,) * 2, "1000000"),
    ],
)
def test_sizes_that_are_not(size, word):
    with pytest.raises(InvalidInputError, match=word):
        Geometry(16, 3072, 1024).check(*size)


@pytest.mark.parametrize(
    "changed",
    [
        {"patch_size": 1},
        {"in_channels": 4},
        {"num_attention_heads": 38},
        {"joint_attention_dim": None},
        {"pooled_projection_dim": 768},
        {"extra_conditioning_channels": 2},
        {"num_layers": 24},
        {"pos_embed_max_size": 96},
    ],
    ids=str,
)
def test_a_controlnet_of_another_model_is_refused(changed):
    check_controlnet(CONTROL, SD3, "teacher")
    with pytest.raises(InvalidInputError, match="ControlNet of teacher"):
        check_controlnet({**CONTROL, **changed}, SD3, "teacher")
