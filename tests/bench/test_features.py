"""The benchmark of the metrics' networks runs, holds equal work against each other, and tells growth."""

import numpy as np
import pytest
import torch

from refine_control.bench import features as feature_bench
from refine_control.bench.features import bench_features


class Small(torch.nn.Module):
    """Stands in for a network."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 4, 3)

    def forward(self, pixels, *_):
        return self.convolution(pixels.float()).mean((2, 3))[:, 0]

    def pool3(self, maps):
        return self(maps)


@pytest.fixture
def small(monkeypatch):
    network = Small()
    seen = {"ours": [], "bare": []}

    def compared(size, with_clip, device):
        def ours(images):
            seen["ours"].append(len(images))
            return network(torch.from_numpy(images).permute(0, 3, 1, 2))

        def bare(pixels):
            seen["bare"].append((len(pixels), pixels.shape[-1], torch.is_grad_enabled()))
            return network(pixels)

        made = feature_bench._Compared(ours, bare, size, 3, torch.device("cpu"))
        return {"inception": made, "lpips": made} | ({"clip": made} if with_clip else {})

    monkeypatch.setattr(feature_bench, "_networks", compared)
    return seen


def test_every_figure_is_there(small, monkeypatch):
    monkeypatch.setattr(feature_bench, "INCEPTION_WIDTH", 32)
    made = bench_features(pictures=8, size=16, repeats=2, clip_pictures=4, set_size=10, resamples=3)
    assert made.pictures == {"inception": 8, "lpips": 8, "clip": 4}
    for spread in made.of_bare.values():
        assert 0 < spread.low <= spread.median <= spread.high
    for rates in (made.pictures_per_second, made.bare_pictures_per_second):
        assert rates.keys() == made.pictures.keys()
        assert min(rates.values()) > 0
    assert list(made.seconds_per_picture) == ["2", "8"]
    for seconds, growth in ((made.distance_seconds, made.distance_growth), (made.drawn_seconds, made.drawn_growth)):
        assert seconds.keys() == growth.keys() == feature_bench.DISTANCES.keys()
        assert all(list(values) == [10, 20, 40] and min(values.values()) > 0 for values in seconds.values())
        assert np.isfinite(list(growth.values())).all()


def test_the_bare_network_sees_as_many_pictures_in_the_same_batches(small):
    bench_features(pictures=8, size=16, repeats=1, set_size=0)
    rounds = 2 * 2  # one to warm up; two networks
    assert small["ours"] == [8, 2] * rounds
    assert small["bare"] == [(3, 16, False), (3, 16, False), (2, 16, False)] * rounds


def test_without_sets_there_are_no_distances(small):
    made = bench_features(pictures=1, size=16, repeats=1, set_size=0)
    assert (made.distance_seconds, made.drawn_seconds, made.distance_growth, made.drawn_growth) == ({}, {}, {}, {})
    assert "clip" not in made.of_bare


def test_growth_is_the_power():
    assert feature_bench._growth({10: 100.0, 20: 3.0, 40: 12.0}) == pytest.approx(2)
    assert feature_bench._growth({500: 9.0, 1000: 2.0, 2000: 4.0}) == pytest.approx(1)


@pytest.mark.slow
def test_the_paths_are_those_of_evaluate_and_their_networks_take_prepared_tensors():
    for name, compared in feature_bench._networks(64, with_clip=False, device=torch.device("cpu")).items():
        images = feature_bench._random_pictures(2, 64)
        found = compared.ours(images)
        with torch.no_grad():
            bare = compared.network(torch.zeros(2, 3, compared.side, compared.side))
        assert found.shape == tuple(bare.shape), name
