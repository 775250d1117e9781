"""Obedience on photographs, where no classifier knows colour and shape: CLIP scores of the square around the mask.

The score with the region's prompt is compared with those of the photograph's global prompt and of another region's
prompt: a model that obeys raises only the first.
"""

# N photographs, H W pixels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from refine_control.metrics.features import ClipText, clip_features, text_features
from refine_control.metrics.features.clip import central_square
from refine_control.metrics.image_pairs import Images, Mask, PerImage
from refine_control.records import Photo

SCALE = 100.0
"""CLIP scores are cosines times 100."""


def mask_square(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Rows and columns of the smallest square around the mask, moved inside the image; at most its shorter side.

    Raises ValueError for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise ValueError("an empty mask has no region")
    side = min(max(int(np.ptp(rows)), int(np.ptp(columns))) + 1, *mask.shape)
    windows = []
    for line, length in ((rows, mask.shape[0]), (columns, mask.shape[1])):
        start = int(line[0] + line[-1] + 1 - side) // 2
        start = min(max(start, 0), length - side)
        windows.append(slice(start, start + side))
    return windows[0], windows[1]


def region_pictures(images: Images, masks: Mask, side: int) -> NDArray[np.uint8]:
    """The square around each region, for CLIP: (N, H, W, 3) uint8 and (N, H, W) -> (N, side, side, 3)."""
    return np.stack([central_square(image[mask_square(mask)], side) for image, mask in zip(images, masks, strict=True)])


def prompts_asked(photos: Sequence[Photo]) -> dict[str, list[str]]:
    """Prompts by metric: the region's, the photograph's, and another region's.

    `clip_global`: the global prompt, or the prompts of all regions of the same photograph (`meta["photo"]`).
    `clip_other`: a different prompt, of the next region of the same photograph or else of the next photograph; omitted
    if all prompts are equal."""
    by_photo: dict[object, list[str]] = {}
    for p in photos:
        by_photo.setdefault(p.meta.get("photo", p.key), []).append(p.prompt)
    asked = {"clip_local": [p.prompt for p in photos], "clip_global": [], "clip_other": []}
    for number, p in enumerate(photos):
        prompts = by_photo[p.meta.get("photo", p.key)]
        asked["clip_global"].append(p.global_prompt or ", ".join(dict.fromkeys(prompts)))
        elsewhere = (photos[(number + step) % len(photos)].prompt for step in range(1, len(photos)))
        after = chain(prompts[prompts.index(p.prompt) + 1 :], prompts, elsewhere)
        asked["clip_other"].append(next((other for other in after if other != p.prompt), ""))
    return asked if all(asked["clip_other"]) else {name: asked[name] for name in ("clip_local", "clip_global")}


def clip_scores(
    pictures: object, text: ClipText, images: Images, masks: Mask, asked: Mapping[str, Sequence[str]]
) -> dict[str, PerImage]:
    """100 x cosine of each region with each kind of prompt, (N,). `pictures` is the image tower of the same CLIP."""
    side = pictures.config.image_size  # type: ignore[attr-defined]
    seen = clip_features(pictures, region_pictures(images, masks, side))  # type: ignore[arg-type]
    return {
        name: SCALE * (seen * text_features(text, prompts)).sum(1).astype(np.float64) for name, prompts in asked.items()
    }
