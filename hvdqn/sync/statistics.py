"""Exchange statistics and votes to stop between ranks, as a few numbers at the end of every message.

Under every strategy these numbers begin with `STATISTICS`, which are summed over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hvdqn.networks import Normalize

# What a rank reports of itself: its vote to stop, then counts and sums over the episodes that ended since the last
# exchange. The last two are over the environments with the smallest epsilon, where environments have different ones.
REPORTED = ("stop", "episodes", "return_sum", "length_sum", "greediest_episodes", "greediest_return_sum")
# What a rank computes from its minibatch: see `Learner.compute_gradient`.
LEARNED = ("loss", "td_error", "q_mean")
STATISTICS = REPORTED + LEARNED
STOP, LOSS = STATISTICS.index("stop"), STATISTICS.index("loss")


class Received(NamedTuple):
    """The statistics and votes of all ranks, which a `Trailer` holds after the sum over ranks."""

    statistics: NDArray[np.float64]
    """The values of `STATISTICS`, summed over ranks `[9]`."""
    present: int
    """Number of ranks that contributed a gradient."""
    slots: list[list[float]]
    """For each slot, the number that every rank wrote there `[slots][ranks]`."""


class Trailer:
    """Writes statistics to the end of a message before an allreduce sums it over ranks, and reads the sums after it.

        STATISTICS | absent | slot 0 of every rank | slot 1 of every rank | ... | sums over observations

    `absent` sums to the number of ranks without a gradient. A slot has one place for each rank. Each rank writes its
    number to its own place and 0 to the others, so that after the sum every rank sees the numbers of all.

    Args:
        tensor: a view of the last `length(size, slots, normalize)` numbers of a message.
        rank: this rank.
        size: number of ranks.
        slots: number of slots.
        normalize: its sums over observations travel at the end, and are merged into it; None: there are none.
    """

    def __init__(
        self, tensor: Tensor, rank: int, size: int, slots: int, normalize: Normalize | None = None
    ) -> None:
        self.tensor, self.rank, self.size, self.normalize = tensor, rank, size, normalize
        # A message on a GPU has a copy of its trailer in host memory, to be copied as a whole; one on the host needs
        # none.
        self._host = tensor.cpu().pin_memory() if tensor.is_cuda else tensor
        self._numbers: NDArray[np.floating] = self._host.numpy()
        self._end = len(STATISTICS)
        self._slots = slice(self._end + 1, self._end + 1 + slots * size)
        self._places = [self._end + 1 + slot * size + rank for slot in range(slots)]
        self._learned = tensor[len(REPORTED) : self._end]
        self._last_slot = tensor[self._places[-1]]

    @staticmethod
    def length(size: int, slots: int, normalize: Normalize | None = None) -> int:
        """Return how many numbers the statistics at the end of a message take, in a job with `size` ranks."""
        return len(STATISTICS) + 1 + slots * size + (normalize.num_sums if normalize else 0)

    def pack(
        self,
        statistics: Sequence[float],
        slots: Sequence[float] = (),
        learned: Tensor | None = None,
        absent: bool = False,
    ) -> None:
        """Write this rank's numbers; what is not given becomes zero.

        Args:
            statistics: values of `STATISTICS`, or of the first of them.
            slots: numbers that all ranks will see for each single rank, for the first slots.
            learned: the values of `LEARNED`, and this rank's number for the last slot `[4]`; they may be on a GPU.
            absent: whether this rank has no gradient to contribute.
        """
        numbers = [0.0] * len(self._numbers)
        numbers[: len(statistics)] = statistics
        numbers[self._end] = float(absent)
        for place, value in zip(self._places, slots, strict=False):
            numbers[place] = value
        if learned is not None and not self.tensor.is_cuda:
            *numbers[len(REPORTED) : self._end], numbers[self._places[-1]] = learned.tolist()
        if self.normalize is not None:
            numbers[self._slots.stop :] = self.normalize.pop_sums()
        self._numbers[:] = numbers
        if self.tensor.is_cuda:
            self.tensor.copy_(self._host, non_blocking=True)
            if learned is not None:
                self._learned.copy_(learned[:-1])
                self._last_slot.copy_(learned[-1])

    def unpack(self) -> Received:
        """Return the sums over ranks after an exchange, and merge those over observations into `normalize`.

        If the message is on a GPU, the host waits for it here.
        """
        if self.tensor.is_cuda:
            self._host.copy_(self.tensor)
        numbers = self._numbers.astype(np.float64)
        slots = numbers[self._slots].reshape(-1, self.size).tolist()
        if self.normalize is not None:
            self.normalize.merge(numbers[self._slots.stop :])
        return Received(numbers[: self._end], self.size - round(numbers[self._end]), slots)

    def on_device(self) -> tuple[Tensor, list[Tensor]]:
        """Return the sums over ranks as tensors on the message's device, without waiting for it.

        Returns:
            The number of ranks without a gradient `[]`, and each slot `[ranks]`.
        """
        slots = self.tensor[self._slots].view(-1, self.size)
        return self.tensor[self._end], list(slots)


@dataclass
class Outcome:
    """The result of one exchange between ranks.

    Attributes:
        statistics: the values of `STATISTICS` [9]. Votes and episodes (`REPORTED`) are summed over ranks. Loss, TD
            error and mean Q-value (`LEARNED`) are summed over `updates`: divide by that for means.
        updates: number of optimizer steps that ranks took since the last outcome; a step of all together counts once.
        skipped: number of updates that were skipped because a gradient was not finite.
        stop: whether some rank voted to stop.
    """

    statistics: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(STATISTICS)))
    updates: int = 0
    skipped: int = 0
    stop: bool = False

    def add(self, other: Outcome) -> None:
        """Add the result of a later exchange to this one."""
        self.statistics += other.statistics
        self.updates += other.updates
        self.skipped += other.skipped
        self.stop = self.stop or other.stop


class Totals:
    """Adds up the results of exchanges until the next line of metrics.

    Attributes:
        skipped_updates: number of updates of the whole run that were skipped because a gradient was not finite.
    """

    def __init__(self) -> None:
        self.skipped_updates = 0
        self._statistics = np.zeros(len(STATISTICS))
        self._updates = 0

    def add(self, outcome: Outcome) -> None:
        """Add the result of one exchange."""
        self._statistics += outcome.statistics
        self._updates += outcome.updates
        self.skipped_updates += outcome.skipped

    def pop(self) -> dict[str, float]:
        """Return the values for a line of metrics, and start to sum anew.

        Losses, TD errors and Q-values are means over updates. Returns and lengths are means over episodes; there are
        none if no episode has ended.
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
        """Return the sums and counts so far, for a checkpoint."""
        return {
            "totals": self._statistics,
            "updates_summed": self._updates,
            "skipped_updates": self.skipped_updates,
        }

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Continue from the sums and counts that `counters` returned."""
        self._statistics[:] = counters["totals"]
        self._updates = counters["updates_summed"]
        self.skipped_updates = counters["skipped_updates"]
