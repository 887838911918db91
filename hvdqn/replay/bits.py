"""Booleans of each row of a replay, in one bit each."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hvdqn.replay.batch import Rows
from hvdqn.step import Bools


class BitRows:
    """An array of booleans `[rows, *shape]` that takes one bit for each, rounded up to bytes in every row.

    Args:
        rows: number of rows; all bits are 0 at first.
        shape: of one row.

    Attributes:
        packed: the bytes `[rows, bytes]`.
    """

    def __init__(self, rows: int, shape: tuple[int, ...]) -> None:
        self.shape, self.bits = shape, math.prod(shape)
        self.packed: npt.NDArray[np.uint8] = np.zeros((rows, (self.bits + 7) // 8), np.uint8)

    def __getitem__(self, rows: Rows) -> Bools:
        """Return these rows, `[batch, *shape]`."""
        bits = np.unpackbits(self.packed.take(rows, axis=0), axis=1, count=self.bits)
        return bits.view(np.bool_).reshape(-1, *self.shape)

    def __setitem__(self, rows: Rows, values: Bools) -> None:
        """Overwrite these rows. values: [batch, *shape]."""
        self.packed[rows] = np.packbits(values.reshape(-1, self.bits), axis=1)
