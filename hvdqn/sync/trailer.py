"""The statistics and votes that ranks exchange: a few numbers that travel with every message of a strategy.

They begin in the same way under every strategy: with `STATISTICS`, which is summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# One rank's vote to stop and its episodes since the last exchange: all of them, and those of the greediest environments
# of an epsilon ladder.
REPORTED = ("stop", "episodes", "return_sum", "length_sum", "greediest_episodes", "greediest_return_sum")
# Of one rank's minibatch, see `Learner.compute_gradient`.
LEARNED = ("loss", "td_error", "q_mean")
STATISTICS = REPORTED + LEARNED


class Received(NamedTuple):
    """What an exchange left in a trailer."""

    statistics: NDArray[np.float64]
    """`STATISTICS`, summed over ranks `[9]`."""
    present: int
    """Ranks that contributed a gradient."""
    slots: list[list[float]]
    """Numbers of each single rank `[slots][ranks]`."""


class Trailer:
    """A view of the last numbers of a message: written before an exchange sums them over ranks, read after it.

        STATISTICS | absent | slot 0 of every rank | slot 1 of every rank | ...

    In a slot each rank writes its own place and zeros elsewhere, so that the sum holds every rank's number.

    Args:
        tensor: the last `length(size, slots)` numbers of a message.
        rank: this rank.
        size: number of ranks.
        slots: numbers of each single rank.
    """

    def __init__(self, tensor: Tensor, rank: int, size: int, slots: int) -> None:
        self.tensor, self.rank, self.size = tensor, rank, size
        # On a GPU one copy each way; on the host the tensor's own memory.
        self._host = tensor.cpu().pin_memory() if tensor.is_cuda else tensor
        self._numbers: NDArray[np.floating] = self._host.numpy()
        self._end = len(STATISTICS)
        self._places = [self._end + 1 + slot * size + rank for slot in range(slots)]
        self._learned = tensor[len(REPORTED) : self._end]
        self._last_slot = tensor[self._places[-1]]

    @staticmethod
    def length(size: int, slots: int) -> int:
        """Return the number of numbers in a trailer."""
        return len(STATISTICS) + 1 + slots * size

    def pack(self, statistics: Sequence[float], slots: Sequence[float] = (), absent: bool = False) -> None:
        """Write what the host knows; the rest becomes zero.

        Args:
            statistics: the first of `STATISTICS`, of this rank.
            slots: this rank's own numbers.
            absent: whether this rank contributes a zero gradient.
        """
        numbers = [0.0] * len(self._numbers)
        numbers[: len(statistics)] = statistics
        numbers[self._end] = float(absent)
        for place, value in zip(self._places, slots, strict=False):
            numbers[place] = value
        self._numbers[:] = numbers
        if self.tensor.is_cuda:
            self.tensor.copy_(self._host, non_blocking=True)

    def pack_learned(self, learned: Tensor) -> None:
        """Write what the device knows: `LEARNED`, and the number of the last slot. `[4]`."""
        self._learned.copy_(learned[:-1])
        self._last_slot.copy_(learned[-1])

    def unpack(self) -> Received:
        """Return what the exchange left; on a GPU the host waits for it here."""
        if self.tensor.is_cuda:
            self._host.copy_(self.tensor)
        numbers = self._numbers.astype(np.float64)
        slots = numbers[self._end + 1 :].reshape(-1, self.size).tolist()
        return Received(numbers[: self._end], self.size - round(numbers[self._end]), slots)

    def on_device(self) -> tuple[Tensor, list[Tensor]]:
        """Return views of `absent` `[]` and of each slot `[ranks]`, to be read on the device."""
        slots = self.tensor[self._end + 1 :].view(-1, self.size)
        return self.tensor[self._end], list(slots)
