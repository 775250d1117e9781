"""Lower and upper bounds of PSNR on photographs: a hole filled with one colour, and the autoencoder alone."""

# N photos, H W pixels

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from refine_control.metrics.image_pairs import Images, Mask, psnr
from refine_control.models.backbone import Backbone
from refine_control.photos.buckets import grouped
from refine_control.pixels import from_images, to_images
from refine_control.records import Photo

_BATCH = 64
Bounds = dict[str, dict[str, float]]
"""`floor` and `ceiling`: mean PSNR in dB, `psnr_region` and `psnr`."""


@torch.no_grad()
def decoded(backbone: Backbone, images: Images) -> Images:
    """(N, H, W, 3) uint8 through the autoencoder and back."""
    out = []
    for first in range(0, len(images), _BATCH):
        latents = backbone.encode_images(from_images(images[first : first + _BATCH]))
        out.append(to_images(backbone.decode_latents(latents).float().cpu()))
    return np.concatenate(out)


def filled(images: Images, masks: Mask) -> Images:
    """Every hole filled with the mean colour of what is kept of its picture (mid-grey where nothing is)."""
    out = images.copy()
    for image, mask in zip(out, masks, strict=True):
        image[mask] = image[~mask].mean(0).round() if (~mask).any() else 128
    return out


def psnr_bounds(backbone: Backbone, photos: Sequence[Photo]) -> Bounds:
    """The bounds of photos of any sizes."""
    scores: dict[str, list[np.ndarray]] = {"floor": [], "ceiling": []}
    for numbers in grouped(p.mask.shape for p in photos).values():
        images, masks = (np.stack([getattr(photos[n], part) for n in numbers]) for part in ("image", "mask"))
        for name, bound in (("floor", filled(images, masks)), ("ceiling", decoded(backbone, images))):
            scores[name].append(np.stack([psnr(images, bound, masks), psnr(images, bound)]))
    means = {name: np.concatenate(parts, 1).mean(1).tolist() for name, parts in scores.items()}
    return {name: {"psnr_region": region, "psnr": whole} for name, (region, whole) in means.items()}


def bounds_note(bounds: Bounds) -> str:
    """The sentence under a table."""
    floor, ceiling = ("{psnr_region:.2f} and {psnr:.2f} dB".format(**bounds[name]) for name in ("floor", "ceiling"))
    return (
        f"Of PSNR in the region and on the whole picture: filling the hole with the mean of what is kept gives {floor} "
        f"(the kept pixels untouched), the autoencoder alone {ceiling}; no row can pass the latter by skill."
    )
