"""The oracle: where it looks, and that it reads renders and nothing else."""

import numpy as np
import pytest
import torch

from refine_control.errors import MissingError
from refine_control.miniature import scenes
from refine_control.miniature.obedience import CROP, load_classifier, obedience, read_regions, region_crops
from refine_control.miniature.vocabulary import COLOURS, SHAPES
from refine_control.models.card import BUNDLE

COUNT = 1000


@pytest.fixture(scope="module")
def rendered():
    return scenes.render(2024, 0, COUNT)


@pytest.fixture(scope="module")
def classifier():
    return load_classifier(BUNDLE)


def mask_of(top, bottom, left, right):
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, top:bottom, left:right] = True
    return mask


PIXELS = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("top", "left"), [(0, 0), (8, 16), (32, 32)])
def test_a_box_of_the_crop_s_size_is_the_crop(top, left):
    crop = region_crops(PIXELS, mask_of(top, top + CROP, left, left + CROP))
    torch.testing.assert_close(crop, PIXELS[:, :, top : top + CROP, left : left + CROP], rtol=0, atol=1e-5)


def test_a_box_of_another_size_is_scaled_to_the_whole_crop():
    crop = region_crops(PIXELS, mask_of(10, 26, 20, 36))
    inner = torch.nn.functional.interpolate(PIXELS[:, :, 10:26, 20:36], size=(CROP, CROP), mode="bilinear")
    torch.testing.assert_close(crop[:, :, 1:-1, 1:-1], inner[:, :, 1:-1, 1:-1], rtol=0, atol=1e-5)


def test_a_flat_box_gets_the_square_around_it_and_the_border_repeats():
    crop = region_crops(PIXELS, mask_of(30, 34, 10, 42))
    torch.testing.assert_close(crop, PIXELS[:, :, 16:48, 10:42], rtol=0, atol=1e-5)
    crop = region_crops(PIXELS, mask_of(0, 4, 10, 42))
    torch.testing.assert_close(crop[:, :, :14], PIXELS[:, :, :1, 10:42].expand(-1, -1, 14, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(crop[:, :, 14:], PIXELS[:, :, :18, 10:42], rtol=0, atol=1e-5)


def test_only_the_extent_of_a_mask_counts():
    hollow = mask_of(8, 40, 16, 48)
    hollow[:, 12:36, 20:44] = False
    assert torch.equal(region_crops(PIXELS, hollow), region_crops(PIXELS, mask_of(8, 40, 16, 48)))


def test_an_empty_mask_has_no_region():
    with pytest.raises(ValueError, match="empty mask"):
        region_crops(PIXELS, mask_of(0, 0, 0, 0))


def shares(classifier, images, rendered):
    seen = read_regions(classifier, images, rendered.masks.numpy())
    return {name: (getattr(seen, name) == getattr(rendered, name)).mean() for name in ("colour", "shape")}


def test_renders_are_read(classifier, rendered):
    found = shares(classifier, rendered.images.numpy(), rendered)
    assert found["colour"] >= 0.99, found
    assert found["shape"] >= 0.99, found


def blanked(rendered):
    return np.where(rendered.masks.numpy()[..., None], np.uint8(0), rendered.images.numpy())


def noise(rendered):
    return np.random.default_rng(0).integers(0, 256, rendered.images.shape, dtype=np.uint8)


@pytest.mark.parametrize("make", [blanked, noise])
def test_without_the_target_the_oracle_guesses(classifier, rendered, make):
    found = shares(classifier, make(rendered), rendered)
    for name, kinds in (("colour", len(COLOURS)), ("shape", len(SHAPES))):
        chance = 1 / kinds
        assert abs(found[name] - chance) < 4 * np.sqrt(chance * (1 - chance) / COUNT), (name, found)


def test_obedience_compares_with_what_was_wanted(classifier, rendered):
    images, masks = rendered.images.numpy()[:50], rendered.masks.numpy()[:50]
    colour, shape = rendered.colour[:50], rendered.shape[:50]
    right = obedience(classifier, images, masks, colour, shape)
    assert right.both.mean() > 0.9
    wrong = obedience(classifier, images, masks, (colour + 1) % len(COLOURS), shape)
    np.testing.assert_array_equal(wrong.shape, right.shape)
    assert wrong.colour.mean() < 0.1
    np.testing.assert_array_equal(wrong.both, wrong.colour & wrong.shape)


def test_a_bundle_without_an_oracle_is_missing_one(tmp_path):
    with pytest.raises(MissingError, match="mini train"):
        load_classifier(tmp_path)
