"""The benchmark of the data pipeline runs, and its ratios are ratios."""

import resource

import pytest

from refine_control.bench.data import _numbers, bench_data, write_photos
from refine_control.metrics.cost import run_fresh
from refine_control.photos.build import build


@pytest.mark.slow
def test_every_figure_is_there():
    made = bench_data(None, photos=4, many=0, repeats=1, size=64)
    assert made.photos == 4
    for spread in (made.build_of_bare, made.cache_of_bare):
        assert 0 < spread.low <= spread.median <= spread.high
    assert made.batches_per_second > 0
    assert made.build_photos_per_second > 0
    assert made.peak_memory == {}


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
