"""Pictures by several noise seeds differ as their noise does, and the grid shows each of them."""

from functools import partial

import numpy as np
import pytest

from refine_control.conditions.condition import show
from refine_control.config import SamplerConfig
from refine_control.miniature.obedience import Classifier
from refine_control.miniature.scene_features import scene_features
from refine_control.miniature.scene_shards import scene_photos
from refine_control.picture_grid import picture_cells
from refine_control.pipeline.painting import paint
from refine_control.study.diversity import compare_seeds, diversity, paint_seeds, seeds_grid

PHOTOS = list(scene_photos(0, 0, 2))
MASKS = np.stack([photo.mask for photo in PHOTOS])


@pytest.fixture(scope="module")
def painted(tiny_backbone):
    sampler = SamplerConfig(num_inference_steps=1, guidance_scale=1.0, seed=7)
    return paint_seeds(tiny_backbone, tiny_backbone.pipeline.controlnet, PHOTOS, sampler, seeds=(0, 5, 0))


def test_each_seed_has_its_own_noise(tiny_backbone, painted):
    one = SamplerConfig(num_inference_steps=1, guidance_scale=1.0, seed=5)
    prompts = [photo.prompt for photo in PHOTOS]
    alone = paint(tiny_backbone, tiny_backbone.pipeline.controlnet, show(PHOTOS), prompts, one)
    np.testing.assert_array_equal(painted[1], alone)
    np.testing.assert_array_equal(painted[0], painted[2])
    assert (painted[0] != painted[1]).any((1, 2, 3)).all()


def test_spread_of_features_and_pixels(painted):
    see = partial(scene_features, Classifier().eval())
    spread = diversity(painted, MASKS, see)
    assert spread.features.shape == spread.pixels.shape == (2,)
    assert (spread.features > 0).all()
    np.testing.assert_array_equal(diversity(painted[::2], MASKS, see), np.zeros((2, 2)))


def test_grid_has_a_column_for_each_seed_and_a_row_for_each_model(painted):
    grid = seeds_grid(PHOTOS, {"teacher": painted, "edge": painted[:, ::-1]}, "Seeds")
    assert grid.columns == ["original", "seed 0", "seed 1", "seed 2"]
    assert [caption.split(":")[0] for caption in grid.captions] == ["teacher", "edge"] * 2
    np.testing.assert_array_equal(grid.rows[2][2], painted[1, 1])
    assert len(picture_cells(grid)) == 4


def test_models_are_compared_on_the_same_seeds(tiny_backbone):
    sampler = SamplerConfig(num_inference_steps=1, guidance_scale=1.0, seed=7)
    painter = (tiny_backbone, tiny_backbone.pipeline.controlnet, sampler)
    classifier = Classifier().eval()
    see = partial(scene_features, classifier)
    shown = compare_seeds({"teacher": painter, "copy": painter}, PHOTOS, 2, classifier)
    teacher, copied = shown.table.rows
    assert teacher[1:] == copied[1:]
    assert [cell.split()[0] for cell in teacher[2::2]] == ["100", "100"]
    expected = diversity(paint_seeds(*painter[:2], PHOTOS, sampler, seeds=(0, 1)), MASKS, see)
    assert float(teacher[1].split()[0]) == pytest.approx(expected.pixels.mean(), abs=0.006)
    assert float(teacher[3].split()[0]) == pytest.approx(expected.features.mean(), abs=0.006)
    assert shown.grid.columns == ["original", "seed 0", "seed 1"]
    assert len(shown.grid.rows) == 4
    assert len(compare_seeds({"teacher": painter}, PHOTOS, 2, None).table.columns) == 3
