"""The equations of few steps on values computed by hand, and the law that CoDi's two terms obey."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refine_control import consistency, flow

X, V, TARGET_V = torch.randn(3, 4, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
T = torch.tensor([1.0, 0.9, 0.5, 0.3], dtype=torch.float64)
S = torch.tensor([0.75, 0.5, 0.45, 0.0], dtype=torch.float64)


def one(value):
    return torch.full((1, 1, 1, 1), float(value))


def levels(*values):
    return torch.tensor(values)


def test_noise_consistency_by_hand():
    # eps_hat(x_t) = 2 + .25 * 4 = 3, eps_hat(x_s) = 1 + .5 * 1 = 1.5
    error = consistency.noise_consistency(one(2), one(4), levels(0.75), one(1), one(1), levels(0.5))
    assert error.item() == pytest.approx(2.25)


def test_after_the_model_s_own_step_both_terms_of_codi_are_one_difference_of_velocities():
    x_s = flow.euler_step(X, V, T, S)
    s = flow.expand(S, X)
    noises = flow.pure_noise(x_s, TARGET_V, S) - flow.pure_noise(X, V, T)
    torch.testing.assert_close(noises, (1 - s) * (TARGET_V - V))
    cleans = flow.clean_latents(x_s, TARGET_V, S) - flow.clean_latents(X, V, T)
    torch.testing.assert_close(cleans, s * (V - TARGET_V))
    squares = consistency.noise_consistency(X, V, T, x_s, TARGET_V, S)
    torch.testing.assert_close(squares, ((1 - s) * (TARGET_V - V)) ** 2)


def test_codi_s_noise_consistency_teaches_nothing_at_pure_noise_and_its_data_term_does():
    v = V.clone().requires_grad_()
    x_s = flow.euler_step(X, V, T, S)
    consistency.noise_consistency(X, v, T, x_s, TARGET_V, S).sum().backward()
    assert v.grad is not None
    assert not v.grad[0].any()
    t, s = (flow.expand(each, X) for each in (T, S))
    torch.testing.assert_close(v.grad, 2 * (1 - t) * (1 - s) * (V - TARGET_V))
    v.grad = None
    (flow.clean_latents(X, v, T) - TARGET_V).square().sum().backward()
    assert v.grad[0].abs().min() > 0


def test_the_weight_of_codi_gives_velocities_the_gradient_of_its_noise_consistency():
    gradients = []
    for term in (
        lambda v: consistency.noise_consistency(X, v, T, flow.euler_step(X, V, T, S), TARGET_V, S),
        lambda v: consistency.velocity_consistency(v, TARGET_V, consistency.consistency_weight(T, S)),
    ):
        v = V.clone().requires_grad_()
        term(v).sum().backward()
        gradients.append(v.grad)
    torch.testing.assert_close(*gradients)
    assert consistency.consistency_weight(levels(0.5, 1.0), levels(0.25, 0.5)).tolist() == [0.375, 0.0]


def test_velocity_consistency_by_hand():
    assert consistency.velocity_consistency(one(3), one(1)).item() == 4
    assert consistency.velocity_consistency(one(3), one(1), 0.5).item() == 2
    weighed = consistency.velocity_consistency(V, TARGET_V, T)
    torch.testing.assert_close(weighed[2], 0.5 * (V[2] - TARGET_V[2]) ** 2)


def test_one_euler_step_by_the_velocity_of_a_chord_lands_on_its_end():
    v = consistency.chord_velocity(X, TARGET_V, T, S)
    torch.testing.assert_close(flow.euler_step(X, v, T, S), TARGET_V)
    assert consistency.chord_velocity(one(3), one(1), levels(0.75), levels(0.25)).item() == 4
    # of a straight path, to its end point: the path's own velocity
    latents, noise = X, V
    noisy = flow.interpolate(latents, noise, T)
    torch.testing.assert_close(consistency.chord_velocity(noisy, latents, T, torch.zeros_like(T)), noise - latents)


def test_the_points_of_a_chord_are_those_that_its_velocity_passes():
    v = consistency.chord_velocity(X, TARGET_V, T, S)
    assert torch.equal(consistency.on_chord(X, TARGET_V, T, S, T), X)
    torch.testing.assert_close(consistency.on_chord(X, TARGET_V, T, S, S), TARGET_V)
    between = 0.3 * T + 0.7 * S
    at = consistency.on_chord(X, TARGET_V, T, S, between)
    torch.testing.assert_close(at, 0.3 * X + 0.7 * TARGET_V)
    torch.testing.assert_close(at, flow.euler_step(X, v, T, between))


@pytest.mark.parametrize(
    ("phases", "level", "end"),
    [(4, 1.0, 0.75), (4, 0.76, 0.75), (4, 0.75, 0.5), (4, 0.25, 0.0), (4, 1e-7, 0.0), (1, 1.0, 0.0), (1, 0.3, 0.0)],
)
def test_the_end_of_a_phase_is_the_largest_multiple_below(phases, level, end):
    assert consistency.phase_end(levels(level), phases).item() == end


@given(st.integers(1, 64), st.floats(1e-6, 1))
def test_a_phase_ends_below_its_levels_and_is_no_longer_than_its_share(phases, level):
    end = consistency.phase_end(torch.tensor([level], dtype=torch.float64), phases).item()
    assert 0 <= end < level <= end + 1 / phases + 1e-9


def test_pseudo_huber_by_hand_and_the_square_without_its_constant():
    assert consistency.pseudo_huber(levels(3.0, -3.0, 0.0), 4.0).tolist() == [1.0, 1.0, 0.0]
    assert consistency.pseudo_huber(levels(3.0, -2.0), 0.0).tolist() == [9.0, 4.0]


def test_features_are_compared_by_their_direction():
    a = torch.tensor([[3.0, 4.0]]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    b = torch.tensor([[5.0, 0.0]]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    assert consistency.feature_distance(a, b).tolist() == pytest.approx([0.4**2 + 0.8**2])
    assert consistency.feature_distance(a, 7 * a).tolist() == pytest.approx([0.0], abs=1e-12)


def test_even_sigmas_and_guidance_by_hand():
    torch.testing.assert_close(flow.even_sigmas(4, 3.0), levels(1.0, 0.9, 0.75, 0.5, 0.0))
    assert flow.even_sigmas(1, 3.0).tolist() == [1.0, 0.0]
    torch.testing.assert_close(flow.even_sigmas(2), levels(1.0, 0.5, 0.0))
    assert flow.guided(one(3), one(1), 4.0).item() == 9
    assert flow.guided(one(3), one(1), 1.0).item() == 3
