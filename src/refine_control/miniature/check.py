"""`refine-control mini check`: measures the weights of a bundle on scenes that were not used in training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refine_control.baselines.bounds import decoded
from refine_control.conditions.condition import Shown
from refine_control.config import Precision, SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.metrics.image_pairs import psnr
from refine_control.miniature import scenes
from refine_control.miniature.obedience import Classifier, Obedience, load_classifier, obedience
from refine_control.miniature.vocabulary import COLOURS, SHAPES, local_prompt
from refine_control.models.backbone import Backbone
from refine_control.models.card import BUNDLE, SAMPLING
from refine_control.models.controlnet import ControlNet
from refine_control.models.devices import best_device
from refine_control.models.loading import load_backbone
from refine_control.pipeline.painting import paint
from refine_control.randomness import derive_seed, permutation, uniforms


def decoded_psnr(backbone: Backbone, images: np.ndarray) -> float:
    """Mean PSNR in dB of the autoencoder's reconstruction of images (N,H,W,3) uint8."""
    return float(psnr(images, decoded(backbone, images)).mean())


def painted_psnr(images: np.ndarray, painted: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Mean PSNR in dB of inpainted images (N,H,W,3) uint8 in the region and on the whole picture."""
    return {
        "psnr_region": float(psnr(images, painted, masks).mean()),
        "psnr": float(psnr(images, painted).mean()),
    }


def _per_cent(obeyed: Obedience, *names: str) -> dict[str, float]:
    return {name: 100 * float(getattr(obeyed, name).mean()) for name in names}


def measure_skill(
    backbone: Backbone,
    classifier: Classifier,
    count: int,
    seed: int,
    prompts: str,
    sampler: SamplerConfig | None = None,
    controlnet: ControlNet | None = None,
) -> dict[str, float]:
    """Obedience in per cent of unseen scenes and PSNR in dB, with `local`, `empty` or `wrong` prompts.

    Of a `controlnet` (None: the backbone's) with a `sampler` (None: CHECK_SAMPLER). A wrong prompt names another colour
    and shape. Obedience always refers to the scene's object: with an empty or wrong prompt it must be at chance."""
    rendered = scenes.render(derive_seed(seed, "check"), 0, count)
    texts = {"local": rendered.local_prompts, "empty": [""] * count}
    if prompts == "wrong":
        away = permutation(derive_seed(seed, "wrong"), count)
        colour, shape = (
            (right + 1 + away % (len(names) - 1)) % len(names)
            for right, names in ((rendered.colour, COLOURS), (rendered.shape, SHAPES))
        )
        texts["wrong"] = list(map(local_prompt, colour.tolist(), shape.tolist()))
    images, masks = rendered.images.numpy(), rendered.masks.numpy()
    network = backbone.pipeline.controlnet if controlnet is None else controlnet
    painted = paint(backbone, network, Shown(images, masks), texts[prompts], sampler or CHECK_SAMPLER)
    obeyed = obedience(classifier, painted, masks, rendered.colour, rendered.shape)
    return _per_cent(obeyed, "colour", "shape", "both") | painted_psnr(images, painted, masks)


CHANCE_SCENES = 200
"""At most this many scenes with an empty or wrong prompt: chance level needs no third digit."""
CHECK_SAMPLER = SamplerConfig(**SAMPLING)


def photo_crops(folder: Path, seed: int) -> np.ndarray:
    """One random crop of every JPEG under `folder` that is large enough, at full resolution: (N,64,64,3) uint8.

    Raises InvalidInputError if there is none."""
    from PIL import Image, ImageOps

    size, crops = scenes.SIZE, []
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        with Image.open(path) as opened:
            image = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        if min(image.shape[:2]) >= size:
            u, v = uniforms(derive_seed(seed, "photo crops"), np.array([number]), 2)[0]
            y, x = int(u * (image.shape[0] - size + 1)), int(v * (image.shape[1] - size + 1))
            crops.append(image[y : y + size, x : x + size])
    if not crops:
        raise InvalidInputError(
            f"{folder} contains no JPEG of at least {size} x {size} pixels; name a folder of photographs"
        )
    return np.stack(crops)


def check_bundle(
    count: int = 200,
    seed: int = 0,
    bundle: Path | None = None,
    prompts: tuple[str, ...] = ("local", "empty", "wrong"),
    precision: Precision = "fp32",
    photos: Path | None = None,
) -> Mapping[str, Any]:
    """Measures VAE, classifier and teacher of a bundle on `count` unseen scenes, on the GPU if there is one.

    With `photos` it also measures the VAE on a crop of every JPEG in that folder."""
    backbone = load_backbone(bundle or "mini", cpu_kernels=True, device=best_device())
    for part in (backbone.transformer, backbone.pipeline.controlnet):
        part.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    classifier = load_classifier(bundle or BUNDLE)
    rendered = scenes.render(derive_seed(seed, "check"), 0, count)
    images, masks = rendered.images.numpy(), rendered.masks.numpy()
    noise = np.random.default_rng(seed).integers(0, 256, images.shape, dtype=np.uint8)
    clean, noisy = (obedience(classifier, each, masks, rendered.colour, rendered.shape) for each in (images, noise))
    out = {
        "scenes": count,
        "autoencoder_psnr": decoded_psnr(backbone, images),
        "oracle_clean": _per_cent(clean, "colour", "shape"),
        "oracle_noise": _per_cent(noisy, "colour", "shape"),
        "sampler": {**CHECK_SAMPLER.model_dump(mode="json"), "precision": precision},
    }
    if photos is not None:
        crops = photo_crops(photos, seed)
        out |= {"photo_crops": len(crops), "autoencoder_psnr_photo_crops": decoded_psnr(backbone, crops)}
    for kind in prompts:
        tested = count if kind == "local" else min(count, CHANCE_SCENES)
        out[f"teacher_{kind}"] = measure_skill(backbone, classifier, tested, seed, kind)
    return out
