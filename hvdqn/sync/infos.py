"""Means of numbers that environments report in their infos, such as `is_success`, over the episodes of all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hvdqn.comm import Comm

SUCCESS = "is_success"


class InfoMeans:
    """Adds up numbers in the infos of this rank's episodes until `exchange` returns their means over all ranks.

    Args:
        names: which numbers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(dict.fromkeys(names))
        self.has_success = False
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, info: Mapping[str, Any]) -> None:
        """Add the info of an episode's last step."""
        self.has_success = self.has_success or SUCCESS in info
        for name in {*self.names, SUCCESS}:
            value = info.get(name)
            if isinstance(value, (bool, int, float)) and math.isfinite(value):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1

    def watch_success(self) -> None:
        """Exchange `is_success` from now on; to be called on all ranks."""
        if SUCCESS not in self.names:
            self.names.append(SUCCESS)

    def exchange(self, comm: Comm) -> dict[str, float]:
        """Return the means over all ranks since the last call, as `info/NAME`; a collective call if there are names."""
        sums, counts, self._sums, self._counts = self._sums, self._counts, {}, {}
        if not self.names:
            return {}
        numbers = [value for name in self.names for value in (sums.get(name, 0.0), counts.get(name, 0))]
        total = torch.tensor(numbers, dtype=torch.float32)
        comm.allreduce_sum_async(total, name="infos").wait()
        means = zip(self.names, total.view(-1, 2).tolist(), strict=True)
        return {f"info/{name}": total / count for name, (total, count) in means if count}
