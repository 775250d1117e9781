"""Eight bits with a scale for each block: what is zero stays zero, and no number is off by more than half a step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refine_control.cache.compact import BLOCK, find_layout, pack, relative_error, unpack


def sd3_like(prompts: int, t5_tokens: int = 6) -> torch.Tensor:
    """5 tokens of CLIP, zero beyond their first half, and T5 tokens with one huge column; width 4 blocks."""
    embeds = torch.randn(prompts, 5 + t5_tokens, 4 * BLOCK, generator=torch.Generator().manual_seed(prompts))
    embeds[:, :5, 2 * BLOCK :] = 0
    embeds[:, 5:, 3] *= 300
    return embeds


def test_zeros_are_not_stored():
    layout = find_layout(sd3_like(3))
    assert layout.runs == ((5, 2 * BLOCK), (6, 4 * BLOCK))
    packed = pack(sd3_like(3), layout)
    assert packed.codes.shape == (3, 5 * 2 * BLOCK + 6 * 4 * BLOCK)
    assert packed.scales.shape == (3, 5 * 2 + 6 * 4)
    assert not unpack(packed, layout)[:, :5, 2 * BLOCK :].any()
    with pytest.raises(ValueError, match="non-zero"):
        pack(torch.ones(1, 11, 4 * BLOCK), layout)


@given(st.floats(1e-3, 1e3), st.integers(1, 4))
def test_no_number_is_off_by_more_than_half_a_step_of_its_block(size, prompts):
    embeds = size * sd3_like(prompts)
    layout = find_layout(embeds)
    off = (unpack(pack(embeds, layout), layout) - embeds).abs().unflatten(-1, (-1, BLOCK))
    step = embeds.unflatten(-1, (-1, BLOCK)).abs().amax(-1, keepdim=True) / 127
    assert (off <= 0.502 * step + 1e-7).all()


def test_one_huge_column_spoils_its_own_block_alone():
    embeds = sd3_like(4)
    kept = unpack(pack(embeds, find_layout(embeds)), find_layout(embeds))
    calm = relative_error(kept[:, 5:, BLOCK:], embeds[:, 5:, BLOCK:])
    assert calm < 0.01
    assert relative_error(kept, kept) == 0


@pytest.mark.parametrize("width", [1, 32, 64, 192])
def test_any_width_goes_there_and_back(width):
    embeds = torch.randn(2, 3, width)
    layout = find_layout(embeds)
    assert width % layout.block == 0
    assert relative_error(unpack(pack(embeds, layout), layout), embeds) < 0.01
    nothing = torch.zeros(2, 3, width)
    assert torch.equal(unpack(pack(nothing, find_layout(nothing)), find_layout(nothing)), nothing)
