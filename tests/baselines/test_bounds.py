"""What every PSNR is held against: one colour in the hole, and the autoencoder alone."""

import numpy as np
import pytest

from refine_control.baselines.bounds import bounds_note, decoded, filled, psnr_bounds
from refine_control.metrics.image_pairs import psnr
from refine_control.miniature.scene_shards import scene_photos
from refine_control.models.loading import load_backbone


def test_a_hole_is_filled_with_the_mean_of_what_is_kept():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, 2:] = (10, 20, 30)
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2] = True  # what is kept is of one colour
    masks[1] = True
    found = filled(images, masks)
    assert (found[0] == (10, 20, 30)).all()
    assert (found[1] == 128).all()
    assert not images[0, :2].any()


def test_the_bounds_are_the_means_of_every_photo():
    backbone = load_backbone("mini")
    photos = list(scene_photos(5, 0, 3))
    found = psnr_bounds(backbone, photos)
    images, masks = np.stack([p.image for p in photos]), np.stack([p.mask for p in photos])
    made = decoded(backbone, images)
    assert found["ceiling"]["psnr_region"] == pytest.approx(psnr(images, made, masks).mean())
    assert found["ceiling"]["psnr"] == pytest.approx(psnr(images, made).mean())
    assert found["ceiling"]["psnr_region"] > found["floor"]["psnr_region"] + 5
    assert f"{found['floor']['psnr_region']:.2f}" in bounds_note(found)
