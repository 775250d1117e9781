"""Distances between features of the miniature's classifier; they need no download and no photograph.

Names start with `scene_` because they are not FID, CMMD or LPIPS and cannot be compared with them: the classifier was
trained on rendered shapes only. It reads the square around each mask, so the kept region hardly counts.
"""

# N scenes, H W pixels, R drawn sets; features (N, 64)

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from refine_control.errors import InvalidInputError
from refine_control.metrics.distances import Features, Rows, check_features, gaussian_mmd
from refine_control.metrics.drawn_sets import gaussian_mmd_of_draws
from refine_control.metrics.image_pairs import Images, Mask, PerImage, check_mask
from refine_control.miniature.obedience import Classifier, crop_batches

SCENE_SIGMA = 1.0
"""Comparable to the distance between two features of length 1, at most 2. With CMMD's 10 only means would matter."""
SCENE_SCALE = 1000.0


@torch.no_grad()
def scene_features(classifier: Classifier, images: Images, masks: Mask, batch_size: int = 256) -> NDArray[np.float32]:
    """The classifier's last hidden layer, (N, 64), of images (N, H, W, 3) uint8 with masks (N, H, W) bool.

    Raises InvalidInputError for a mask that does not fit or has no inpainted pixel."""
    check_mask(masks, images)
    device = next(classifier.parameters()).device
    crops = crop_batches(images, masks, batch_size)
    return np.concatenate([classifier.features(part.to(device)).float().cpu().numpy() for part in crops])


def scene_mmd(reference: ArrayLike, generated: ArrayLike) -> float:
    """1000 x squared MMD of the normalised features, Gaussian kernel of sigma 1, biased estimator.

    Raises as `distances.cmmd` does."""
    left, right = check_features(reference, generated)
    return SCENE_SCALE * gaussian_mmd(_unit(left), _unit(right), SCENE_SIGMA)


def scene_mmd_of_draws(left: Features, right: Features, rows: Rows) -> NDArray[np.float64]:
    """`scene_mmd` of each bootstrap sample of both sets, (R,)."""
    return SCENE_SCALE * gaussian_mmd_of_draws(_unit(left), _unit(right), rows, sigma=SCENE_SIGMA)


def scene_perceptual(reference: ArrayLike, generated: ArrayLike) -> PerImage:
    """Squared distance of the normalised features of each pair, (N,) in [0, 4]: 0 equal, 2 unrelated.

    Raises as `scene_mmd` does, and InvalidInputError for different numbers of images."""
    left, right = check_features(reference, generated)
    if len(left) != len(right):
        raise InvalidInputError(f"{len(left)} reference images and {len(right)} generated ones cannot be paired")
    return np.square(_unit(left) - _unit(right)).sum(1)


def _unit(features: Features) -> Features:
    """Rows normalised to length 1; a row of zeros stays zero."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(lengths == 0.0, 1.0, lengths)
