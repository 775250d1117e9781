"""Prompt embeddings in 8 bits: integers from -127 to 127 and one fp16 scale for each block of columns.

At SD3 size an embedding is 333 tokens of 4096 numbers, 2.7 MB in bf16, five times a photo's latents. CLIP's 77 tokens
are zero beyond their 2048 columns, which is not stored at all; T5 holds a few very large columns, which would spoil a
whole token's scale, so a scale serves 128 columns of one token.
"""

# P prompts, T tokens, D width, C stored numbers and S scales of a prompt

from __future__ import annotations

import math
from itertools import groupby
from typing import NamedTuple

import torch

BLOCK = 128


class Layout(NamedTuple):
    """Which values of (T, D) are stored: runs of tokens and their stored widths, multiples of `block`."""

    tokens: int
    width: int
    block: int
    runs: tuple[tuple[int, int], ...]
    """((number of tokens, stored width), ...), in order; values beyond the width are zero."""


class Packed(NamedTuple):
    """codes (P,C) int8 and scales (P,S) fp16."""

    codes: torch.Tensor
    scales: torch.Tensor


def find_layout(embeds: torch.Tensor) -> Layout:
    """The smallest layout that stores every non-zero value of `embeds` (P,T,D)."""
    _, tokens, width = embeds.shape
    block = math.gcd(width, BLOCK)
    used = (embeds != 0).any(0).unflatten(-1, (-1, block)).any(-1)  # (T, D / block)
    last = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in used]
    runs = tuple((len(list(run)), blocks * block) for blocks, run in groupby(last))
    return Layout(tokens, width, block, runs)


def pack(embeds: torch.Tensor, layout: Layout) -> Packed:
    """(P,T,D) -> codes and scales. Raises ValueError for a non-zero value outside the layout."""
    parts, scales = [], []
    for part, (_, width) in zip(embeds.split([n for n, _ in layout.runs], 1), layout.runs, strict=True):
        if part[..., width:].any():
            raise ValueError("these embeddings have non-zero values outside the layout")
        blocks = part[..., :width].float().unflatten(-1, (-1, layout.block))
        largest = blocks.abs().amax(-1, keepdim=True) / 127
        scale = largest.to(torch.float16)
        scale = torch.where(scale.float() < largest, torch.nextafter(scale, scale.new_tensor(math.inf)), scale)
        codes = (blocks / scale.float().clamp_min(2**-24)).round().clamp(-127, 127)
        parts.append(codes.to(torch.int8).flatten(1))
        scales.append(scale.flatten(1))
    return Packed(torch.cat(parts, 1), torch.cat(scales, 1))


def unpack(packed: Packed, layout: Layout) -> torch.Tensor:
    """Codes and scales -> (P,T,D) fp32."""
    out = torch.zeros(len(packed.codes), layout.tokens, layout.width)
    blocks = [(tokens, width // layout.block) for tokens, width in layout.runs]
    codes = packed.codes.split([tokens * count * layout.block for tokens, count in blocks], 1)
    scales = packed.scales.split([tokens * count for tokens, count in blocks], 1)
    runs = out.split([tokens for tokens, _ in blocks], 1)
    for run, (tokens, count), code, scale in zip(runs, blocks, codes, scales, strict=True):
        values = (
            code.unflatten(1, (tokens, count, layout.block)).float() * scale.unflatten(1, (tokens, count, 1)).float()
        )
        run[..., : count * layout.block] = values.flatten(2)
    return out


def relative_error(kept: torch.Tensor, embeds: torch.Tensor) -> float:
    """||kept - embeds|| / ||embeds||."""
    return float((kept.double() - embeds.double()).norm() / embeds.double().norm().clamp_min(1e-30))
