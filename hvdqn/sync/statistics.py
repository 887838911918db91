"""The statistics and votes that ranks exchange: a few numbers that travel with every message of a strategy.

They begin in the same way under every strategy: with `STATISTICS`, which is summed over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# One rank's vote to stop and its episodes since the last exchange: all of them, and those of the greediest environments
# of an epsilon ladder.
REPORTED = ("stop", "episodes", "return_sum", "length_sum", "greediest_episodes", "greediest_return_sum")
# Of one rank's minibatch, see `Learner.compute_gradient`.
LEARNED = ("loss", "td_error", "q_mean")
STATISTICS = REPORTED + LEARNED
STOP, LOSS = STATISTICS.index("stop"), STATISTICS.index("loss")


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

    def pack(
        self,
        statistics: Sequence[float],
        slots: Sequence[float] = (),
        learned: Tensor | None = None,
        absent: bool = False,
    ) -> None:
        """Write this rank's part; what is not given becomes zero.

        Args:
            statistics: the first of `STATISTICS`.
            slots: this rank's number in the first slots.
            learned: what only the device knows: `LEARNED`, and the number in the last slot. `[4]`.
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
        if learned is not None:
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
        """Return views to be read on the device after an exchange.

        Returns:
            The number of absent ranks `[]`, and each slot `[ranks]`.
        """
        slots = self.tensor[self._end + 1 :].view(-1, self.size)
        return self.tensor[self._end], list(slots)


@dataclass
class Outcome:
    """What an exchange brought.

    Attributes:
        statistics: `STATISTICS`, summed over ranks and over `updates`. [9].
        updates: optimizer steps taken by ranks since the last outcome.
        skipped: updates that were skipped because a gradient was not finite.
        stop: whether some rank voted to stop.
    """

    statistics: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(STATISTICS)))
    updates: int = 0
    skipped: int = 0
    stop: bool = False

    def add(self, other: Outcome) -> None:
        """Add a later outcome to this one."""
        self.statistics += other.statistics
        self.updates += other.updates
        self.skipped += other.skipped
        self.stop = self.stop or other.stop


class Totals:
    """Adds up the outcomes of exchanges.

    Attributes:
        skipped_updates: updates of the whole run that were skipped because a gradient was not finite.
    """

    def __init__(self) -> None:
        self.skipped_updates = 0
        self._statistics = np.zeros(len(STATISTICS))
        self._updates = 0

    def add(self, outcome: Outcome) -> None:
        """Add what one exchange brought."""
        self._statistics += outcome.statistics
        self._updates += outcome.updates
        self.skipped_updates += outcome.skipped

    def pop(self) -> dict[str, float]:
        """Return the values of a line of metrics, and start over.

        Losses, TD errors and Q-values are means over updates; returns and lengths are means over episodes, and are left
        out where no episode has ended.
        """
        sums = dict(zip(STATISTICS, self._statistics.tolist(), strict=True))
        values = {name: sums[name] / self._updates if self._updates else math.nan for name in LEARNED}
        episodes, greediest = sums["episodes"], sums["greediest_episodes"]
        values["episodes"] = episodes
        values["skipped_updates"] = self.skipped_updates
        if episodes:
            values["episode_return_mean"] = sums["return_sum"] / episodes
            values["episode_length_mean"] = sums["length_sum"] / episodes
        if greediest:
            values["greediest_return_mean"] = sums["greediest_return_sum"] / greediest
        self._statistics[:] = 0.0
        self._updates = 0
        return values

    def counters(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "totals": self._statistics,
            "updates_summed": self._updates,
            "skipped_updates": self.skipped_updates,
        }

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Load what `counters` returned."""
        self._statistics[:] = counters["totals"]
        self._updates = counters["updates_summed"]
        self.skipped_updates = counters["skipped_updates"]
