"""What the ranks learned since the last line of metrics, and what they have skipped in the whole run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hvdqn.sync.strategy import Outcome
from hvdqn.sync.trailer import LEARNED, STATISTICS


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
