"""What a cache stores, and where: its options, the order of its rows, and the names of its files.

Samples of several sizes (`buckets`) are stored size by size: the rows of one size follow one another, and what has h
and w is an array for each size: `latents-6x10.npy` holds the latents (16, 6, 10) of the rows of its size, in their
order. Each distinct prompt is stored once; prompt 0 is the empty one.
"""

# N samples, P distinct prompts, h w latents

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from refine_control.cache.compact import BLOCK
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.photos.buckets import Size
from refine_control.records import UNLABELED

SAMPLES = "samples.jsonl"
PromptStorage = Literal["full", "int8", "none"]
Posterior = Literal["mean", "mean_std"]


_LATER = ("sigmas", "stochastic")
"""Fields of a sampler that older caches do not have."""


SHOWN = "cond_latents"
"""The array of the condition's latents, as readers call it."""


def shown_array(region: bool) -> str:
    """The file name of SHOWN: with a region it holds the latents of the masked image."""
    return "masked_latents" if region else SHOWN


class Stored(NamedTuple):
    """The options of a cache: caches of the same shards and model differ in nothing else."""

    dtype: torch.dtype = torch.float32
    prompts: PromptStorage = "full"
    """Embeddings in `dtype`, in 8 bits (`compact`), or none, to be encoded in training."""
    completions: SamplerConfig | None = None
    """Sampling of the completions: the model's own ControlNet (the teacher) paints every hole once. None: no
    completions."""
    path: int = 0
    """Evenly spaced noise levels 1, ..., 1/path at which the way of a completion is kept (the first is its noise, a
    function of the row); 0 keeps the completion alone. A divisor of the sampler's steps."""
    posterior: Posterior = "mean"
    """mean_std: the standard deviation of the VAE's posterior, too, from which training draws its latents."""

    def check(self) -> Stored:
        """Itself. Raises InvalidInputError for a path whose levels are not among those of the sampler's steps."""
        steps = self.completions.num_inference_steps if self.completions else 0
        if self.path and (not steps or steps % self.path):
            raise InvalidInputError(f"--path {self.path} does not divide --complete {steps}; make it a divisor")
        if self.path and self.completions and self.completions.sigmas != "even":
            raise InvalidInputError("a path is kept at even noise levels; set sigmas of the completions to even")
        return self

    def described(self) -> dict[str, object]:
        """The fields of the manifest. What older caches do not have is left out where it has its default."""
        painted = self.completions and {
            name: value
            for name, value in self.completions.model_dump(mode="json").items()
            if name not in _LATER or value != SamplerConfig.model_fields[name].default
        }
        fields = {"dtype": str(self.dtype).removeprefix("torch."), "prompts": self.prompts, "completions": painted}
        fields |= {"path": self.path} if self.path else {}
        return fields if self.posterior == "mean" else {**fields, "posterior": self.posterior}


def sample_bytes(
    stored: Stored, role: str, channels: int, size: Size, tokens: Sequence[tuple[int, int]], width: int, pooled: int
) -> float:
    """Bytes of a sample with a region and a prompt of its own, without the text of `samples.jsonl`.

    `tokens` are (number, width) of the prompt's embeddings that are not zero, `width` that of all of them."""
    latents = channels * size[0] * size[1] * stored.dtype.itemsize
    arrays = (role != UNLABELED) + 1
    pictures = arrays * (2 if stored.posterior == "mean_std" else 1)
    pictures += max(1, stored.path) if stored.completions else 0
    numbers = sum(count * each for count, each in tokens)
    whole = sum(count for count, _ in tokens) * width * stored.dtype.itemsize
    text = {"int8": numbers * (1 + 2 / math.gcd(width, BLOCK)), "full": whole, "none": 0}[stored.prompts]
    kept = pooled * stored.dtype.itemsize if stored.prompts != "none" else 0
    return pictures * latents + size[0] * size[1] + text + kept + 4


def row_groups(sizes: Mapping[Size, int]) -> dict[Size, range]:
    """The rows of each size, from the number of samples of each in the order of the rows."""
    groups, first = {}, 0
    for size, count in sizes.items():
        groups[size] = range(first, first + count)
        first += count
    return groups


def stored_name(name: str, size: Size) -> str:
    """The array of `name` for one of several sizes (h, w)."""
    return f"{name}-{size[0]}x{size[1]}"


def numbered_prompts(samples: Path) -> tuple[list[str], list[str], list[int]]:
    """`samples.jsonl` -> keys, distinct prompts (prompt 0 is the empty one), and the prompt number of each sample."""
    keys, numbers, prompts = [], [], {"": 0}
    with samples.open("rb") as lines:
        for line in lines:
            sample = json.loads(line)
            keys.append(sample["key"])
            numbers.append(prompts.setdefault(sample["prompt"], len(prompts)))
    return keys, list(prompts), numbers
