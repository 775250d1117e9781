"""The same integers give the same numbers, in any order, chunk and process."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from refine_control.randomness import derive_seed, permutation, slot_normals, slot_uniforms, uniforms

CODE = """
from refine_control.randomness import derive_seed, permutation, slot_normals, uniforms
print(derive_seed(7, "noise", 3), permutation(5, 6).tolist(), uniforms(3, [4], 1).tolist(), end=" ")
print(slot_normals((2,), [1], 0, "a").tolist())
"""


def test_another_process_draws_the_same_numbers():
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split(
        " ", 1
    )
    assert int(found[0]) == derive_seed(7, "noise", 3)
    here = f"{permutation(5, 6).tolist()} {uniforms(3, np.array([4]), 1).tolist()} "
    assert found[1].strip() == here + str(slot_normals((2,), [1], 0, "a").tolist())


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(0, 2**63 - 1), st.data())
def test_a_row_of_uniforms_depends_on_its_own_index_alone(indices, seed, data):
    whole = uniforms(seed, np.array(indices), 7)
    row = data.draw(st.integers(0, len(indices) - 1))
    alone = uniforms(seed, np.array([indices[row]]), 7)
    np.testing.assert_array_equal(whole[row], alone[0])
    np.testing.assert_array_equal(uniforms(seed, np.array(indices), 3), whole[:, :3])
    assert whole.dtype == np.float32
    assert ((whole >= 0) & (whole < 1)).all()


def test_uniforms_are_uniform_and_rows_and_columns_are_unrelated():
    drawn = uniforms(1, np.arange(4000), 8)
    assert kstest(drawn.ravel(), "uniform").pvalue > 1e-4
    cells = np.histogram2d(drawn[:-1, 0], drawn[1:, 0], bins=8, range=[[0, 1], [0, 1]])[0]
    assert chisquare(cells.ravel()).pvalue > 1e-4
    assert np.abs(np.corrcoef(drawn.T) - np.eye(8)).max() < 5 / np.sqrt(4000)
    assert not np.array_equal(drawn, uniforms(2, np.arange(4000), 8))


@given(st.integers(0, 2**62), st.integers(0, 50))
def test_a_permutation_is_a_permutation(seed, count):
    order = permutation(seed, count)
    assert sorted(order.tolist()) == list(range(count))
    np.testing.assert_array_equal(order, permutation(seed, count))


def test_slots_do_not_know_each_other():
    whole = slot_normals((3, 2), [0, 1, 2, 3], 5, "noise", 9)
    assert torch.equal(whole, torch.cat([slot_normals((3, 2), [s], 5, "noise", 9) for s in range(4)]))
    assert len({row.sum().item() for row in whole}) == 4
    assert torch.equal(whole.flip(0), slot_normals((3, 2), [3, 2, 1, 0], 5, "noise", 9))
    picks = slot_uniforms(range(6), 5, "drop", 9)
    assert torch.equal(picks[2:4], slot_uniforms([2, 3], 5, "drop", 9))
    assert len(set(picks.tolist())) == 6


@pytest.mark.parametrize("other", [(6, "noise", 9), (5, "sigmas", 9), (5, "noise", 10)])
def test_seed_purpose_and_step_each_matter(other):
    drawn = slot_normals((4,), [0], 5, "noise", 9)
    assert not torch.equal(drawn, slot_normals((4,), [0], *other))


def test_words_do_not_run_together():
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("ab", "c") != derive_seed("a", "bc")
    assert 0 <= derive_seed("x") < 2**63


def test_the_global_generators_are_left_alone():
    torch.manual_seed(0)
    before, kept = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 -- the generator that must not move
    slot_normals((8,), range(4), "a")
    slot_uniforms(range(4), "a")
    permutation(3, 10)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(kept, np.random.get_state()[1])  # noqa: NPY002
