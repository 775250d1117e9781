"""Laws of regions as text: there and back is the same, worked examples of COCO's format, and nothing hostile passes."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from refine_control.errors import InvalidInputError
from refine_control.photos.regions import decode_rle, encode_rle, polygons_to_mask
from refine_control.records import Rejected
from refine_control.records import RejectReason as R


def runs(mask: np.ndarray) -> list[int]:
    """Uncompressed run lengths down the columns, the slow way."""
    counts, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def by_the_book(counts: list[int]) -> str:
    """Compression as the format's description tells it, sign by sign."""
    text = ""
    for place, count in enumerate(counts):
        left, more = count - (counts[place - 2] if place > 2 else 0), True
        while more:
            group, left = left & 31, left >> 5
            more = left != (-1 if group & 16 else 0)
            text += chr(48 + group + 32 * more)
    return text


masks = arrays.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


@given(masks)
def test_there_and_back_is_the_same(mask):
    segmentation = encode_rle(mask)
    assert segmentation["counts"] == by_the_book(runs(mask))
    assert np.array_equal(decode_rle(json.loads(json.dumps(segmentation))), mask)
    assert np.array_equal(decode_rle({"size": list(mask.shape), "counts": runs(mask)}), mask)
    assert np.array_equal(decode_rle({**segmentation, "counts": segmentation["counts"].encode()}), mask)


def test_worked_examples():
    mask = np.zeros((3, 4), bool)
    mask[1:, 1] = mask[:, 2] = True  # down the columns: 4 kept, 5 inpainted, 3 kept
    assert encode_rle(mask) == {"size": [3, 4], "counts": "453"}
    assert encode_rle(~mask) == {"size": [3, 4], "counts": "045O"}  # 0 4 5 3: the last as 3 - 4 = -1
    assert encode_rle(np.zeros((4, 5), bool))["counts"] == "d0"  # 20 is two groups: 16 alone would be a sign
    assert encode_rle(np.ones((4, 5), bool))["counts"] == "0d0"
    known = {"size": [9, 10], "counts": "61X13mN000`0"}  # of COCO's own reference
    assert runs(decode_rle(known)) == [6, 1, 40, 4, 5, 4, 5, 4, 21]
    assert encode_rle(decode_rle(known)) == known
    assert encode_rle(np.zeros((10_000, 10_000), bool))["counts"] == by_the_book([10**8])


def test_a_large_ragged_mask_survives():
    mask = np.random.default_rng(0).random((700, 900)) > np.linspace(0, 1, 900)
    segmentation = encode_rle(mask)
    assert segmentation["counts"] == by_the_book(runs(mask))
    assert np.array_equal(decode_rle(segmentation), mask)


def test_whole_numbers_written_as_floats_or_text_are_read():
    mask = np.zeros((3, 4), bool)
    mask[1:, 1] = mask[:, 2] = True
    for size, counts in (([3.0, "4"], [4.0, "5", "3.0"]), (["3", 4.0], "453")):
        assert np.array_equal(decode_rle({"size": size, "counts": counts}), mask)
    box = polygons_to_mask([["1", 0.0, "3.0", 0, 3, "2", 1, 2]], 3, 4)
    assert np.array_equal(np.argwhere(box), [[0, 1], [0, 2], [1, 1], [1, 2]])


@pytest.mark.parametrize(
    "segmentation",
    [
        {},
        {"size": [2, 2]},
        {"counts": "4"},
        {"size": [2], "counts": "4"},
        {"size": [2, 2.5], "counts": "4"},
        {"size": [2, "two"], "counts": "4"},
        {"size": [True, 4], "counts": "4"},
        {"size": [-2, -2], "counts": "4"},
        {"size": [0, 0], "counts": ""},
        {"size": [2, 2], "counts": ""},
        {"size": [2, 2], "counts": "5"},
        {"size": [2, 2], "counts": "3"},
        {"size": [2, 2], "counts": "6N"},
        {"size": [2, 2], "counts": "T"},
        {"size": [2, 2], "counts": "4P"},
        {"size": [2, 2], "counts": "4 "},
        {"size": [2, 2], "counts": "4p"},
        {"size": [2, 2], "counts": "４"},
        {"size": [2, 2], "counts": 4},
        {"size": [2, 2], "counts": [4.5]},
        {"size": [2, 2], "counts": [None, 4]},
        {"size": [2, 2], "counts": [True, 3]},
        {"size": [2, 2], "counts": [5, -1]},
        {"size": [2, 2], "counts": [2**70, 4]},
        {"size": [2, 2], "counts": []},
        {"size": [2, 2], "counts": "o" * 5000 + "0"},
        {"size": [2, 2], "counts": "ooooo?ooooo?ooooo?ooooo?"},
        {"size": [10**6, 10**6], "counts": [10**12]},
        {"size": [2**40, 2**40], "counts": "oooooooooooooo0"},
    ],
    ids=str,
)
def test_malformed_run_lengths_are_refused(segmentation):
    with pytest.raises(Rejected) as caught:
        decode_rle(segmentation)
    assert caught.value.reason is R.MASK_UNREADABLE
    assert len(caught.value.detail) > 10


@settings(max_examples=300)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=30), st.integers(1, 9), st.integers(1, 9))
def test_any_text_is_a_mask_or_refused(text, height, width):
    try:
        mask = decode_rle({"size": [height, width], "counts": text})
    except Rejected:
        return
    assert mask.shape == (height, width)
    assert by_the_book(runs(mask)) == encode_rle(mask)["counts"]


@given(st.integers(0, 12), st.integers(0, 9), st.integers(1, 9), st.integers(1, 9))
def test_a_box_covers_the_pixels_between_its_sides(x, y, width, height):
    x1, y1 = x + width, y + height
    expected = np.zeros((18, 21), bool)
    expected[y:y1, x:x1] = True
    assert np.array_equal(polygons_to_mask([[x, y, x1, y, x1, y1, x, y1]], 18, 21), expected)


def test_a_polygon_has_about_its_area_and_polygons_unite():
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    disc = np.stack([50 + 30.3 * np.cos(angles), 40 + 30.3 * np.sin(angles)], 1)
    mask = polygons_to_mask([disc.ravel().tolist()], 80, 100)
    assert abs(mask.sum() / (np.pi * 30.3**2) - 1) < 0.005
    rows, columns = np.nonzero(mask)
    assert abs(columns.mean() + 0.5 - 50) < 0.2
    assert abs(rows.mean() + 0.5 - 40) < 0.2
    box = [-5, -5, 10, -5, 10, 10, -5, 10]  # partly outside
    both = polygons_to_mask([disc.ravel().tolist(), box, [1, 2], []], 80, 100)
    assert np.array_equal(both, mask | polygons_to_mask([box], 80, 100))
    assert both.sum() == mask.sum() + 100
    assert not polygons_to_mask([], 4, 4).any()
    ring = [0, 0, 9, 0, 9, 9, 0, 9, 0, 0, 3, 3, 6, 3, 6, 6, 3, 6, 3, 3]
    assert polygons_to_mask([ring], 9, 9).sum() == 81 - 9


@given(st.lists(st.tuples(st.integers(-4, 16), st.integers(-4, 16)), min_size=3, max_size=7))
def test_a_pixel_is_in_when_a_ray_from_its_centre_crosses_an_odd_number_of_edges(corners):
    mask = polygons_to_mask([[value / 2 + 0.1 for corner in corners for value in corner]], 6, 7)
    edges = list(zip(corners, corners[1:] + corners[:1], strict=True))
    for row in range(6):
        for column in range(7):
            x, y, odd = column + 0.5, row + 0.5, False
            for (x0, y0), (x1, y1) in edges:
                x0, y0, x1, y1 = (value / 2 + 0.1 for value in (x0, y0, x1, y1))
                if (y0 <= y) != (y1 <= y):
                    cross = x0 + (y - y0) * (x1 - x0) / (y1 - y0)
                    if abs(cross - x) < 1e-9:
                        odd = mask[row, column]  # on the edge itself either will do
                        break
                    odd ^= cross < x
            assert mask[row, column] == odd


@pytest.mark.parametrize(
    "polygon",
    [
        [1, 2, 3],
        ["one", 2, 3, 4, 5, 6],
        [True, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, float("nan")],
        [1, 2, 3, 4, 5, 10**300],
        "123456",
        7,
        [0, -9, 5, 9] * 300_000,
    ],
    ids=lambda polygon: str(polygon)[:30],
)
def test_malformed_polygons_are_refused(polygon):
    with pytest.raises(Rejected) as caught:
        polygons_to_mask([polygon], 8, 8)
    assert caught.value.reason is R.MASK_UNREADABLE


def test_not_a_mask_is_our_callers_mistake():
    for wrong in (np.ones((3, 4, 1), bool), np.ones((3, 4), np.uint8), np.ones((0, 4), bool)):
        with pytest.raises(InvalidInputError, match="bool"):
            encode_rle(wrong)
