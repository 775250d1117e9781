"""`refine-control bench features`: speed of the metrics that use a network, relative to that network alone.

- features: from uint8 images to features as `evaluate` does it, against the bare network on prepared tensors with the
  same batch size and the memory layout that is fastest for it.
- distances: seconds of each distance between sets, and of a bootstrap sample, for three numbers of images.

The networks have random weights, which do not affect their speed, on the device that `evaluate` uses.
"""

# N pictures, H W pixels, n pictures of a batch, D width of a feature, R drawn sets

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from refine_control.metrics import features
from refine_control.metrics.cost import Spread, Timing, interleaved, ratio, time_call
from refine_control.metrics.distances import INCEPTION_WIDTH, Distance, OfDraws, cmmd, frechet_distance, kid
from refine_control.metrics.drawn_sets import cmmd_of_draws, frechet_of_draws, kid_of_draws
from refine_control.metrics.features import clip, inception
from refine_control.metrics.features.batches import in_full_precision, slices
from refine_control.metrics.image_pairs import Images
from refine_control.models.devices import best_device, device_name

_SEED = 7
_BATCH, _CLIP_BATCH = 32, 16  # as in `evaluate`

DISTANCES: Mapping[str, tuple[Distance, OfDraws]] = {
    "frechet": (frechet_distance, frechet_of_draws),
    "kid": (lambda reference, generated: kid(reference, generated).mean, kid_of_draws),
    "cmmd": (cmmd, cmmd_of_draws),
}


class FeatureBench(NamedTuple):
    """Results of one run on one machine; a ratio above 1 means faster than the bare network."""

    device: str
    threads: int
    size: int
    """Pixels of a side."""
    pictures: dict[str, int]
    """Number of images by network; for LPIPS of pairs."""
    of_bare: dict[str, Spread]
    """Images a second of the whole path over those of the bare network."""
    pictures_per_second: dict[str, float]
    bare_pictures_per_second: dict[str, float]
    seconds_per_picture: dict[str, float]
    """Inception, for a quarter of the images and for all, by their number: linear if these are equal."""
    distance_seconds: dict[str, dict[int, float]]
    """By distance and number of images on each side, D = 2048."""
    drawn_seconds: dict[str, dict[int, float]]
    """The same for one bootstrap sample, where all are computed together."""
    distance_growth: dict[str, float]
    """The exponent with which the time grows from the second number of images to the third: 1 is linear."""
    drawn_growth: dict[str, float]


class _Compared(NamedTuple):
    """A metric's path and its bare network, on the same images."""

    ours: Callable[[Images], Any]
    network: Callable[[torch.Tensor], Any]
    side: int
    """Pixels of the prepared tensors."""
    batch_size: int
    device: torch.device


def _random_pictures(count: int, size: int) -> Images:
    return np.random.default_rng(_SEED).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def _networks(size: int, with_clip: bool, device: torch.device) -> dict[str, _Compared]:
    """By name; LPIPS compares each image with itself."""
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        network = inception.placed(features.Inception(), device).eval()
        lpips = features.Lpips().to(device).eval()
        tower = clip.untrained() if with_clip else None
    compared = {
        "inception": _Compared(
            lambda images: features.inception_features(network, images, _BATCH),
            network.pool3,
            inception.SIDE,
            _BATCH,
            device,
        ),
        "lpips": _Compared(
            lambda images: features.lpips(lpips, images, images, _BATCH), lambda p: lpips(p, p), size, _BATCH, device
        ),
    }
    if tower is not None:
        torch.nn.Module.to(tower, device)  # in place; transformers' own `to` is annotated as taking no device
        compared["clip"] = _Compared(
            lambda images: features.clip_features(tower, images, _CLIP_BATCH),
            lambda pixels: tower(pixel_values=pixels).image_embeds,
            clip.LARGE_336["image_size"],
            _CLIP_BATCH,
            device,
        )
    return compared


def _timings(compared: _Compared, images: Images, repeats: int) -> dict[str, Timing]:
    """`ours` on all images, `quarter` on a quarter of them, and `bare`."""
    generator = torch.Generator().manual_seed(_SEED)
    prepared = torch.rand(len(images), 3, compared.side, compared.side, generator=generator) * 2 - 1
    on_cpu = compared.device.type == "cpu"
    prepared = prepared.to(compared.device, memory_format=torch.channels_last if on_cpu else torch.contiguous_format)

    @in_full_precision()
    def bare() -> None:
        for part in slices(len(prepared), compared.batch_size):
            compared.network(prepared[part])

    quarter = images[: _quarter(len(images))]
    calls = {"bare": bare, "ours": lambda: compared.ours(images), "quarter": lambda: compared.ours(quarter)}
    return interleaved(calls, repeats)


def _quarter(count: int) -> int:
    return max(1, count // 4)


def _distance_times(count: int, resamples: int) -> dict[str, tuple[float, float]]:
    """By distance: seconds of its value, and of one of `resamples` bootstrap samples; features are random."""
    random = np.random.default_rng(_SEED)
    left, right = (random.random((count, INCEPTION_WIDTH)) for _ in range(2))
    rows = random.integers(count, size=(resamples, count))
    return {
        name: (
            time_call(lambda once=distance: once(left, right), warmup=0, repeats=1).median,
            time_call(lambda all_of=of_draws: all_of(left, right, rows), warmup=0, repeats=1).median / resamples,
        )
        for name, (distance, of_draws) in DISTANCES.items()
    }


def _growth(seconds: Mapping[int, float]) -> float:
    before, last = sorted(seconds)[-2:]
    return math.log(seconds[last] / seconds[before]) / math.log(last / before)


def bench_features(
    pictures: int = 64,
    size: int = 256,
    repeats: int = 3,
    *,
    clip_pictures: int = 0,
    set_size: int = 500,
    resamples: int = 200,
) -> FeatureBench:
    """Measures the features of `pictures` random images of `size` pixels, and distances between `set_size`, twice and
    four times as many random features.

    `clip_pictures` 0 omits CLIP, which takes seconds an image on a CPU; `set_size` 0 omits the distances."""
    timings, numbers, device = {}, {}, best_device()
    for name, compared in _networks(size, clip_pictures > 0, device).items():
        numbers[name] = clip_pictures if name == "clip" else pictures
        timings[name] = _timings(compared, _random_pictures(numbers[name], size), repeats)
    times = {count: _distance_times(count, resamples) for count in (set_size, 2 * set_size, 4 * set_size) if set_size}
    seconds, drawn = (
        {name: {count: both[name][part] for count, both in times.items()} for name in DISTANCES if times}
        for part in (0, 1)
    )
    fid = timings["inception"]
    return FeatureBench(
        device=device_name(device),
        threads=torch.get_num_threads(),
        size=size,
        pictures=numbers,
        of_bare={name: ratio(t["bare"], t["ours"]).spread for name, t in timings.items()},
        pictures_per_second={name: numbers[name] / t["ours"].median for name, t in timings.items()},
        bare_pictures_per_second={name: numbers[name] / t["bare"].median for name, t in timings.items()},
        seconds_per_picture={
            str(_quarter(pictures)): fid["quarter"].median / _quarter(pictures),
            str(pictures): fid["ours"].median / pictures,
        },
        distance_seconds=seconds,
        drawn_seconds=drawn,
        distance_growth={name: _growth(values) for name, values in seconds.items()},
        drawn_growth={name: _growth(values) for name, values in drawn.items()},
    )
