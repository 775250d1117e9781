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
    """(N, H, W, 3) uint8 encoded and decoded: what the autoencoder keeps of a picture."""
    out = []
    for first in range(0, len(images), _BATCH):
        pixels = from_images(images[first : first + _BATCH])
        back = backbone.decode_latents(backbone.encode_images(pixels)).float().cpu()
        out.append(to_images(back))
    return np.concatenate(out)


def filled(images: Images, masks: Mask) -> Images:
    """Every hole filled with the mean colour of what is kept of its picture (mid-grey where nothing is)."""
    out = images.copy()
    for image, mask in zip(out, masks, strict=True):
        image[mask] = image[~mask].mean(0).round() if (~mask).any() else 128
    return out


def psnr_bounds(backbone: Backbone, photos: Sequence[Photo]) -> Bounds:
    """Means over photos, which may differ in size."""
    values: dict[tuple[str, str], list[np.ndarray]] = {}
    for numbers in grouped(p.mask.shape for p in photos).values():
        images, masks = (np.stack([getattr(photos[n], part) for n in numbers]) for part in ("image", "mask"))
        for name, images_of_bound in (("floor", filled(images, masks)), ("ceiling", decoded(backbone, images))):
            values.setdefault((name, "psnr_region"), []).append(psnr(images, images_of_bound, masks))
            values.setdefault((name, "psnr"), []).append(psnr(images, images_of_bound))
    out: Bounds = {"floor": {}, "ceiling": {}}
    for (name, metric), parts in values.items():
        out[name][metric] = float(np.concatenate(parts).mean())
    return out


def bounds_note(bounds: Bounds) -> str:
    """The sentence under a table."""
    floor, ceiling = bounds["floor"], bounds["ceiling"]
    return (
        f"Of PSNR in the region and on the whole picture: filling the hole with the mean of what is kept gives "
        f"{floor['psnr_region']:.2f} and {floor['psnr']:.2f} dB (the kept pixels untouched), the autoencoder alone "
        f"{ceiling['psnr_region']:.2f} and {ceiling['psnr']:.2f} dB; no row can pass the latter by skill."
    )
