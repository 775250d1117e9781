"""The benchmark of the data pipeline runs, and its ratios are ratios."""

import pytest

from refine_control.training.data_bench import bench_data, write_photos


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
