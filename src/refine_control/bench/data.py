"""`refine-control bench data`: speed of the data pipeline relative to the unavoidable work, and its memory.

- build: `data build` with given masks against a loop that decodes, crops, resizes and encodes the same photos and
  nothing else (no hashes, no shards, no checks).
- cache: `cache` against the same encoders called on the same batches, with their results discarded.
- batches: the rate at which training batches are read from the cache.
- memory: peak memory of builds of few and of many photos, each in a fresh process.
"""

# H W pixels

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from refine_control.cache.building import build_cache
from refine_control.cache.reader import Cache
from refine_control.cache.writer import BATCH
from refine_control.conditions.condition import show
from refine_control.metrics.cost import Spread, interleaved, ratio, run_fresh, time_call
from refine_control.miniature import scenes
from refine_control.models.loading import load_backbone
from refine_control.photos.build import build
from refine_control.photos.load import crop_box, load_mask
from refine_control.photos.shards import IMAGE_FORMATS, Shards
from refine_control.photos.sources import entries
from refine_control.pixels import from_images
from refine_control.records import LABELED, Entry
from refine_control.training.batches import CacheBatches
from refine_control.training.loop import Draw

_SEED = 7
_STEP_SAMPLES = 32


class DataBench(NamedTuple):
    """Results of one run on one machine; a ratio above 1 means faster than the bare work."""

    photos: int
    threads: int
    build_of_bare: Spread
    """Photos a second of `data build` over those of the bare loop."""
    build_photos_per_second: float
    cache_of_bare: Spread
    """Samples a second of `cache` over those of the encoders alone."""
    batches_per_second: float
    """Batches of 32 read from the cache."""
    seconds_per_photo: dict[str, float]
    """By number of photos: the cost is linear if these are equal."""
    peak_memory: dict[str, int]
    """Bytes of a fresh process that builds so many photos, by number of photos."""


def write_photos(folder: Path, count: int, side: int) -> None:
    """Rendered scenes as `name.jpg`, `name.mask.png` and `name.txt`, enlarged to `side` pixels."""
    folder.mkdir(parents=True)
    for first in range(0, count, 256):
        rendered = scenes.render(_SEED, first, min(256, count - first))
        for i, prompt in enumerate(rendered.local_prompts):
            name = folder / f"{first + i:06d}"
            image = Image.fromarray(rendered.images[i].numpy()).resize((side, side), Image.Resampling.BICUBIC)
            image.save(name.with_suffix(".jpg"), quality=92)
            mask = Image.fromarray(rendered.masks[i].numpy()).resize((side, side), Image.Resampling.NEAREST)
            mask.save(name.with_suffix(".mask.png"))
            name.with_suffix(".txt").write_text(prompt)


def _bare(listed: list[Entry], size: int) -> None:
    """Decodes, crops, resizes and encodes; keeps nothing."""
    for entry in listed:
        mask = load_mask(entry)
        x, y, side = crop_box(mask)
        with Image.open(entry.image_path) as opened:
            square = opened.convert("RGB").crop((x, y, x + side, y + side))
        image = square.resize((size, size), Image.Resampling.LANCZOS)
        hole = Image.fromarray(mask[y : y + side, x : x + side].astype(np.float32))
        small = np.asarray(hole.resize((size, size), Image.Resampling.BOX)) > 0.5
        image.save(io.BytesIO(), **IMAGE_FORMATS["webp"])
        Image.fromarray(small.astype(np.uint8) * 255).save(io.BytesIO(), **IMAGE_FORMATS["png"])


def _encoders(shards: Shards, backbone: Any) -> None:
    """The computation that a cache of these samples needs."""
    for first in range(0, len(shards), BATCH):
        chunk = [shards[row] for row in range(first, min(first + BATCH, len(shards)))]
        pixels, _ = show(chunk).tensors()
        backbone.encode_images(pixels)
        backbone.encode_images(from_images(np.stack([photo.image for photo in chunk])))
    prompts = sorted({shards[row].prompt for row in range(len(shards))})
    for first in range(0, len(prompts), BATCH):
        backbone.encode_prompts(prompts[first : first + BATCH])


def _numbers(many: int) -> list[int]:
    """The numbers of photos for which time and memory are measured."""
    return sorted({1000, many} | ({8000} if many > 8000 else set())) if many else []


def bench_data(source: Path | None, photos: int, many: int, repeats: int, size: int = 512) -> DataBench:
    """Measures on `source`, a folder of photos with masks and prompts, or on rendered scenes of `size` pixels.

    Time and memory are measured for 1,000 and `many` rendered scenes, and for 8,000 if `many` is larger; `many` 0 omits
    them."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if source is None:
            source = work / "photos"
            write_photos(source, photos, size)
        listed = [entry for entry in entries(source) if entry.problem is None][:photos]
        numbers = iter(range(10**6))
        side = min(256, size)

        def ours() -> None:
            build(source, work / f"build-{next(numbers)}", size=side, limit=photos)

        build_times = interleaved({"bare": lambda: _bare(listed, side), "build": ours}, repeats)
        build(source, work / "shards", size=64, limit=photos, test_fraction=0.0, unlabeled_fraction=0.0)
        shards, backbone = Shards(work / "shards" / LABELED), load_backbone("mini")

        def cached() -> None:
            build_cache(work / "shards" / LABELED, work / f"cache-{next(numbers)}", backbone)

        cache_times = interleaved({"bare": lambda: _encoders(shards, backbone), "cache": cached}, repeats)
        build_cache(work / "shards" / LABELED, work / "cache", backbone)
        batches = CacheBatches(Cache(work / "cache"), _STEP_SAMPLES)
        steps = iter(range(200))
        reading = time_call(
            lambda: batches.batch(Draw(0, "bench", next(steps), range(_STEP_SAMPLES))), warmup=0, repeats=200
        )
        seconds: dict[str, float] = {}
        memory: dict[str, int] = {}
        for number in _numbers(many):
            write_photos(work / f"many-{number}", number, 64)
            taken, memory[str(number)] = run_fresh(build, work / f"many-{number}", work / f"built-{number}", size=64)
            seconds[str(number)] = taken / number
            shutil.rmtree(work / f"many-{number}")
        return DataBench(
            photos=len(listed),
            threads=torch.get_num_threads(),
            build_of_bare=ratio(build_times["bare"], build_times["build"]).spread,
            build_photos_per_second=len(listed) / build_times["build"].median,
            cache_of_bare=ratio(cache_times["bare"], cache_times["cache"]).spread,
            batches_per_second=len(reading.samples) / sum(reading.samples),
            seconds_per_photo=seconds,
            peak_memory=memory,
        )
