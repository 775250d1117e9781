"""Which sample fills which slot: a pure function, one size in a step, no sample lost."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_control.randomness import derive_seed, permutation
from refine_control.training.order import Order

GROUPS = {(6, 10): range(7), (8, 8): range(7, 30), (10, 6): range(30, 31)}


def steps(order, count, seed=0, stage="s"):
    """(size, rows) of each step."""
    for step in range(count):
        turn = order.turn(seed, stage, step)
        yield turn.size, order.rows(seed, stage, turn, range(order.batch_size))


def test_one_size_is_a_new_order_of_all_samples_in_each_epoch():
    rows = np.concatenate([rows for _, rows in steps(Order({(8, 8): range(10)}, 4), 5)])
    wanted = [permutation(derive_seed(0, "s", "order", epoch), 10) for epoch in (0, 1)]
    assert rows.tolist() == np.concatenate(wanted).tolist()


@settings(max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 12), st.integers(1, 4))
def test_a_step_has_one_size_and_no_sample_is_lost(counts, batch_size, epochs):
    firsts = np.cumsum([0, *counts]).tolist()
    groups = {(n, n): range(a, b) for n, (a, b) in enumerate(pairwise(firsts))}
    total = sum(epochs * count // batch_size for count in counts)
    seen = Counter()
    for size, rows in steps(Order(groups, batch_size), total):
        assert all(row in groups[size] for row in rows)
        seen.update(rows.tolist())
    for rows in groups.values():
        for row in rows:
            assert epochs - -(-batch_size // len(rows)) <= seen[row] <= epochs
        if epochs * len(rows) % batch_size == 0:
            assert {seen[row] for row in rows} == {epochs}


def test_it_is_a_function_of_its_arguments_alone():
    whole = list(steps(Order(GROUPS, 4), 40))
    order = Order(GROUPS, 4)
    for step in (31, 2, 39, 0, 17, 31):  # in any sequence, and by parts of a batch
        turn = order.turn(0, "s", step)
        assert turn.size == whole[step][0]
        parts = [order.rows(0, "s", turn, slots) for slots in (range(1), range(1, 4))]
        assert np.concatenate(parts).tolist() == whole[step][1].tolist()
    for other in ({"seed": 1}, {"stage": "t"}):
        assert [rows.tolist() for _, rows in steps(order, 40, **other)] != [rows.tolist() for _, rows in whole]


def test_sizes_are_shuffled_among_the_steps():
    sizes = [size for size, _ in steps(Order({(1, 2): range(40), (2, 1): range(40, 80)}, 4), 20)]
    assert Counter(sizes) == {(1, 2): 10, (2, 1): 10}
    assert 4 < sum(a != b for a, b in pairwise(sizes)) < 19
    again = [size for size, _ in steps(Order({(1, 2): range(40), (2, 1): range(40, 80)}, 4), 40)]
    assert again[:20] == sizes != again[20:]


@pytest.mark.parametrize("step", [10**6, 10**6 + 1])
def test_a_late_step_needs_no_walk_through_the_earlier_ones(step):
    order = Order(GROUPS, 8)
    assert len(order.rows(0, "s", order.turn(0, "s", step), range(8))) == 8
