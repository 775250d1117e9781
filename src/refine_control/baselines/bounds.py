"""Between what a PSNR must lie to mean anything: a hole filled with one colour, and the autoencoder's own loss."""

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
    """(N, H, W, 3) uint8 through the autoencoder and back: what is left when nothing has to be painted."""
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
    """Of photos of any sizes."""
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for numbers in grouped(p.mask.shape for p in photos).values():
        images, masks = (np.stack([getattr(photos[n], part) for n in numbers]) for part in ("image", "mask"))
        for name, made in (("floor", filled(images, masks)), ("ceiling", decoded(backbone, images))):
            found.setdefault((name, "psnr_region"), []).append(psnr(images, made, masks))
            found.setdefault((name, "psnr"), []).append(psnr(images, made))
    out: Bounds = {"floor": {}, "ceiling": {}}
    for (name, metric), values in found.items():
        out[name][metric] = float(np.concatenate(values).mean())
    return out


def bounds_note(found: Bounds) -> str:
    """The sentence under a table."""
    floor, ceiling = found["floor"], found["ceiling"]
    return (
        f"Of PSNR in the region and on the whole picture: filling the hole with the mean of what is kept gives "
        f"{floor['psnr_region']:.2f} and {floor['psnr']:.2f} dB (the kept pixels untouched), the autoencoder alone "
        f"{ceiling['psnr_region']:.2f} and {ceiling['psnr']:.2f} dB; no row can pass the latter by skill."
    )
