"""A few numbers behind the gradient, which carry what else the ranks must agree on: no collective of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Of each rank: votes and episodes since the last exchange, of all environments and of the greediest of a ladder...
REPORTED = ("stop", "episodes", "return_sum", "length_sum", "greediest_episodes", "greediest_return_sum")
# ...and what the update saw.
LEARNED = ("loss", "td_error", "q_mean")


class Trailer:
    """Written before an exchange that sums it over all ranks, and read after; what is read is then of all of them.

    Args:
        tensor: the last `length(size)` numbers of a message.
        rank: this rank, which has slots of its own.
        size: ranks.
    """

    def __init__(self, tensor: Tensor, rank: int, size: int) -> None:
        self.tensor, self.rank, self.size = tensor, rank, size
        # One copy each way to a GPU; on the host, the tensor's own memory.
        self._host = tensor.cpu().pin_memory() if tensor.is_cuda else tensor
        ends = np.cumsum([len(REPORTED), 1, len(LEARNED), size]).tolist()
        self._numbers = self._host.numpy()
        self._reported, self._absent, self.learned, self._weights, self._probes = np.split(
            self._numbers, ends
        )
        self._weight_at = ends[2] + rank
        self._learned = tensor[ends[1] : ends[2]]
        self._probe = tensor[ends[3] + rank]
        self._to_decide_by = tensor[ends[0]], tensor[ends[2] : ends[3]], tensor[ends[3] :]

    @staticmethod
    def length(size: int) -> int:
        """Numbers in the trailer of this many ranks."""
        return len(REPORTED) + 1 + len(LEARNED) + 2 * size

    def write(self, report: Sequence[float], largest_weight: float = 0.0, absent: bool = False) -> None:
        """What the host knows: this rank's `REPORTED`, its largest importance weight, whether it had no minibatch."""
        numbers = [*report, float(absent)] + [0.0] * (len(LEARNED) + 2 * self.size)
        numbers[self._weight_at] = largest_weight
        self._numbers[:] = numbers
        if self.tensor.is_cuda:
            self.tensor.copy_(self._host, non_blocking=True)

    def write_learned(self, loss: Tensor, td_error: Tensor, q_mean: Tensor, probe: Tensor) -> None:
        """What the device knows: `LEARNED`, and a number that is finite if this rank's gradient is. All `[]`."""
        torch.stack((loss, td_error, q_mean), out=self._learned)
        self._probe.copy_(probe)

    def read(self) -> None:
        """Fetch what the exchange left; on a GPU, the CPU waits here."""
        if self.tensor.is_cuda:
            self._host.copy_(self.tensor)

    def on_device(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the exchange left, unread: `absent` `[]`, all ranks' largest weights and their probes, `[ranks]`."""
        return self._to_decide_by

    def reported(self) -> np.ndarray:
        """`REPORTED`, float64."""
        return self._reported.astype(np.float64)

    @property
    def absent(self) -> int:
        """Ranks that had no minibatch."""
        return round(float(self._absent[0]))

    @property
    def largest_weight(self) -> float:
        """Of all ranks: each has a slot, where the others bring zeros."""
        return float(max(self._weights.tolist()))

    @property
    def spoilt(self) -> list[int]:
        """The ranks whose gradient or loss was not finite."""
        return [rank for rank, probe in enumerate(self._probes.tolist()) if not math.isfinite(probe)]
