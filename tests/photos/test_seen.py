"""Laws of the compact set of keys: it is a set, and it is small."""

from hypothesis import given, settings
from hypothesis import strategies as st

from refine_control.photos.seen import Seen


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(codec=None, exclude_categories=()), max_size=3), max_size=200))
def test_it_is_a_set(keys):
    seen, plain = Seen(), set()
    for key in keys:
        assert (key in seen) == (key in plain)
        assert seen.add(key) == (key not in plain)
        plain.add(key)
        assert len(seen) == len(plain)


def test_it_grows_and_forgets_nothing():
    seen, count = Seen(), 20_000
    assert all(seen.add(f"a rather long key of a photograph {number}") for number in range(count))
    assert not any(seen.add(f"a rather long key of a photograph {number}") for number in range(count))
    assert len(seen) == count
    assert seen._places.itemsize * len(seen._places) <= 46 * count
