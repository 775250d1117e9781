"""`refine-control mini check`: measures the weights of a bundle on scenes that were not used in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from refine_control.baselines.bounds import decoded
from refine_control.config import Precision, SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.metrics.image_pairs import psnr
from refine_control.miniature import scenes
from refine_control.miniature.obedience import load_classifier, obedience, read_regions
from refine_control.miniature.vocabulary import COLOURS, SHAPES, local_prompt
from refine_control.models.card import BUNDLE, SAMPLING
from refine_control.models.devices import best_device
from refine_control.models.loading import load_backbone
from refine_control.pipeline.painting import inpaint
from refine_control.randomness import derive_seed, permutation, uniforms


class Skill(NamedTuple):
    """Obedience in per cent of the scenes, and PSNR in dB."""

    colour: float
    shape: float
    both: float
    psnr_region: float
    psnr: float


def measure_skill(backbone: Any, classifier: Any, count: int, seed: int, sampler: SamplerConfig, prompts: str) -> Skill:
    """Measures the teacher on unseen scenes with `local`, `empty` or `wrong` prompts (another colour and shape).

    Obedience always refers to the object of the scene, so with an empty or wrong prompt it must be at chance."""
    rendered = scenes.render(derive_seed(seed, "check"), 0, count)
    texts = {"local": rendered.local_prompts, "empty": [""] * count}
    if prompts == "wrong":
        away = permutation(derive_seed(seed, "wrong"), count)
        colours, shapes = len(COLOURS), len(SHAPES)
        texts["wrong"] = [
            local_prompt(int(c + 1 + r % (colours - 1)) % colours, int(s + 1 + r % (shapes - 1)) % shapes)
            for c, s, r in zip(rendered.colour, rendered.shape, away, strict=True)
        ]
    images, masks = rendered.images.numpy(), rendered.masks.numpy()
    painted = inpaint(backbone, backbone.pipeline.controlnet, images, masks, texts[prompts], sampler)
    obeyed = obedience(classifier, painted, masks, rendered.colour, rendered.shape)
    return Skill(
        colour=100 * float(obeyed.colour.mean()),
        shape=100 * float(obeyed.shape.mean()),
        both=100 * float(obeyed.both.mean()),
        psnr_region=float(psnr(images, painted, masks).mean()),
        psnr=float(psnr(images, painted).mean()),
    )


CHANCE_SCENES = 200
"""At most this many scenes with an empty or wrong prompt: chance level needs no third digit."""
CHECK_SAMPLER = SamplerConfig(**SAMPLING)


def photo_crops(folder: Path, seed: int, size: int = 64) -> np.ndarray:
    """One random crop of every JPEG under `folder` that is large enough, at full resolution: (N,64,64,3) uint8.

    Raises InvalidInputError if there is none."""
    from PIL import Image, ImageOps

    crops = []
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
) -> dict[str, Any]:
    """Measures VAE, classifier and teacher of a bundle on `count` unseen scenes, on the GPU if there is one.

    With `photos` it also measures the VAE on a crop of every JPEG in that folder."""
    backbone = load_backbone(bundle or "mini", cpu_kernels=True, device=best_device())
    for part in (backbone.transformer, backbone.pipeline.controlnet):
        part.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    classifier = load_classifier(bundle or BUNDLE)
    rendered = scenes.render(derive_seed(seed, "check"), 0, count)
    reconstructed = decoded(backbone, rendered.images.numpy())
    on_clean = read_regions(classifier, rendered.images.numpy(), rendered.masks.numpy())
    noise = np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    on_noise = read_regions(classifier, noise, rendered.masks.numpy())
    out: dict[str, Any] = {
        "scenes": count,
        "autoencoder_psnr": float(psnr(rendered.images.numpy(), reconstructed).mean()),
        "oracle_clean": {
            n: 100 * float((getattr(on_clean, n) == getattr(rendered, n)).mean()) for n in ("colour", "shape")
        },
        "oracle_noise": {
            n: 100 * float((getattr(on_noise, n) == getattr(rendered, n)).mean()) for n in ("colour", "shape")
        },
        "sampler": {**CHECK_SAMPLER.model_dump(mode="json"), "precision": precision},
    }
    if photos is not None:
        crops = photo_crops(photos, seed)
        out |= {
            "photo_crops": len(crops),
            "autoencoder_psnr_photo_crops": float(psnr(crops, decoded(backbone, crops)).mean()),
        }
    for kind in prompts:
        shown = count if kind == "local" else min(count, CHANCE_SCENES)
        out[f"teacher_{kind}"] = measure_skill(backbone, classifier, shown, seed, CHECK_SAMPLER, kind)._asdict()
    return out
