"""`refine-control mini check`: the shipped weights measured again, by anyone, on scenes that no training saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from refine_control.config import SamplerConfig
from refine_control.data import scenes
from refine_control.data.vocabulary import COLOURS, SHAPES, local_prompt
from refine_control.evaluation.metrics import psnr
from refine_control.evaluation.obedience import load_classifier, obedience, read_regions
from refine_control.models.loading import load_backbone
from refine_control.models.mini import BUNDLE
from refine_control.pipeline import inpaint
from refine_control.randomness import derive_seed, permutation


class Skill(NamedTuple):
    """Obedience in per cent of N scenes, and PSNR in dB."""

    colour: float
    shape: float
    both: float
    psnr_region: float
    psnr: float


def measure_skill(backbone: Any, classifier: Any, count: int, seed: int, sampler: SamplerConfig, prompts: str) -> Skill:
    """The teacher on unseen scenes with `local`, `empty` or `wrong` prompts (wrong: of another colour and shape).

    Obedience is always to the object that was there, so with an empty or a wrong prompt it must be at chance."""
    rendered = scenes.render(derive_seed(seed, "check"), 0, count)
    texts = {"local": rendered.local_prompts, "global": rendered.global_prompts, "empty": [""] * count}
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


CHECK_SAMPLER = SamplerConfig(num_inference_steps=20, guidance_scale=3.0, conditioning_scale=1.0)


def check_bundle(
    count: int = 200,
    seed: int = 0,
    bundle: Path | None = None,
    prompts: tuple[str, ...] = ("local", "empty", "wrong"),
    precision: Literal["fp32", "bf16"] = "fp32",
) -> dict[str, Any]:
    """`mini check`: the shipped weights measured again on `count` unseen scenes: VAE, oracle, teacher."""
    backbone = load_backbone(bundle or "mini", cpu_kernels=True)
    for part in (backbone.transformer, backbone.pipeline.controlnet):
        part.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    classifier = load_classifier(bundle or BUNDLE)
    rendered = scenes.render(derive_seed(seed, "check"), 0, count)
    pixels = rendered.images.permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = backbone.decode_latents(backbone.encode_images(pixels))
    kept = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    seen = read_regions(classifier, rendered.images.numpy(), rendered.masks.numpy())
    noise = np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    guess = read_regions(classifier, noise, rendered.masks.numpy())
    out: dict[str, Any] = {
        "scenes": count,
        "autoencoder_psnr": float(psnr(rendered.images.numpy(), kept).mean()),
        "oracle_clean": {
            n: 100 * float((getattr(seen, n) == getattr(rendered, n)).mean()) for n in ("colour", "shape")
        },
        "oracle_noise": {
            n: 100 * float((getattr(guess, n) == getattr(rendered, n)).mean()) for n in ("colour", "shape")
        },
        "sampler": {**CHECK_SAMPLER.model_dump(mode="json"), "precision": precision},
    }
    for kind in prompts:
        out[f"teacher_{kind}"] = measure_skill(backbone, classifier, count, seed, CHECK_SAMPLER, kind)._asdict()
    return out
