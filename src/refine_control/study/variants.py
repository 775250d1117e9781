"""Shards of one role with fewer samples, other prompts or blurred pictures: the training data of ablations.

The prompts are those of `annotation.reword`: given, template (`a circle`, from a scene's shape or a category),
shuffled between photographs, or global.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from refine_control.annotation.reword import Worded
from refine_control.annotation.reword import variant as reworded
from refine_control.errors import InvalidInputError
from refine_control.miniature.vocabulary import SHAPES
from refine_control.photos.shards import Shards, ShardWriter, open_manifest
from refine_control.randomness import derive_seed
from refine_control.records import Photo
from refine_control.storage import MANIFEST, only_writer, sha256_file

Prompts = Literal["given", "template", "shuffled", "global"]
BLUR = 2.0
"""Standard deviation of the blur in 64ths of the shorter side."""


class Variant(NamedTuple):
    """What is changed of the shards of a role; by default nothing."""

    share: float = 1.0
    """Of the samples, the first of them; at least one."""
    prompts: Prompts = "given"
    blurred: bool = False

    @property
    def name(self) -> str:
        """`10%_global_blurred`; empty where nothing is changed."""
        words = [f"{100 * self.share:g}%"] if self.share < 1 else []
        words += [self.prompts] if self.prompts != "given" else []
        return "_".join([*words, *(["blurred"] if self.blurred else [])])


def build_variant(
    source: Path, out: Path, variant: Variant, progress: Callable[[int, int, str], None] | None = None
) -> bool:
    """Writes `out`, shards of the role of `source`; False where they are there already.

    Raises InvalidInputError as `data.reword.variant` does, and when `out` holds something else."""
    shards, role = Shards(source), open_manifest(source)["role"]
    described = {"variant_of": sha256_file(source / MANIFEST), "variant": list(variant)}
    with only_writer(out):
        if (out / MANIFEST).is_file():
            manifest = open_manifest(out)
            if {key: manifest.get(key) for key in described} != described:
                raise InvalidInputError(f"{out} holds other samples; choose another folder")
            return False
        count = max(1, math.ceil(round(variant.share * len(shards), 6)))
        words = reworded(
            [_worded(shards[n]) for n in range(count)], variant.prompts, derive_seed("variants", variant.prompts)
        )
        writer = ShardWriter(out, role, condition=shards.condition)
        for number in range(count):
            photo = shards[number]
            image = _blurred(photo.image) if variant.blurred else photo.image
            writer.add(replace(photo, image=image, prompt=words[number]))
            if progress and number % 64 == 63:
                progress(number + 1, count, variant.name)
        writer.finish(**described)
    return True


def _worded(photo: Photo) -> Worded:
    category = SHAPES[photo.meta["shape"]] if "shape" in photo.meta else str(photo.meta.get("category") or "")
    return Worded(str(photo.meta.get("photo") or photo.key), photo.prompt, category, photo.global_prompt)


def _blurred(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 -> the same, as a bad lens would see it."""
    from PIL import Image, ImageFilter

    radius = BLUR * min(image.shape[:2]) / 64
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
