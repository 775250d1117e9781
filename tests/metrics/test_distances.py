"""Distances of sets against closed forms, plain double loops and torch-fidelity; the laws of their intervals."""

from functools import partial

import golden_make as make
import numpy as np
import pytest

from refine_control.errors import InvalidInputError
from refine_control.metrics import distances, drawn_sets, kernels
from refine_control.metrics.distances import (
    SetScore,
    bias_note,
    cmmd,
    drawn_distance,
    frechet_distance,
    gaussian_mmd,
    kid,
    set_difference,
    set_interval,
)
from refine_control.metrics.drawn_sets import cmmd_of_draws, frechet_of_draws, gaussian_mmd_of_draws, kid_of_draws

GOLDEN = make.answers()


def normal(seed, count=200, width=6, mean=0.0, spread=1.0):
    return np.random.default_rng(seed).normal(mean, spread, (count, width))


def unit(seed, count=80, width=24, mean=0.3):
    features = normal(seed, count, width) + mean * np.random.default_rng(seed + 1000).normal(size=width)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def kid_value(reference, generated):
    return kid(reference, generated).mean


def with_moments(seed, count, mean, covariance):
    """Features whose sample mean and covariance are these, exactly."""
    raw = normal(seed, count, len(mean))
    raw -= raw.mean(0)
    whitened = raw @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(raw, rowvar=False)))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


@pytest.mark.parametrize("distance", [frechet_distance, cmmd])
@pytest.mark.parametrize("count", [4, 300])
def test_equal_sets_in_any_order_are_at_zero(distance, count):
    features = normal(1, count, width=16)
    shuffled = np.random.default_rng(0).permutation(features)
    assert distance(features, features) == pytest.approx(0, abs=1e-11)
    assert distance(features, shuffled) == pytest.approx(0, abs=1e-11)
    assert distance(features, features + 0.1) > 1e-3


@pytest.mark.parametrize("distance", [frechet_distance, cmmd, kid_value])
def test_the_order_of_pictures_and_the_side_do_not_count(distance):
    left, right = normal(1), normal(2, 150, mean=0.3)
    assert distance(left, right) > 0
    assert distance(right, left) == pytest.approx(distance(left, right), rel=1e-9)
    random = np.random.default_rng(0)
    assert distance(random.permutation(left), random.permutation(right)) == pytest.approx(
        distance(left, right), rel=1e-9
    )


def test_frechet_of_one_feature_is_the_closed_form():
    left = with_moments(1, 50, np.array([2.0]), np.array([[9.0]]))
    right = with_moments(2, 70, np.array([-1.0]), np.array([[4.0]]))
    assert frechet_distance(left, right) == pytest.approx((2 + 1) ** 2 + (3 - 2) ** 2)


def test_frechet_of_covariances_that_commute_is_the_closed_form():
    turn = np.linalg.qr(normal(3, 5, 5))[0]
    first, second = np.array([4.0, 1, 9, 0.25, 2]), np.array([1.0, 1, 16, 4, 3])
    left = with_moments(1, 60, np.zeros(5), turn * first @ turn.T)
    right = with_moments(2, 60, np.arange(5.0), turn * second @ turn.T)
    assert frechet_distance(left, right) == pytest.approx(30 + np.square(np.sqrt(first) - np.sqrt(second)).sum())


def test_frechet_of_covariances_that_do_not_commute_is_the_trace_of_the_root():
    """Two by two: tr (C1 C2)^(1/2) = sqrt(tr C1 C2 + 2 sqrt(det C1 C2))."""
    one, two = np.array([[2.0, 0.8], [0.8, 1.0]]), np.array([[1.0, -0.6], [-0.6, 3.0]])
    product = one @ two
    assert np.abs(product - product.T).max() > 0.5
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    left, right = with_moments(1, 40, np.zeros(2), one), with_moments(2, 40, np.zeros(2), two)
    assert frechet_distance(left, right) == pytest.approx(3 + 4 - 2 * root)


def test_frechet_and_kid_equal_torch_fidelity():
    left, right = make.fixed_features(5), make.fixed_features(6)
    assert frechet_distance(left, right) == pytest.approx(float(GOLDEN["frechet"]), rel=1e-9)
    assert kid(left, right).mean == pytest.approx(float(GOLDEN["kid"]), rel=1e-9)
    assert abs(float(GOLDEN["frechet"])) > 1
    assert abs(float(GOLDEN["kid"])) > 1


def test_frechet_of_fewer_pictures_than_features_keeps_its_digits():
    """Turned into 40 dimensions, sets that fill only 3 of them are as far apart as they were."""
    turn = np.linalg.qr(normal(3, 40, 40))[0][:3]
    left, right = normal(1, 9, 3), normal(2, 12, 3, mean=0.5)
    assert frechet_distance(left @ turn, right @ turn) == pytest.approx(frechet_distance(left, right), rel=1e-10)


def test_frechet_of_many_pictures_is_taken_in_chunks(monkeypatch):
    left, right = normal(1), normal(2, mean=0.2)
    whole = frechet_distance(left, right)
    monkeypatch.setattr(distances, "_QR_ROWS", 7)
    assert frechet_distance(left, right) == pytest.approx(whole, rel=1e-10)


def test_frechet_with_few_pictures_is_biased_upward_as_the_note_says():
    def mean_of(count):
        pairs = [(normal(2 * s, count, 32), normal(2 * s + 1, count, 32)) for s in range(10)]
        return np.mean([frechet_distance(a, b) for a, b in pairs])

    assert mean_of(40) > 4 * mean_of(400) > 0
    assert "500 pictures" in bias_note(500)
    assert "biased upward by much" in bias_note(2047)
    assert "1/N" in bias_note(2048)


def test_float32_features_are_summed_in_float64():
    left, right = (normal(s, 100, 8, mean=100.0).astype(np.float32) for s in (1, 2))
    for distance in (frechet_distance, cmmd, kid_value):
        assert distance(left, right) == distance(left.astype(np.float64), right.astype(np.float64))


def test_mmd_is_the_double_loop():
    left, right = normal(1, 11, 4), normal(2, 7, 4, mean=0.5)

    def mean(a, b):
        return np.mean([np.exp(-np.sum((x - y) ** 2) / (2 * 1.5**2)) for x in a for y in b])

    expected = mean(left, left) + mean(right, right) - 2 * mean(left, right)
    assert gaussian_mmd(left, right, 1.5) == pytest.approx(expected, rel=1e-10)
    assert expected > 0.01


def test_cmmd_of_unit_features_is_nearly_ten_times_the_squared_difference_of_means():
    """For |x| = |y| = 1 the kernel is e^-0.01 exp(x . y / 100), whose series gives the moments' differences."""
    for seed in range(5):
        left, right = unit(seed), unit(seed + 50)
        means = np.square(left.mean(0) - right.mean(0)).sum()
        moments = np.square(left.T @ left / len(left) - right.T @ right / len(right)).sum()
        law = np.exp(-0.01) * 10 * means
        assert law > 0.1
        assert law < cmmd(left, right) < law + 0.1
        assert cmmd(left, right) == pytest.approx(law + np.exp(-0.01) * 0.05 * moments, rel=1e-4)
    opposite = cmmd(np.eye(2)[:1], -np.eye(2)[:1])  # means 2 apart: the farthest that there is
    assert opposite == pytest.approx(2000 * (1 - np.exp(-4 / 200)))
    assert opposite == pytest.approx(10 * 2**2, rel=0.02)


def test_cmmd_tells_sets_apart_that_float32_means_of_kernels_do_not():
    left = unit(1, 400)
    right = left.copy()
    right[0] = -right[0]  # one picture of 400
    law = 10 * np.square(left.mean(0) - right.mean(0)).sum()
    assert cmmd(left, right) == pytest.approx(law, rel=0.02)
    assert law < 1000 * np.finfo(np.float32).eps * 3


@pytest.mark.parametrize("distance", [cmmd, kid_value])
def test_kernels_are_summed_in_chunks(monkeypatch, distance):
    left, right = normal(1, 45), normal(2, 31, mean=0.2)
    whole = distance(left, right)
    monkeypatch.setattr(kernels, "_CHUNK_VALUES", 100)
    assert distance(left, right) == pytest.approx(whole, rel=1e-9)


def test_kid_is_unbiased_and_the_biased_estimator_is_not():
    values = np.array([kid_value(normal(2 * s, 20), normal(2 * s + 1, 20)) for s in range(400)])
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean()) < 3 * error
    assert (values < 0).mean() > 0.3
    assert np.mean([cmmd(normal(2 * s, 20), normal(2 * s + 1, 20)) for s in range(50)]) > 10 * error


def test_kid_in_blocks_is_the_mean_with_its_error():
    left, right = normal(1, 2000, 4), normal(2, 1500, 4)
    estimate = kid(left, right, block_size=100, seed=3)
    assert estimate.blocks == 15
    assert abs(estimate.mean) < 4 * estimate.standard_error
    whole = kid(left, right, block_size=1500)
    assert (whole.blocks, whole.standard_error) == (1, None)
    assert kid(left, right, 100, seed=3) == estimate != kid(left, right, 100, seed=4)
    apart = kid(left, right + 0.5, block_size=100)
    assert apart.mean > 10 * apart.standard_error
    assert apart.mean == pytest.approx(kid(left, right + 0.5, block_size=1500).mean, rel=0.2)


def test_the_interval_holds_the_spread_between_sets_of_pictures():
    """Against the truth: the same distance of 50 other sets."""
    pool = normal(5, 4000, 6)
    shifted = pool + normal(6, 4000, 6, mean=0.4, spread=0.5)
    truths = [frechet_distance(pool[i : i + 80], shifted[i : i + 80]) for i in range(0, 4000, 80)]
    interval = set_interval([drawn_distance(frechet_distance, pool[:80], shifted[:80], seed=1, resamples=300)], seed=1)
    width = np.quantile(truths, 0.975) - np.quantile(truths, 0.025)
    assert interval.mean == frechet_distance(pool[:80], shifted[:80])
    assert interval.low < interval.mean < interval.high
    assert interval.high - interval.low == pytest.approx(width, rel=0.4)


def test_models_are_drawn_together_so_that_what_they_share_drops_out():
    reference = normal(1, 120, 4)
    error = normal(2, 120, 4)
    models = {"far": reference + error + 0.5, "near": reference + error + 0.4, "same": reference + error + 0.4}
    found = {n: drawn_distance(frechet_distance, reference, m, seed=1, resamples=100) for n, m in models.items()}
    far, near = (set_interval([found[n]], seed=1) for n in ("far", "near"))
    difference = set_difference([found["far"]], [found["near"]], seed=1)
    assert difference.mean == pytest.approx(far.mean - near.mean)
    assert difference.excludes_zero
    assert difference.high - difference.low < 0.5 * (far.high - far.low)
    assert tuple(set_difference([found["near"]], [found["same"]], seed=1)) == (0, 0, 0)


def test_the_interval_over_seeds_holds_the_spread_between_them():
    draws = np.random.default_rng(0).normal(0, 0.01, (3, 400))
    scores = [SetScore(value, value + 1 + part) for value, part in zip((1.0, 2.0, 3.0), draws, strict=True)]
    interval = set_interval(scores, seed=1)
    assert interval.mean == 2
    assert interval.low == pytest.approx(1, abs=0.15)  # three draws of 1, 2 and 3 are all 1 in 1 of 27, above 2.5 %
    assert interval.high == pytest.approx(3, abs=0.15)
    alone = set_interval(scores[:1], seed=1)
    assert alone.high - alone.low < 0.1
    lifted = [SetScore(s.value + 0.5, s.drawn + 0.5) for s in scores]
    assert tuple(set_difference(lifted, scores, seed=1)) == pytest.approx((0.5, 0.5, 0.5))
    beside = set_difference(scores, scores[:1], seed=1)
    assert beside.mean == 1
    assert beside.high - beside.low > 0.8


def test_a_seed_gives_the_same_interval_whatever_else_is_measured():
    reference, other = normal(1, 50), normal(2, 50)
    alone = drawn_distance(cmmd, reference, other, 5, 20)
    again, apart = drawn_distance(cmmd, reference, other, 5, 20), drawn_distance(cmmd, reference, other, 6, 20)
    assert (alone.drawn == again.drawn).all()
    assert alone.value == apart.value
    assert (alone.drawn != apart.drawn).any()


OF_DRAWS = {
    "frechet": (frechet_distance, frechet_of_draws),
    "kid": (kid_value, kid_of_draws),
    "kid in blocks": (lambda a, b: kid(a, b, 16, 3).mean, partial(kid_of_draws, block_size=16, seed=3)),
    "cmmd": (cmmd, cmmd_of_draws),
    "mmd": (lambda a, b: gaussian_mmd(a, b, 1.5), partial(gaussian_mmd_of_draws, sigma=1.5)),
}


@pytest.mark.parametrize("name", OF_DRAWS)
@pytest.mark.parametrize(("count", "width"), [(2, 6), (53, 6), (40, 90)])
def test_drawn_sets_at_once_are_the_sets_one_by_one(monkeypatch, name, count, width):
    """With fewer pictures than features and with more; through kernels that are cut into chunks."""
    monkeypatch.setattr(kernels, "_CHUNK_VALUES", 300)
    distance, of_draws = OF_DRAWS[name]
    left = normal(1, count, width, mean=2.0)
    right = left + normal(2, count, width, mean=0.2, spread=0.5)
    alone = drawn_distance(distance, left, right, seed=4, resamples=12)
    at_once = drawn_distance(distance, left, right, 4, 12, of_draws)
    assert at_once.value == alone.value
    np.testing.assert_allclose(at_once.drawn, alone.drawn, rtol=1e-9, atol=1e-12)
    assert len(set(alone.drawn.round(9))) > (10 if count > 2 else 1)


def test_kid_of_more_draws_than_fit_in_memory_is_taken_one_by_one(monkeypatch):
    left, right = normal(1, 60), normal(2, 60)
    rows = np.random.default_rng(0).integers(60, size=(5, 60))
    at_once = kid_of_draws(left, right, rows, block_size=20)
    monkeypatch.setattr(drawn_sets, "_counts", lambda *_: pytest.fail("counted"))
    monkeypatch.setattr(drawn_sets, "_COUNT_VALUES", 2 * 3 * 5 * 60 - 1)
    np.testing.assert_allclose(kid_of_draws(left, right, rows, block_size=20), at_once, rtol=1e-9)


def test_a_drawn_picture_that_weighs_double_is_that_picture_twice():
    """The oracle of the weights: covariances by numpy, and the trace of the root by the eigenvalues of the product."""
    left, right = normal(1, 30, 4), normal(2, 30, 4, mean=0.4, spread=2.0)
    rows = np.random.default_rng(3).integers(30, size=(4, 30))
    expected = []
    for a, b in ((left[drawn], right[drawn]) for drawn in rows):
        one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = np.sqrt(np.linalg.eigvals(one @ two).real).sum()
        expected.append(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(one) + np.trace(two) - 2 * root)
    np.testing.assert_allclose(frechet_of_draws(left, right, rows), expected, rtol=1e-9)


def test_drawn_sets_take_each_kernel_once(monkeypatch):
    """However many sets are drawn."""
    asked = []
    plain = drawn_sets.gaussian_kernel(10.0)
    monkeypatch.setattr(drawn_sets, "gaussian_kernel", lambda _: lambda a, b: asked.append(len(a)) or plain(a, b))
    for draws in (2, 50):
        asked.clear()
        cmmd_of_draws(unit(1), unit(2), np.random.default_rng(0).integers(80, size=(draws, 80)))
        assert sum(asked) == 3 * 80


def test_draws_from_equal_sets_are_at_zero():
    rows = np.random.default_rng(0).integers(40, size=(6, 40))
    for width in (8, 90):
        features = unit(1, 40, width)
        np.testing.assert_allclose(frechet_of_draws(features, features, rows), 0, atol=1e-12)
        np.testing.assert_allclose(cmmd_of_draws(features, features, rows), 0, atol=1e-11)


BAD = normal(1, 5, 3)
BAD[2, 1] = np.nan


@pytest.mark.parametrize("distance", [frechet_distance, kid, cmmd])
@pytest.mark.parametrize(
    ("reference", "generated", "says"),
    [
        (normal(1, 5, 3), normal(1, 5, 4), "width 3 and generated ones 4"),
        (BAD, normal(1, 5, 3), "reference features: 1 of 15 numbers are not finite"),
        (normal(1, 5, 3), normal(1, 5, 3)[:, 0], "generated features have shape (5,)"),
        (normal(1, 5, 3), np.empty((0, 3)), "generated features: this distance needs at least"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(distance, reference, generated, says):
    with pytest.raises(InvalidInputError) as refusal:
        distance(reference, generated)
    assert says in str(refusal.value)


def test_what_the_distances_refuse_besides():
    one, some = normal(1, 1, 3), normal(2, 5, 3)
    for distance in (frechet_distance, kid):
        with pytest.raises(InvalidInputError, match="at least 2 pictures, not 1"):
            distance(some, one)
    assert cmmd(one, one) == 0
    with pytest.raises(InvalidInputError, match="block_size is 1"):
        kid(some, some, block_size=1)
    with pytest.raises(InvalidInputError, match="seed is -1"):
        kid(some, some, seed=-1)
    with pytest.raises(InvalidInputError, match="sigma is 0"):
        gaussian_mmd(some, some, 0)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"generated": normal(1, 4, 3)}, "4 pictures are compared with a reference of 5"),
        ({"resamples": 1}, "resamples is 1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_intervals_that_cannot_be_had_are_refused(changed, says):
    given = {"reference": normal(1, 5, 3), "generated": normal(2, 5, 3), "seed": 0, "resamples": 5, **changed}
    with pytest.raises(InvalidInputError) as refusal:
        drawn_distance(frechet_distance, **given)
    assert says in str(refusal.value)


def test_seeds_that_make_no_pairs_are_refused():
    one = SetScore(1.0, np.zeros(5))
    with pytest.raises(InvalidInputError, match="3 and 2 training seeds"):
        set_difference([one] * 3, [one] * 2, 0)
    with pytest.raises(InvalidInputError, match="scores of"):
        set_interval([], 0)
    with pytest.raises(InvalidInputError, match="scores of"):
        set_interval([one, SetScore(1.0, np.zeros(4))], 0)
    with pytest.raises(InvalidInputError, match=r"level is 1\.0"):
        set_interval([one], 0, level=1.0)
