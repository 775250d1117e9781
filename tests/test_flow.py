"""The path from data to noise and back, against its own inverse and the installed scheduler."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from refine_control import flow
from refine_control.randomness import slot_normals

SIGMAS = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
LATENTS, NOISE = torch.randn(2, 4, 16, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NOISY = flow.interpolate(LATENTS, NOISE, SIGMAS)
TRUE = flow.velocity(LATENTS, NOISE)


def test_the_path_begins_at_the_data_and_ends_at_the_noise():
    assert torch.equal(NOISY[0], LATENTS[0])
    assert torch.equal(NOISY[3], NOISE[3])
    torch.testing.assert_close(NOISY[1], 0.8 * LATENTS[1] + 0.2 * NOISE[1])


def test_the_velocity_is_the_derivative_of_the_path():
    slope = (flow.interpolate(LATENTS, NOISE, SIGMAS + 1e-3) - NOISY) / 1e-3
    torch.testing.assert_close(slope, TRUE, rtol=1e-8, atol=1e-8)


def test_the_true_velocity_leads_back_to_both_ends():
    for end, expected in ((0.0, LATENTS), (1.0, NOISE)):
        torch.testing.assert_close(flow.euler_step(NOISY, TRUE, SIGMAS, torch.full_like(SIGMAS, end)), expected)


def test_one_euler_step_with_the_true_velocity_arrives():
    torch.testing.assert_close(flow.euler_step(NOISY, TRUE, SIGMAS, torch.zeros(4)), LATENTS)
    half = flow.euler_step(NOISY, TRUE, SIGMAS, SIGMAS / 2)
    torch.testing.assert_close(half, flow.interpolate(LATENTS, NOISE, SIGMAS / 2))


def test_an_euler_step_is_the_scheduler_step():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    sample, v = LATENTS.float(), NOISE.float()
    for k in range(5):
        ours = flow.euler_step(sample, v, scheduler.sigmas[k][None], scheduler.sigmas[k + 1][None])
        sample = scheduler.step(v, scheduler.timesteps[k], sample, return_dict=False)[0]
        torch.testing.assert_close(ours, sample, rtol=1e-6, atol=1e-6)


@given(st.floats(0.1, 20), st.floats(0, 1), st.floats(0, 1))
def test_the_shift_keeps_both_ends_and_the_order(shift, a, b):
    low, high = sorted((a, b))
    shifted = flow.shift_sigmas(torch.tensor([0.0, low, high, 1.0], dtype=torch.float64), shift)
    assert shifted[0] == 0
    assert shifted[3] == pytest.approx(1)
    assert bool((shifted.diff() >= -1e-12).all())
    assert not low < high - 1e-6 or shifted[1] < shifted[2]


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_the_shift_is_the_scheduler_s(shift):
    plain, shifted = (FlowMatchEulerDiscreteScheduler(shift=s).sigmas for s in (1.0, shift))
    torch.testing.assert_close(flow.shift_sigmas(plain, shift), shifted)


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.5, 2.0, 1.0), (-0.3, 0.7, 3.0)])
def test_logit_normal_quantiles(mean, std, shift):
    share = torch.tensor([0.05, 0.25, 0.5, 0.9], dtype=torch.float64)
    drawn = flow.logit_normal_sigmas(slot_normals((), range(4000), "quantiles"), mean, std, shift).double()
    expected = torch.sigmoid(mean + std * torch.from_numpy(norm.ppf(share)))
    expected = shift * expected / (1 + (shift - 1) * expected)
    assert bool(((drawn > 0) & (drawn < 1)).all())
    found = torch.stack([(drawn < e).double().mean() for e in expected])
    assert bool(((found - share).abs() < 4 * (share * (1 - share) / 4000).sqrt()).all())
