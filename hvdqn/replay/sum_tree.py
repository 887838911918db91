"""A sum tree over priorities, vectorised over the batch."""

from __future__ import annotations

from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Mass: TypeAlias = npt.NDArray[np.float64]
Rows: TypeAlias = npt.NDArray[np.int64]

# Wide nodes make few levels (5 for a million rows), each a handful of numpy calls whatever the batch.
_FANOUT = 16


class SumTree:
    """Non-negative masses of `rows` rows, all zero at first, searchable by cumulated mass.

    A parent is the sum of its children, always computed anew and in one order: no drift, and the sums do not
    depend on the order of updates. Memory: 8.5 bytes a row.
    """

    def __init__(self, rows: int) -> None:
        # Leaves first, each [nodes, fanout]; zeros where the rows do not fill the last node.
        self._levels: list[Mass] = []
        nodes = rows
        while not self._levels or nodes > 1:
            nodes = -(-nodes // _FANOUT)
            self._levels.append(np.zeros((nodes, _FANOUT)))
        self.mass: Mass = self._levels[0].reshape(-1)[:rows]
        """Masses of all rows [rows]. To be read; `set` and `fill` write it."""

    @property
    def total(self) -> float:
        """Sum of all masses."""
        return float(self._levels[-1].cumsum()[-1])

    def set(self, rows: Rows, mass: Mass) -> None:
        """Give `rows` [batch] the masses `mass` [batch]; of a row named twice the last counts."""
        self.mass[rows] = mass
        nodes = rows
        for children, parents in pairwise(self._levels):
            nodes = nodes // _FANOUT
            # The same sum as in `find`, in the same order, so a search never falls off the end of a node.
            parents.reshape(-1)[nodes] = children.take(nodes, axis=0).cumsum(axis=1)[:, -1]

    def fill(self, mass: Mass) -> None:
        """Replace all masses [rows]."""
        self.mass[:] = mass
        for children, parents in pairwise(self._levels):
            parents.reshape(-1)[: len(children)] = children.cumsum(axis=1)[:, -1]

    def find(self, targets: Mass) -> Rows:
        """Rows where the cumulated mass first exceeds `targets` [batch]; never a row of mass 0.

        Args:
            targets: in [0, total).
        """
        left = targets.copy()
        nodes = np.zeros(left.shape, np.int64)
        first = np.arange(left.size) * _FANOUT
        for level in reversed(self._levels):
            children = level.take(nodes, axis=0)
            sums = np.cumsum(children, axis=1)
            child = (sums > left[:, None]).argmax(axis=1)
            at = first + child
            before = np.where(child > 0, sums.take(at - 1, mode="clip"), 0.0)
            # Rounding may leave as much as the child holds; beyond that, the search could end at a mass of 0.
            left = np.minimum(left - before, np.nextafter(children.take(at), 0.0))
            nodes = nodes * _FANOUT + child
        return nodes
