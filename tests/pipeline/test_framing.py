"""Laws of frames and edges: what a model is shown of a photograph, and how it is put back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refine_control.errors import InvalidInputError
from refine_control.models.fit import Geometry
from refine_control.pipeline.framing import box_mask, cut, frames, opacity, uncut

GEOMETRY = Geometry(multiple=16, largest=192, side=64)
SIDES = st.integers(1, 300)


@st.composite
def holes(draw):
    width, height = draw(SIDES), draw(SIDES)
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return box_mask((x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))), width, height)


@given(holes(), st.sampled_from([0.0, 0.5, 2.0]))
def test_one_frame_lies_in_the_photograph_and_holds_the_hole_with_its_surroundings(mask, context):
    height, width = mask.shape
    (frame,) = frames(mask, GEOMETRY, context)
    (x0, y0, x1, y1), (a, b, c, d) = frame.box, frame.hole
    assert np.array_equal(box_mask(frame.hole, width, height), mask)
    assert 0 <= x0 <= a < c <= x1 <= width
    assert 0 <= y0 <= b < d <= y1 <= height
    margin = int(context * max(c - a, d - b)) - 1
    assert a - x0 >= min(margin, a) or x1 == width
    assert d + min(margin, height - d) <= y1 or y0 == 0


@given(holes())
def test_a_frame_is_painted_at_the_model_s_side_and_enlarged_only_where_the_photograph_is_smaller(mask):
    (frame,) = frames(mask, GEOMETRY)
    longer = max(frame.box[2] - frame.box[0], frame.box[3] - frame.box[1])
    assert max(frame.size) == GEOMETRY.side
    assert longer >= GEOMETRY.side or longer == max(mask.shape)


@given(holes(), st.booleans())
def test_what_is_cut_suits_the_model_hides_the_whole_hole_and_comes_back_in_its_place(mask, whole):
    image = np.random.default_rng(0).integers(0, 256, (*mask.shape, 3), np.uint8)
    try:
        (frame,) = frames(mask, GEOMETRY, whole=whole)
    except InvalidInputError:
        assert whole
        assert max(mask.shape) > GEOMETRY.largest
        return
    shown, hole = cut(image, mask, frame, GEOMETRY.multiple)
    GEOMETRY.check(*hole.shape)
    assert shown.shape == (*hole.shape, 3)
    x0, y0, x1, y1 = frame.box
    back = uncut(shown, frame)
    assert back.shape == (y1 - y0, x1 - x0, 3)
    if frame.size == (x1 - x0, y1 - y0):
        assert np.array_equal(back, image[y0:y1, x0:x1])
        assert np.array_equal(hole[: y1 - y0, : x1 - x0], mask[y0:y1, x0:x1])
    # the pixel of the model that holds the centre of each pixel of the photograph
    sizes = zip((y1 - y0, x1 - x0), frame.size[::-1], strict=True)
    rows, columns = ((2 * np.arange(n) + 1) * painted // (2 * n) for n, painted in sizes)
    assert hole[np.ix_(rows, columns)][mask[y0:y1, x0:x1]].all()


def test_padding_repeats_the_hole_by_reflection_so_that_it_shows_nothing_of_it():
    mask = box_mask((30, 0, 40, 40), 40, 40)
    (frame,) = frames(mask, GEOMETRY, whole=True)
    _, hole = cut(np.zeros((40, 40, 3), np.uint8), mask, frame, 16)
    assert hole.shape == (48, 48)
    assert hole[:, 30:48].all()


def test_holes_share_a_frame_where_it_costs_no_resolution_and_are_apart_else():
    near = box_mask((10, 10, 20, 20), 400, 300) | box_mask((30, 10, 40, 20), 400, 300)
    assert [frame.hole for frame in frames(near, GEOMETRY)] == [(10, 10, 40, 20)]
    far = near | box_mask((350, 250, 360, 260), 400, 300)
    assert [frame.hole for frame in frames(far, GEOMETRY)] == [(10, 10, 40, 20), (350, 250, 360, 260)]
    assert [frame.hole for frame in frames(box_mask((0, 0, 150, 150), 192, 192), GEOMETRY, whole=True)] == [
        (0, 0, 150, 150)
    ]


def test_a_whole_photograph_beyond_the_model_is_refused():
    with pytest.raises(InvalidInputError, match=r"193 x 20 pixels is too large .* up to 192"):
        frames(box_mask((0, 0, 5, 5), 193, 20), GEOMETRY, whole=True)


@given(holes(), st.integers(0, 40))
def test_an_edge_is_opaque_in_the_hole_and_gone_beyond_the_feather(mask, feather):
    weight = opacity(mask, feather)
    assert (weight[mask] == 1).all()
    assert ((weight >= 0) & (weight <= 1)).all()
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x0, y0, x1, y1 = columns[0] - feather, rows[0] - feather, columns[-1] + feather + 1, rows[-1] + feather + 1
    near = np.zeros_like(mask)
    near[max(0, y0) : y1, max(0, x0) : x1] = True
    assert (weight[~near] == 0).all()


def test_an_edge_falls_steadily():
    line = opacity(box_mask((40, 0, 60, 9), 100, 9), 16)[4]
    assert (np.diff(line[:41]) >= 0).all()
    assert 0.4 < line[32] < 0.6


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (-1, 0, 5, 5), (0, 0, 11, 5), (0, 5, 5, 5), (3, 0, 2, 5)])
def test_a_box_that_is_empty_or_reaches_outside_is_refused(box):
    with pytest.raises(InvalidInputError, match="10 x 8 pixels"):
        box_mask(box, 10, 8)
