"""Label Studio's brush: a mask as a stream of bits over a picture's four equal channels, row by row.

32 bits: how many bytes there are; 5 bits: bits in a byte - 1; four times 4 bits: a size - 1. Then pieces: 1 bit,
whether it is a run; 2 bits, which size; that many bits, the count - 1; and one byte for a run, `count` otherwise.
"""

# H W pixels

from __future__ import annotations

import numpy as np

from refine_control.errors import InvalidInputError
from refine_control.records import MAX_PIXELS

_SIZES = (3, 4, 8, 16)
_WORD = 8


def encode_brush(mask: np.ndarray) -> list[int]:
    """(H, W) bool -> Label Studio's bytes."""
    flat = mask.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    bits = [f"{4 * flat.size:032b}", f"{_WORD - 1:05b}", *(f"{size - 1:04b}" for size in _SIZES)]
    for start, length in zip(starts[:-1].tolist(), np.diff(4 * starts).tolist(), strict=True):
        value = f"{255 * int(flat[start]):08b}"
        while length:
            count = min(length, 1 << _SIZES[-1])
            which = next(number for number, size in enumerate(_SIZES) if count <= 1 << size)
            bits.append(f"1{which:02b}{count - 1:0{_SIZES[which]}b}{value}")
            length -= count
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def decode_brush(brush: list[int], height: int, width: int) -> np.ndarray:
    """Label Studio's bytes -> (H, W) bool. Raises InvalidInputError when they are not a mask of that size."""
    try:
        bits = "".join(f"{byte:08b}" for byte in bytes(brush))
        total, word = int(bits[:32], 2), int(bits[32:37], 2) + 1
        sizes = [int(bits[37 + 4 * k : 41 + 4 * k], 2) + 1 for k in range(4)]
        if min(height, width) < 1 or height * width > MAX_PIXELS or (total, word) != (4 * height * width, _WORD):
            raise ValueError
        values, at, done = np.zeros(total, np.uint8), 53, 0
        while done < total:
            size = sizes[int(bits[at + 1 : at + 3], 2)]
            behind = done + int(bits[at + 3 : at + 3 + size], 2) + 1
            count = 1 if bits[at] == "1" else behind - done
            at, given = at + 3 + size, bits[at + 3 + size : at + 3 + size + word * count]
            if behind > total or len(given) < word * count:
                raise ValueError
            values[done:behind] = np.frombuffer(int(given, 2).to_bytes(count, "big"), np.uint8)
            at, done = at + word * count, behind
    except (ValueError, TypeError, IndexError):
        raise InvalidInputError(f"a brush mask is not one of {width} x {height} pixels") from None
    return values.reshape(height, width, 4)[:, :, 3] > 127
