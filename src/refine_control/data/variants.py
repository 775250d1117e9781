"""Shards of one role made again with fewer samples, other prompts or blurred pictures: what ablations learn from.

`prompts` are the words of the samples:
- given: their own local prompts.
- template: the least that names the object, `a circle`, from the sample's shape or category.
- shuffled: those of other samples of the same shards.
- global: those of the whole photographs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from refine_control.data.records import Photo, with_article
from refine_control.data.shards import Shards, ShardWriter, open_manifest
from refine_control.data.vocabulary import SHAPES
from refine_control.errors import InvalidInputError
from refine_control.randomness import derive_seed, permutation
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

    Raises InvalidInputError when a prompt that is asked for is not there, or `out` holds something else."""
    shards, role = Shards(source), open_manifest(source)["role"]
    described = {"variant_of": sha256_file(source / MANIFEST), "variant": list(variant)}
    with only_writer(out):
        if (out / MANIFEST).is_file():
            had = open_manifest(out)
            if {key: had.get(key) for key in described} != described:
                raise InvalidInputError(f"{out} holds other samples; choose another folder")
            return False
        count = max(1, math.ceil(variant.share * len(shards)))
        words = _prompts(shards, count, variant.prompts)
        writer = ShardWriter(out, role)
        for number in range(count):
            photo = shards[number]
            image = _blurred(photo.image) if variant.blurred else photo.image
            writer.add(replace(photo, image=image, prompt=words[number]))
            if progress and number % 64 == 63:
                progress(number + 1, count, variant.name)
        writer.finish(**described)
    return True


def _prompts(shards: Sequence[Photo], count: int, kind: Prompts) -> list[str]:
    """The prompts of the first `count` samples."""

    def worded(photo: Photo) -> str:
        if kind == "global":
            return photo.global_prompt
        return _template(photo) if kind == "template" else photo.prompt

    words = [worded(shards[number]) for number in range(count)]
    if "" in words:
        lacks = "global prompt" if kind == "global" else "shape or category in its meta"
        key = shards[words.index("")].key
        raise InvalidInputError(f"the sample {key} has no {lacks}; the {kind} prompts need one")
    if kind == "shuffled":
        return [words[number] for number in permutation(derive_seed("variants", "shuffled"), count)]
    return words


def _template(photo: Photo) -> str:
    if "shape" in photo.meta:
        return f"a {SHAPES[photo.meta['shape']]}"
    return with_article(str(photo.meta["category"])) if photo.meta.get("category") else ""


def _blurred(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 -> the same, as a bad lens would see it."""
    from PIL import Image, ImageFilter

    radius = BLUR * min(image.shape[:2]) / 64
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
