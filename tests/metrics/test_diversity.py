"""Spread between noise seeds: nothing for equal pictures, linear in their distance, inside the mask alone."""

import numpy as np
import pytest

from refine_control.errors import InvalidInputError
from refine_control.metrics.diversity import feature_spread, pixel_spread


def test_spread_is_the_mean_distance_of_all_pairs():
    corners = np.array([[[0.0, 0.0]], [[3.0, 0.0]], [[0.0, 4.0]]])  # a right triangle, one scene
    np.testing.assert_allclose(feature_spread(corners), [(3 + 4 + 5) / 3])
    both = np.concatenate([corners, np.zeros((3, 1, 2))], axis=1)
    np.testing.assert_allclose(feature_spread(both), [4, 0])


def test_pixels_count_inside_the_mask_alone():
    pictures = np.full((2, 2, 6, 5, 3), 100, np.uint8)
    mask = np.zeros((2, 6, 5), bool)
    mask[0, 1:3, 1:4], mask[1, :1, :1] = True, True
    pictures[1][~mask] = 255
    np.testing.assert_array_equal(pixel_spread(pictures, mask), [0, 0])
    pictures[1, 0, 1:3, 1:4] = 92  # below: a difference of unsigned bytes must not wrap
    np.testing.assert_allclose(pixel_spread(pictures, mask), [8, 0])


def test_what_has_no_spread_is_refused():
    with pytest.raises(InvalidInputError, match="at least two noise seeds; there are 1"):
        feature_spread(np.zeros((1, 3, 4)))
    with pytest.raises(InvalidInputError, match="not \\(K, N, D\\)"):
        feature_spread(np.zeros((3, 4)))
    with pytest.raises(InvalidInputError, match="not \\(K, N, H, W, 3\\) uint8"):
        pixel_spread(np.zeros((2, 1, 4, 4, 3)), np.ones((1, 4, 4), bool))
    with pytest.raises(InvalidInputError, match="mask"):
        pixel_spread(np.zeros((2, 1, 4, 4, 3), np.uint8), np.ones((2, 4, 4), bool))
