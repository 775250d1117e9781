"""The records of conditions, and what of them a ControlNet reads."""

import numpy as np
import pytest
import torch

from refine_control.conditions.condition import (
    Shown,
    check_condition,
    condition_names,
    control_cond,
    find_condition,
    has_region,
    own_condition,
    show,
)
from refine_control.errors import InvalidInputError
from refine_control.records import Photo

GENERATOR = torch.Generator().manual_seed(0)
LATENTS = torch.randn(2, 16, 4, 4, generator=GENERATOR)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
MASK = np.zeros((16, 16), bool)
MASK[4:8, 4:12] = True


def photo(number, cond=None):
    return Photo(str(number), IMAGES[number], MASK, "a circle", cond=cond)


def test_every_record_is_named_as_its_module_and_inpainting_alone_has_a_region():
    names = condition_names()
    assert names[0] == "inpaint"
    assert {"canny", "depth", "pose", "lowres", "edit"} < set(names)
    records = [find_condition(name) for name in names]
    assert [record.name for record in records] == names
    assert [record.name for record in records if record.region] == ["inpaint"]
    assert [record.extra_channels for record in records] == [1] + [0] * (len(names) - 1)


@pytest.mark.parametrize("name", ["cany", "condition", "", "../canny"])
def test_a_condition_of_another_name_is_refused_with_those_that_there_are(name):
    with pytest.raises(InvalidInputError, match=r"there is no condition .*; choose one of inpaint, blur, canny, depth"):
        find_condition(name)


@pytest.mark.parametrize("name", ["canny", "lowres"])
def test_a_prepared_picture_has_the_size_of_the_photograph(name):
    prepared = find_condition(name).prepare(np.pad(IMAGES[0], ((0, 3), (0, 6), (0, 0))))  # no multiples of 4
    assert prepared.shape == (19, 22, 3)
    assert prepared.dtype == np.uint8
    assert prepared.std() > 0


def test_without_a_region_the_controlnet_reads_the_latents_of_the_condition_alone():
    assert control_cond(LATENTS, None) is LATENTS
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, :8] = 1
    cond = control_cond(LATENTS, mask)
    assert torch.equal(cond[:, :16], LATENTS)
    assert cond[:, 16].eq(0).sum() == 2 * 4  # the first of four rows is to be painted
    assert cond[:, 16, 1:].eq(1).all()


def test_photos_without_condition_pictures_show_what_is_outside_the_mask():
    shown = show([photo(0), photo(1)])
    assert shown.masks.shape == (2, 16, 16)
    pixels, mask = shown.tensors()
    assert pixels[:, :, MASK].eq(-1).all()
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.from_numpy(IMAGES[0, 0, 0]) / 127.5 - 1)
    assert mask.sum() == 2 * MASK.sum()


def test_photos_with_condition_pictures_show_these_and_no_mask():
    shown = show([photo(0, IMAGES[2]), photo(1, IMAGES[2])])
    assert shown.masks is None
    pixels, mask = shown.tensors()
    assert mask is None
    torch.testing.assert_close(pixels[0], torch.from_numpy(IMAGES[2]).permute(2, 0, 1) / 127.5 - 1)
    assert pixels[:, :, MASK].gt(-1).any()


@pytest.mark.parametrize("conds", [(None, 2), (2, None)])
def test_photos_of_two_conditions_are_no_batch(conds):
    mixed = [photo(number, None if cond is None else IMAGES[cond]) for number, cond in enumerate(conds)]
    with pytest.raises(InvalidInputError, match="some samples have a condition picture and others none; build them"):
        show(mixed)


@pytest.mark.parametrize("masks", [None, np.stack([MASK, ~MASK, MASK])])
def test_parts_of_what_is_shown_are_joined_to_the_whole(masks):
    whole = Shown(IMAGES, masks)
    joined = Shown.joined([whole.take(slice(1)), whole.take(slice(1, 3))])
    for part, expected in zip(joined, whole, strict=True):
        np.testing.assert_array_equal(part, expected)


CANNY, REGION, UNNAMED = (
    {"extra_conditioning_channels": 0, "condition": "canny"},
    {"extra_conditioning_channels": 1},
    {"extra_conditioning_channels": 0},
)


def test_what_a_config_says_of_the_condition():
    assert [own_condition(config) for config in (CANNY, REGION, UNNAMED)] == ["canny", "inpaint", None]
    assert [has_region(config) for config in (CANNY, REGION, UNNAMED)] == [False, True, False]


@pytest.mark.parametrize(("config", "condition"), [(CANNY, "canny"), (REGION, "inpaint"), (UNNAMED, "depth")])
def test_a_controlnet_takes_its_condition_and_an_unnamed_one_any_without_a_region(config, condition):
    check_condition(config, condition, "teacher")


@pytest.mark.parametrize(
    ("config", "condition", "said"),
    [
        (CANNY, "depth", "the ControlNet of teacher is for canny, and the samples are of the condition depth; "),
        (CANNY, "inpaint", "for canny, .* condition inpaint; use those of one condition"),
        (REGION, "canny", "for inpaint, .* condition canny"),
        (UNNAMED, "inpaint", "for another condition, of 0 channels beside the latents, .* condition inpaint"),
        ({"extra_conditioning_channels": 4}, "inpaint", "another condition, of 4 channels beside the latents"),
    ],
)
def test_a_controlnet_of_another_condition_is_refused_in_a_sentence(config, condition, said):
    with pytest.raises(InvalidInputError, match=said):
        check_condition(config, condition, "teacher")
