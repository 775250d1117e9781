"""How much the pictures of one scene differ between noise seeds: a model that answers every seed alike has collapsed.

# K noise seeds, N scenes, H W pixels, D width of a feature; pictures (K, N, H, W, 3) uint8, mask (N, H, W) bool

Every function returns one value for each scene, (N,) float64: the mean over all K (K - 1) / 2 pairs of its pictures.
Compare a model with another by `statistics.mean_ratio`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_control.errors import InvalidInputError
from refine_control.metrics.image_pairs import Mask, PerImage, check_mask


def feature_spread(features: ArrayLike) -> PerImage:
    """Mean Euclidean distance between the features (K, N, D) of a scene's pictures.

    Raises InvalidInputError for another shape, fewer than two seeds and numbers that are not finite."""
    values = np.asarray(features, np.float64)
    if values.ndim != 3 or not np.isfinite(values).all():
        raise InvalidInputError(f"features of shape {values.shape} are not (K, N, D) of finite numbers")
    return _mean_over_pairs(values, lambda one, other: np.linalg.norm(one - other, axis=-1))


def pixel_spread(pictures: NDArray[np.uint8], mask: Mask) -> PerImage:
    """Mean over pairs of the root mean square difference inside the mask, in levels of [0, 255].

    Raises InvalidInputError for pictures or a mask that are not as the module says and fewer than two seeds."""
    if not isinstance(pictures, np.ndarray) or pictures.dtype != np.uint8 or pictures.shape[4:] != (3,):
        raise InvalidInputError(f"pictures of shape {np.shape(pictures)} are not (K, N, H, W, 3) uint8")
    check_mask(mask, pictures[0])
    inside = mask[..., None] / (3.0 * mask.sum((1, 2)))[:, None, None, None]

    def distance(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> PerImage:
        return np.sqrt((np.square(one.astype(np.float64) - other) * inside).sum((1, 2, 3)))

    return _mean_over_pairs(pictures, distance)


def _mean_over_pairs(values: NDArray, distance: Callable[[NDArray, NDArray], PerImage]) -> PerImage:
    if len(values) < 2:
        raise InvalidInputError(f"diversity needs pictures of at least two noise seeds; there are {len(values)}")
    return np.mean([distance(one, other) for one, other in combinations(values, 2)], axis=0)
