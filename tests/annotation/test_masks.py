"""What is chosen obeys the rules, what is refused has a reason, and one integer gives the same holes again."""

import builtins
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_control.annotation import masks as m
from refine_control.annotation.masks import Selection, augment, box_of, clean, dilate, iou, select, solidity
from refine_control.annotation.offline_masks import SOURCE, propose_felzenszwalb
from refine_control.errors import InvalidInputError, MissingError
from refine_control.records import Proposal

H, W = 20, 30


def rectangle(y0, x0, y1, x1, size=(H, W)):
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def proposal(mask, predicted_iou=0.9, stability=0.9):
    return Proposal(mask, predicted_iou, stability, "test")


def fate(mask, **rules):
    """`chosen`, or why not, of a lone proposal."""
    fell = Counter()
    chosen = select([proposal(mask)], Selection(**rules), fell)
    assert len(chosen) + fell.total() == 1
    return "chosen" if chosen else next(iter(fell))


def best_iou(proposals, mask):
    """How well the best of the proposals covers a region that is known."""
    return max(iou(proposal.mask, mask) for proposal in proposals)


def masks_of(size=(H, W)):
    """Unions of up to four rectangles: whole, in pieces, with holes between them."""
    corner = st.tuples(*[st.integers(0, side - 1) for side in size], *[st.integers(1, side) for side in size])
    drawn = st.lists(corner, min_size=1, max_size=4)
    return drawn.map(lambda each: np.any([rectangle(y, x, y + h, x + w, size) for y, x, h, w in each], axis=0))


@settings(max_examples=60)
@given(
    drawn=st.lists(st.tuples(masks_of(), st.integers(1, 20), st.integers(1, 20)), max_size=8),
    low=st.floats(0, 0.3),
    high=st.floats(0.3, 1),
    per_photo=st.integers(1, 3),
    overlap=st.floats(0, 1),
)
def test_the_chosen_obey_every_rule_and_the_counts_add_up(drawn, low, high, per_photo, overlap):
    proposals = [proposal(mask, a / 20, b / 20) for mask, a, b in drawn]
    rules = Selection(min_area=low, max_area=high, per_photo=per_photo, max_overlap=overlap)
    fell = Counter()
    chosen = select(proposals, rules, fell)
    assert len(chosen) + fell.total() == len(proposals)
    assert len(chosen) <= per_photo
    for each in chosen:
        scores = each.scores
        assert low <= each.mask.mean() <= high
        assert scores["area_fraction"] == pytest.approx(each.mask.mean(), abs=1e-5)
        assert scores["connected"] >= rules.min_connected - 1e-5
        assert not all(line.any() for line in (each.mask[0], each.mask[-1], each.mask[:, 0], each.mask[:, -1]))
        assert all(0 <= value <= 1 for value in scores.values())
    ranks = [each.scores["predicted_iou"] * each.scores["stability_score"] for each in chosen]
    assert ranks == sorted(ranks, reverse=True)
    assert all(iou(a.mask, b.mask) <= overlap for i, a in enumerate(chosen) for b in chosen[:i])
    if len(chosen) < per_photo:  # nothing that would do was left out
        assert m.SPARE not in fell


def test_the_best_is_taken_and_one_much_like_it_is_not():
    best, twin, other = rectangle(2, 2, 10, 10), rectangle(2, 2, 10, 11), rectangle(10, 15, 18, 25)
    fell = Counter()
    chosen = select([proposal(twin, 0.8), proposal(other, 0.7), proposal(best, 0.9)], Selection(), fell)
    assert [each.mask.tolist() for each in chosen] == [best.tolist(), other.tolist()]
    assert fell == {"overlaps": 1}
    assert [each.source for each in chosen] == ["test", "test"]
    one = select([proposal(best), proposal(other)], Selection(per_photo=1), fell := Counter())
    assert np.array_equal(one[0].mask, best)  # equal scores: as proposed
    assert fell == {"spare": 1}


def test_every_refusal_has_its_reason():
    assert fate(rectangle(2, 2, 10, 10)) == "chosen"
    assert fate(rectangle(2, 2, 5, 5)) == "too_small"
    assert fate(rectangle(0, 0, 0, 0), min_area=0.0) == "too_small"
    assert fate(rectangle(1, 1, 19, 25)) == "too_large"
    assert fate(rectangle(2, 2, 10, 10) | rectangle(12, 2, 18, 10)) == "scattered"
    cross = rectangle(9, 0, 11, W) | rectangle(0, 14, H, 16)
    assert fate(cross) == "all_borders"
    assert fate(cross, max_borders=4) == "chosen"
    assert fate(rectangle(0, 5, 5, 20), max_borders=0) == "all_borders"


def test_a_region_is_cleaned_before_it_is_judged():
    speckled = rectangle(2, 2, 14, 18)
    speckled[5, 5], speckled[18, 25] = False, True
    chosen = select([proposal(speckled)], Selection())
    assert np.array_equal(chosen[0].mask, rectangle(2, 2, 14, 18))
    assert chosen[0].scores == {
        "predicted_iou": 0.9,
        "stability_score": 0.9,
        "area_fraction": 0.32,
        "border_fraction": 0.0,
        "connected": 1.0,
        "solidity": 1.0,
    }
    assert np.array_equal(select([proposal(speckled)], Selection(cleaned=0.0))[0].mask, speckled)


def test_an_empty_range_of_areas_is_refused():
    with pytest.raises(InvalidInputError, match=r"min_area 0\.5 is above max_area 0\.4"):
        Selection(min_area=0.5)


@given(mask=masks_of(), share=st.floats(0, 0.6))
def test_cleaning_changes_only_what_is_small_and_cleaning_again_does_nothing_to_one_whole_part(mask, share):
    cleaned, area = clean(mask, share), np.count_nonzero(mask)
    parts, number = m.ndimage.label(mask)
    for part in range(1, number + 1):
        piece = parts == part
        gone = not cleaned[piece].any()
        assert gone or cleaned[piece].all()
        assert not gone or np.count_nonzero(piece) <= share * area
    ground, number = m.ndimage.label(~mask)
    filled = cleaned & ~mask
    assert np.count_nonzero(filled) <= sum(size for size in np.bincount(ground.ravel())[1:] if size <= share * area)
    assert not filled[[0, -1]].any()
    assert not filled[:, [0, -1]].any()
    assert cleaned.any()
    assert np.array_equal(clean(mask, 0.0), mask)


@settings(max_examples=30)
@given(mask=masks_of(), pixels=st.integers(0, 6))
def test_growing_is_by_distance(mask, pixels):
    y, x = np.mgrid[:H, :W]
    own = np.argwhere(mask)
    near = ((own[:, :1, None] - y) ** 2 + (own[:, 1:, None] - x) ** 2).min(0) <= pixels**2
    assert np.array_equal(dilate(mask, pixels), near)
    assert not dilate(np.zeros((4, 4), bool), 3).any()


@settings(max_examples=40)
@given(mask=masks_of(), shape=st.sampled_from(["box", "brush"]), seed=st.integers(0, 2**40), key=st.text(max_size=9))
def test_a_cover_covers_and_is_a_function_of_seed_and_key(mask, shape, seed, key):
    covered = augment(mask, shape, seed, key)
    assert covered.shape == mask.shape
    assert covered[mask].all()
    assert np.array_equal(covered, augment(mask, shape, seed, key))
    assert np.array_equal(augment(mask, "none", seed, key), mask)
    y0, x0, y1, x1 = box_of(mask)
    if shape == "box":
        assert covered.sum() == np.prod(np.subtract(box_of(covered)[2:], box_of(covered)[:2]))
        reach_y, reach_x = (y1 - y0) * m.MAX_MARGIN + 1, (x1 - x0) * m.MAX_MARGIN + 1
    else:
        reach_y = reach_x = max(1, m.BRUSH[1] * mask.sum() ** 0.5) + 1
    y2, x2, y3, x3 = box_of(covered)
    assert max(y0 - y2, y3 - y1) <= reach_y
    assert max(x0 - x2, x3 - x1) <= reach_x


def test_covers_hide_the_outline_and_differ_by_key():
    y, x = np.mgrid[:120, :160]
    notched = ((y - 60) ** 2 + (x - 80) ** 2 < 40**2) & ~((abs(x - 80) < 6) & (y < 60))
    for shape in ("box", "brush"):
        covers = [augment(notched, shape, 7, key) for key in "abcdef"]
        assert len({cover.tobytes() for cover in covers}) == 6
        assert all(cover[40, 80] for cover in covers), shape  # the notch is painted over
        assert all(0.2 < iou(cover, notched) < 0.95 for cover in covers)
        assert not np.array_equal(covers[0], augment(notched, shape, 8, "a"))
    assert not augment(np.zeros((5, 5), bool), "brush", 0, "a").any()


@given(masks_of(), masks_of())
def test_the_overlap_of_two_masks(a, b):
    assert iou(a, b) == iou(b, a)
    assert iou(a, a) == 1
    assert (iou(a, b) > 0) == bool((a & b).any())


def test_solidity_is_one_for_boxes_and_half_for_a_stair():
    assert solidity(rectangle(3, 4, 9, 20)) == pytest.approx(1)
    assert solidity(rectangle(3, 4, 4, 5)) == pytest.approx(1)
    y, x = np.mgrid[:H, :H]
    hollow = (y < 2) | (x < 2)  # an L: its hull is a square less a triangle
    assert solidity(hollow) == pytest.approx(76 / (400 - 18 * 18 / 2))
    assert m.border_fraction(rectangle(0, 0, H, 1)) == pytest.approx(H / (2 * (H + W) - 4))


# The fallback without weights.


def scene(height=90, width=130):
    """A red disc of two shades and a blue box on grey noise: what is one thing is known."""
    y, x = np.mgrid[:height, :width]
    disc, box = (y - 45) ** 2 + (x - 40) ** 2 < 24**2, (abs(y - 50) < 22) & (abs(x - 98) < 20)
    image = np.full((height, width, 3), 120) + np.random.default_rng(0).integers(-12, 13, (height, width, 3))
    image[disc] += np.array([90, -60, -60])
    image[disc & (x > 40)] += np.array([30, 20, 20])
    image[box] += np.array([-70, -20, 90])
    return image.clip(0, 255).astype(np.uint8), disc, box


def test_whole_things_are_found_and_chosen():
    image, disc, box = scene()
    proposals = propose_felzenszwalb(image)
    assert best_iou(proposals, disc) > 0.9
    assert best_iou(proposals, box) > 0.9
    chosen = select(proposals, Selection())
    things = {"disc": disc, "box": box}
    assert {max(things, key=lambda name: iou(each.mask, things[name])) for each in chosen} == {"disc", "box"}
    assert all(max(iou(each.mask, disc), iou(each.mask, box)) > 0.8 for each in chosen)
    assert len(chosen) == 2
    assert chosen[0].source == SOURCE
    assert "no weights" in SOURCE


def test_proposals_are_the_same_again_of_the_photos_size_and_no_doubles():
    image = np.kron(scene()[0], np.ones((2, 2, 1), np.uint8))[:, :-1]  # larger than the small copy
    first, second = propose_felzenszwalb(image, 20), propose_felzenszwalb(image, 20)
    assert 2 < len(first) <= 20
    for a, b in zip(first, second, strict=True):
        assert a.mask.shape == image.shape[:2]
        assert np.array_equal(a.mask, b.mask)
        assert (a[1:], 0 < a.predicted_iou <= 1, 0 < a.stability_score <= 1) == (b[1:], True, True)
    ranks = [each.predicted_iou * each.stability_score for each in first]
    assert ranks == sorted(ranks, reverse=True)
    assert all(iou(a.mask, b.mask) < 0.9 for i, a in enumerate(first) for b in first[:i])


@pytest.mark.parametrize("size", [(1, 1), (2, 900), (40, 3), (64, 64)])
def test_photos_with_nothing_in_them_propose_nothing_and_break_nothing(size):
    assert propose_felzenszwalb(np.full((*size, 3), 99, np.uint8)) == []


def test_without_scikit_image_a_sentence_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("skimage"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingError, match="pip install 'refine-control"):
        propose_felzenszwalb(scene()[0])
