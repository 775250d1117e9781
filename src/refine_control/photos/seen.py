"""Which keys there have been already, in some 30 bytes a key whatever its length: a set of 128-bit hashes."""

from __future__ import annotations

import hashlib
from array import array

_FULLEST = 0.7
"""Share of the places in use; a search takes long beyond."""


class Seen:
    """The keys given to `add`; that two of a billion are taken for one has odds of 1 to 10^20."""

    def __init__(self) -> None:
        self._count = 0
        self._places = array("Q", [0]) * (1 << 11)  # the halves of a hash at 2i and 2i + 1, or zeros

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: str) -> bool:
        return self._places[self._place(*_halves(key))] != 0

    def add(self, key: str) -> bool:
        """Whether the key is new; from now on it is not."""
        halves = _halves(key)
        at = self._place(*halves)
        if self._places[at]:
            return False
        self._places[at], self._places[at + 1] = halves
        self._count += 1
        if 2 * self._count > _FULLEST * len(self._places):
            self._grow()
        return True

    def _place(self, high: int, low: int) -> int:
        """Where the hash lies, or the first free place behind where it belongs."""
        places, last = self._places, len(self._places) - 1
        at = 2 * low & last
        while (there := places[at]) and (there != high or places[at + 1] != low):
            at = at + 2 & last
        return at

    def _grow(self) -> None:
        former = self._places
        self._places = array("Q", [0]) * (2 * len(former))
        for high, low in zip(former[::2], former[1::2], strict=True):
            if high:
                at = self._place(high, low)
                self._places[at], self._places[at + 1] = high, low


def _halves(key: str) -> tuple[int, int]:
    """The key's hash in two numbers below 2^64; the first is not 0."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little") or 1, int.from_bytes(digest[8:], "little")
