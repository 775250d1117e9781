"""`refine-control bench data`: speed of the data pipeline relative to the unavoidable work, and its memory.

- build: `data build` with given masks against a loop that decodes, crops, resizes and encodes the same photos and
  nothing else (no hashes, no shards, no checks).
- cache: `cache` against the same encoders called on the same batches, with their results discarded.
- batches: the rate at which training batches are read from the cache, against torch's loader over single samples.
- cached: memory and time of the batches of a whole epoch of a large cache.
- memory: peak memory of builds of few and of many photos, each in a fresh process.
"""

# H W pixels

from __future__ import annotations

import io
import itertools
import re
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from refine_control.cache.building import build_cache
from refine_control.cache.reader import Cache
from refine_control.cache.stored import SAMPLES
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
from refine_control.storage import publish_folder
from refine_control.training.batches import CacheBatches
from refine_control.training.loop import Draw

_SEED = 7
_STEP_SAMPLES = 32


class CachedEpoch(NamedTuple):
    """Every sample of a large cache, read once in training batches."""

    samples: int
    batches: int
    memory_growth: int
    """Bytes of memory of the process, file pages apart, at the end beyond those after a tenth of the batches."""
    seconds_a_batch: tuple[float, float]
    """Means of the first and of the second half: the cost is linear if they are equal."""


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
    batches_of_loader: Spread
    """That rate over the one of torch's DataLoader, which reads the same arrays sample by sample."""
    seconds_per_photo: dict[str, float]
    """By number of photos: the cost is linear if these are equal."""
    peak_memory: dict[str, int]
    """Bytes of a fresh process that builds so many photos, by number of photos."""
    cached: CachedEpoch | None
    """None where it is not asked for."""


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


class _Samples(torch.utils.data.Dataset[Any]):
    """The arrays of a cache, one sample at a time, as a loop over cached latents reads them."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, ...]:
        prompt = self.cache.arrays["prompt_index"][[row]]
        of_sample = [self.cache.take(name, [row])[0].float() for name in ("latents", "cond_latents", "masks")]
        text = [self.cache.take(name, prompt)[0].float() for name in ("prompt_embeds", "pooled_prompt_embeds")]
        return (*of_sample, *text)


def _batch_reader(cache: Cache) -> Callable[[], Any]:
    """Reads the next training batch at each call."""
    batches, steps = CacheBatches(cache, _STEP_SAMPLES), itertools.count()
    return lambda: batches.batch(Draw(0, "bench", next(steps), range(_STEP_SAMPLES)))


def _loader_reader(cache: Cache) -> Callable[[], Any]:
    """The same by torch's DataLoader in this process."""
    whole = len(cache) >= _STEP_SAMPLES
    loader = torch.utils.data.DataLoader(_Samples(cache), _STEP_SAMPLES, shuffle=True, drop_last=whole)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: next(endless)


def repeat_cache(cache: Cache, folder: Path, count: int) -> Cache:
    """A cache of `count` samples: those of `cache`, again and again. All of one size."""
    described = {key: value for key, value in cache.manifest.items() if key not in ("files", "sizes")}
    lines = (cache.folder / SAMPLES).read_text().splitlines(keepends=True)
    with publish_folder(folder, **{**described, "count": count}) as unfinished:
        for file in cache.folder.glob("*.npy"):
            values = np.load(file, mmap_mode="r")
            total = count if len(values) == len(cache) else len(values)
            out = np.lib.format.open_memmap(unfinished / file.name, "w+", values.dtype, (total, *values.shape[1:]))
            for first in range(0, total, len(values)):
                out[first : first + len(values)] = values[: total - first]
        with (unfinished / SAMPLES).open("w") as samples:
            samples.writelines(lines[number % len(lines)] for number in range(count))
    return Cache(folder)


def _anonymous_bytes() -> int:
    """Memory of this process without pages of files; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    match = re.search(r"^RssAnon:\s+(\d+)", status.read_text(), re.MULTILINE) if status.is_file() else None
    return 1024 * int(match[1]) if match else 0


def read_epoch(cache: Cache) -> CachedEpoch:
    """Reads the batches of one epoch."""
    read, number, seconds, before = _batch_reader(cache), len(cache) // _STEP_SAMPLES, [], 0
    for step in range(number):
        seconds.append(time_call(read, warmup=0, repeats=1).median)
        if step == number // 10:
            before = _anonymous_bytes()
    halves = [sum(half) / len(half) for half in (seconds[: number // 2], seconds[number // 2 :])]
    return CachedEpoch(len(cache), number, _anonymous_bytes() - before, (halves[0], halves[1]))


def _numbers(many: int) -> list[int]:
    """The numbers of photos for which time and memory are measured."""
    return sorted({1000, many} | ({8000} if many > 8000 else set())) if many else []


def bench_data(
    source: Path | None, photos: int, many: int, repeats: int, size: int = 512, cached: int = 0
) -> DataBench:
    """Measures on `source`, a folder of photos with masks and prompts, or on rendered scenes of `size` pixels.

    Time and memory are measured for 1,000 and `many` rendered scenes, and for 8,000 if `many` is larger; `many` 0 omits
    them. `cached` is the number of samples of a cache that is read for one epoch; 0 omits it."""
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

        def encoded() -> None:
            build_cache(work / "shards" / LABELED, work / f"cache-{next(numbers)}", backbone)

        cache_times = interleaved({"bare": lambda: _encoders(shards, backbone), "cache": encoded}, repeats)
        build_cache(work / "shards" / LABELED, work / "cache", backbone)
        cache = Cache(work / "cache")
        readers = {"loader": _loader_reader(cache), "batches": _batch_reader(cache)}
        reading = interleaved(readers, repeats=200)
        epoch = read_epoch(repeat_cache(cache, work / "large", cached)) if cached else None
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
            batches_per_second=1 / statistics.mean(reading["batches"].samples),
            batches_of_loader=ratio(reading["loader"], reading["batches"]).spread,
            seconds_per_photo=seconds,
            peak_memory=memory,
            cached=epoch,
        )
