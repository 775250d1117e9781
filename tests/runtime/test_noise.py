"""Noise in numpy is torch's, for every size and seed."""

import numpy as np
import pytest
import torch

from refine_control import randomness
from refine_control.runtime.noise import slot_normals

CLOSE = 3e-6  # the widest difference between torch's own vectorised and plain functions


@pytest.mark.parametrize("size", [1, 2, 7, 15, 16, 17, 31, 32, 33, 250, 4096, 70_001])
def test_normals_are_those_of_torch(size):
    for seed in (0, 1, 2**32, 2**63 - 1):
        expected = randomness.slot_normals((size,), [0, 3], seed, "initial noise")
        drawn = slot_normals((size,), [0, 3], seed, "initial noise")
        assert drawn.dtype == np.float32
        np.testing.assert_allclose(drawn, expected.numpy(), rtol=0, atol=CLOSE)


def test_a_shape_is_filled_in_the_order_of_torch():
    expected = randomness.slot_normals((16, 3, 5), [2], 9, "fresh noise", 4)
    np.testing.assert_allclose(slot_normals((16, 3, 5), [2], 9, "fresh noise", 4), expected.numpy(), rtol=0, atol=CLOSE)


def test_the_generators_of_numpy_and_torch_are_left_alone():
    np.random.seed(3)
    torch.manual_seed(3)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    slot_normals((20,), [0], 1, "a")
    assert np.random.get_state()[1].tolist() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
