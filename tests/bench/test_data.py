"""The benchmark of the data pipeline runs, and its ratios are ratios."""

import resource

import numpy as np
import pytest

from refine_control.bench.data import (
    _loader_reader,
    _numbers,
    _Samples,
    bench_data,
    read_epoch,
    repeat_cache,
    write_photos,
)
from refine_control.cache.building import write_cache
from refine_control.cache.reader import Cache
from refine_control.metrics.cost import run_fresh
from refine_control.miniature.scene_shards import scene_photos
from refine_control.photos.build import build
from refine_control.records import LABELED


@pytest.mark.slow
def test_every_figure_is_there():
    made = bench_data(None, photos=4, many=0, repeats=1, size=64)
    assert made.photos == 4
    for spread in (made.build_of_bare, made.cache_of_bare):
        assert 0 < spread.low <= spread.median <= spread.high
    assert made.batches_per_second > 0
    assert made.build_photos_per_second > 0
    assert made.batches_of_loader.median > 0
    assert made.peak_memory == {}
    assert made.cached is None


def test_a_cache_is_repeated_and_its_epoch_read(tiny_backbone, tmp_path):
    photos = list(scene_photos(0, 0, 12))
    write_cache(photos, tmp_path / "small", tiny_backbone, LABELED, source={})
    small = Cache(tmp_path / "small")
    large = repeat_cache(small, tmp_path / "large", 640)
    assert len(large) == len(large.keys) == 640
    for name in ("latents", "masks", "prompt_index"):
        assert np.array_equal(large.arrays[name][12:24], small.arrays[name])
        assert np.array_equal(large.arrays[name][-4:], small.arrays[name][:4])
    assert len(large.prompts) == len(small.prompts)
    epoch = read_epoch(large)
    assert (epoch.samples, epoch.batches) == (640, 20)
    assert epoch.memory_growth < 64 << 20
    one, other = _Samples(small)[3], _loader_reader(small)()
    assert [part.shape for part in other] == [(12, *part.shape) for part in one]


def test_photos_are_what_the_build_takes(tmp_path):
    write_photos(tmp_path / "photos", 3, 96)
    assert len(list((tmp_path / "photos").iterdir())) == 9


def test_the_memory_of_a_build_is_its_own(tmp_path):
    write_photos(tmp_path / "photos", 4, 64)
    ours = bytearray(b"x" * (200 << 20))  # a build starts as a child of this process
    seconds, peak = run_fresh(build, tmp_path / "photos", tmp_path / "out", size=64)
    assert seconds > 0
    assert 10 << 20 < peak < min(len(ours), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def test_what_is_compared():
    assert [_numbers(many) for many in (0, 1000, 4000, 50_000)] == [[], [1000], [1000, 4000], [1000, 8000, 50_000]]
