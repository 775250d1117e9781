"""Bootstrap intervals: coverage by simulation, pairing, crossed seeds and scenes, the share of a gap."""

import numpy as np
import pytest

from refine_control.errors import InvalidInputError
from refine_control.metrics import statistics
from refine_control.metrics.statistics import Interval, gap_closed, mean_ratio, paired_difference, two_level


def bootstrap_mean(values, *arguments, **options) -> Interval:
    """Of one training seed."""
    return two_level(np.asarray(values)[None], *arguments, **options)


def test_an_interval_prints_as_in_the_tables():
    interval = Interval(19.2546, 19.1, 19.409)
    assert str(interval) == f"{interval}" == "19.25 [19.10, 19.41]"
    assert f"{interval:.4f}" == "19.2546 [19.1000, 19.4090]"
    assert f"{interval:+.1f}" == "+19.3 [+19.1, +19.4]"


@pytest.mark.parametrize(
    ("low", "high", "excludes"), [(0.1, 0.3, True), (-0.3, -0.1, True), (-0.1, 0.3, False), (0.0, 0.3, False)]
)
def test_excludes_zero(low, high, excludes):
    assert Interval(0.1, low, high).excludes_zero is excludes


def test_the_bootstrap_agrees_with_the_normal_interval_of_a_large_sample():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=2000)
    interval = bootstrap_mean(values, seed=0)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert interval.mean == pytest.approx(values.mean(), abs=1e-12)
    np.testing.assert_allclose(interval[1:], [values.mean() - half, values.mean() + half], atol=0.04 * half)


def test_coverage_is_near_the_level():
    random = np.random.default_rng(0)
    trials = 400
    covered = dict.fromkeys((0.95, 0.8), 0)
    for trial in range(trials):
        values = random.exponential(1.0, size=60)  # skewed, mean 1
        for level in covered:
            _, low, high = bootstrap_mean(values, seed=trial, resamples=400, level=level)
            covered[level] += low <= 1.0 <= high
    # 400 trials: standard error 1.1 and 2 points; the percentile interval of 60 skewed values covers a little less
    assert 0.90 <= covered[0.95] / trials <= 0.975
    assert 0.73 <= covered[0.8] / trials <= 0.85


def test_a_pair_is_narrower_than_two_when_scenes_are_shared():
    random = np.random.default_rng(1)
    scene = random.normal(0, 3, size=200)
    a, b = scene + 0.2 + random.normal(0, 0.2, 200), scene + random.normal(0, 0.2, 200)
    paired = paired_difference(a, b, seed=0)
    width_a, width_b = (high - low for _, low, high in (bootstrap_mean(a, seed=0), bootstrap_mean(b, seed=1)))
    assert paired.high - paired.low < np.hypot(width_a, width_b) / 5
    assert paired.mean == pytest.approx(a.mean() - b.mean())
    assert paired.excludes_zero
    flipped = paired_difference(b, a, seed=0)
    np.testing.assert_allclose(flipped, [-paired.mean, -paired.high, -paired.low], atol=1e-12)


def test_no_difference_is_exactly_zero():
    values = np.random.default_rng(0).normal(size=50)
    assert paired_difference(values, values, seed=0) == (0.0, 0.0, 0.0)
    shifted = paired_difference(values + 0.5, values, seed=0)
    np.testing.assert_allclose(shifted, 0.5)


def test_two_levels_add_the_spread_of_seeds_and_of_shared_scenes():
    random = np.random.default_rng(5)
    seeds, scenes = 12, 150
    seed_effect, scene_effect = random.normal(0, 0.5, (seeds, 1)), random.normal(0, 2.0, (1, scenes))
    values = 20 + seed_effect + scene_effect
    interval = two_level(values, seed=0)
    predicted = 1.96 * np.sqrt(seed_effect.std() ** 2 / seeds + scene_effect.std() ** 2 / scenes)
    assert (interval.high - interval.low) / 2 == pytest.approx(predicted, rel=0.06)
    # drawing scenes anew for each seed would treat them as 12 x 150 scenes; pooling forgets the seeds' spread
    assert interval.high - interval.low > 1.5 * (lambda i: i.high - i.low)(bootstrap_mean(values.ravel(), seed=0))


def test_a_method_without_seeds_counts_for_each_seed_of_the_other():
    random = np.random.default_rng(6)
    teacher, student = random.normal(20, 1, 40), random.normal(19, 1, (3, 40))
    assert paired_difference(student, teacher, seed=1) == two_level(student - teacher, seed=1)
    assert paired_difference(student, np.tile(teacher, (3, 1)), seed=1) == two_level(student - teacher, seed=1)


def test_gap_closed_at_its_ends_and_between():
    random = np.random.default_rng(7)
    baseline = random.normal(17, 1, 100)
    teacher = baseline + random.normal(2, 0.3, 100)
    np.testing.assert_allclose(gap_closed(teacher, baseline, teacher, seed=0), 1.0)
    np.testing.assert_allclose(gap_closed(teacher, baseline, baseline, seed=0), 0.0)
    middle = baseline + 0.765 * (teacher - baseline)
    np.testing.assert_allclose(gap_closed(teacher, baseline, middle, seed=0), 0.765)
    np.testing.assert_allclose(gap_closed(-teacher, -baseline, -middle, seed=0), 0.765)  # lower is better
    noisy = gap_closed(teacher, baseline, middle + random.normal(0, 0.5, 100), seed=0)
    assert noisy.low < 0.765 < noisy.high < noisy.low + 0.2


def test_gap_closed_has_the_intervals_of_the_delta_method():
    random = np.random.default_rng(8)
    gap, gain = random.normal(2, 0.5, 4000), random.normal(1.5, 0.6, 4000)
    share = gain.mean() / gap.mean()
    half = 1.96 * (gain - share * gap).std() / gap.mean() / np.sqrt(4000)
    interval = gap_closed(gap, np.zeros(4000), gain, seed=0, resamples=4000)
    assert interval.mean == pytest.approx(share)
    np.testing.assert_allclose(interval[1:], [share - half, share + half], atol=0.08 * half)


def test_a_gap_that_may_be_zero_gives_a_share_without_bounds():
    random = np.random.default_rng(9)
    baseline = random.normal(size=50)
    teacher = baseline + random.normal(0, 1, 50) * 0.5
    assert not paired_difference(teacher, baseline, seed=0).excludes_zero
    interval = gap_closed(teacher, baseline, teacher, seed=0)
    assert interval == (1.0, -np.inf, np.inf)
    assert str(interval) == "1.00 [-inf, inf]"


def test_the_seed_decides_and_the_global_generator_does_not():
    values = np.random.default_rng(0).normal(size=30)
    np.random.seed(1)
    first = bootstrap_mean(values, seed=11, resamples=500)
    np.random.seed(2)
    assert bootstrap_mean(values, seed=11, resamples=500) == first
    assert bootstrap_mean(values, seed=12, resamples=500) != first


def test_chunks_draw_everything_that_was_asked(monkeypatch):
    monkeypatch.setattr(statistics, "_CHUNK_VALUES", 100)
    values = np.random.default_rng(0).normal(size=30)
    many = bootstrap_mean(values, seed=0, resamples=2003)
    monkeypatch.undo()
    whole = bootstrap_mean(values, seed=0, resamples=2003)
    np.testing.assert_allclose(many, whole, atol=0.05)
    assert many.low < many.mean < many.high


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: bootstrap_mean([1.0], 0), "at least two scenes"),
        (lambda: bootstrap_mean([], 0), "at least two scenes"),
        (lambda: bootstrap_mean([1.0, np.nan, np.inf], 0), "2 of 3 numbers are not finite"),
        (lambda: bootstrap_mean([1.0, 2.0], 0, resamples=0), "resamples is 0"),
        (lambda: bootstrap_mean([1.0, 2.0], 0, level=95), "level is 95"),
        (lambda: bootstrap_mean([1.0, 2.0], -1), "seed is -1"),
        (lambda: two_level([1.0, 2.0], 0), "give (S, N)"),
        (lambda: two_level(np.zeros((0, 3)), 0), "at least two scenes"),
        (lambda: paired_difference([1.0, 2.0], [1.0, 2.0, 3.0], 0), "a (2,), b (3,)"),
        (lambda: paired_difference([[[1.0, 2.0]]], [1.0, 2.0], 0), "give (N,) or (S, N)"),
        (lambda: paired_difference(np.zeros((2, 4)), np.zeros((3, 4)), 0), "same scenes and seeds"),
        (lambda: paired_difference(np.zeros((1, 4)), np.zeros((3, 4)), 0), "same scenes and seeds"),
        (lambda: gap_closed([1.0, 2.0], [1.0, 2.0], [1.0, 2.0], 0), "no gap to close"),
    ],
)
def test_bad_values_are_refused(call, says):
    with pytest.raises(InvalidInputError) as refusal:
        call()
    assert says in str(refusal.value)


def test_mean_ratio_is_of_means_and_resamples_both_sides_together():
    b = np.random.default_rng(0).uniform(1, 9, 200)
    exact = mean_ratio(0.7 * b, b, seed=0)
    np.testing.assert_allclose(exact, 0.7)
    noisy = 0.7 * b + np.random.default_rng(1).normal(0, 1, 200)
    ratio = mean_ratio(noisy, np.stack([b, b]), seed=0)
    np.testing.assert_allclose(ratio.mean, noisy.mean() / b.mean())
    assert ratio.low < ratio.mean < ratio.high < 0.75
    assert not mean_ratio(b, b - b.mean() + 1e-3, seed=0).bounded
