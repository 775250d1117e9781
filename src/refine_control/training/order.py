"""Which samples fill a step, a pure function of (seed, stage, step, slot): a global shuffle, one size in each step.

The samples of each size form an endless stream of shuffled epochs, which is cut into batches. The rest of an epoch
begins the next batch of its size, so no sample is dropped. Epoch e contains the batches of all sizes that are full by
the end of e, in a shuffled order. After E epochs each of the n samples of a size has been used E times, or up to
ceil(batch size / n) times less. A size with fewer samples than a batch has a batch only every few epochs, which
contains samples more than once. With one size this is a shuffle of all samples in every epoch.
"""

# B batch size, n samples of a size, N samples, e epoch

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from refine_control.photos.buckets import Size
from refine_control.randomness import derive_seed, permutation


class Turn(NamedTuple):
    """The batch of a step: its latent size, and which batch of this size it is, counted from 0 over the run."""

    size: Size
    number: int


class Order:
    """The order of a cache's rows, given as a range for each size, in batches of `batch_size`."""

    def __init__(self, groups: Mapping[Size, range], batch_size: int):
        self.groups, self.batch_size = dict(groups), batch_size
        self._shuffled: dict[tuple[int, str, Size, int], np.ndarray] = {}
        self._turns: dict[tuple[int, str, int], list[Turn]] = {}

    def turn(self, seed: int, stage: str, step: int) -> Turn:
        """The batch of `step`."""
        if len(self.groups) == 1:
            return Turn(next(iter(self.groups)), step)
        epoch = step * self.batch_size // sum(map(len, self.groups.values()))  # not later than that of the step
        while self._full(epoch + 1) <= step:
            epoch += 1
        key = (seed, stage, epoch)
        if key not in self._turns:
            turns = [
                Turn(size, number)
                for size in self.groups
                for number in range(self._full_batches(size, epoch), self._full_batches(size, epoch + 1))
            ]
            shuffled = permutation(derive_seed(seed, stage, "turns", epoch), len(turns))
            self._turns = {k: v for k, v in self._turns.items() if k[2] >= epoch - 1}
            self._turns[key] = [turns[i] for i in shuffled]
        return self._turns[key][step - self._full(epoch)]

    def rows(self, seed: int, stage: str, turn: Turn, slots: Sequence[int]) -> np.ndarray:
        """(len(slots),) the rows that fill these slots of the turn's batch."""
        group = self.groups[turn.size]
        out = []
        for slot in slots:
            epoch, position = divmod(turn.number * self.batch_size + slot, len(group))
            out.append(group[self._epoch(seed, stage, turn.size, epoch)[position]])
        return np.asarray(out)

    def _full(self, epoch: int) -> int:
        """Number of batches of all sizes that are full before `epoch` begins."""
        return sum(self._full_batches(size, epoch) for size in self.groups)

    def _full_batches(self, size: Size, epoch: int) -> int:
        return epoch * len(self.groups[size]) // self.batch_size

    def _epoch(self, seed: int, stage: str, size: Size, epoch: int) -> np.ndarray:
        """(n,) the shuffled rows of a size, counted within it."""
        key = (seed, stage, size, epoch)
        if key not in self._shuffled:
            self._shuffled = {k: v for k, v in self._shuffled.items() if k[2] != size or k[3] >= epoch - 1}
            which = () if len(self.groups) == 1 else size
            drawn = derive_seed(seed, stage, "order", epoch, *which)
            self._shuffled[key] = permutation(drawn, len(self.groups[size]))
        return self._shuffled[key]
