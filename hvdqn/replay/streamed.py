"""Arrays that are read piece by piece, because a copy of all of it would double the memory of a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

_PIECE_BYTES = 1 << 24


@dataclass(frozen=True)
class StreamedArray:
    """An array that exists only piece by piece.

    Args:
        shape: `(rows, *shape)`.
        dtype: of its numbers.
        read: returns the rows [first, end) as an array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[int, int], Array]

    @property
    def nbytes(self) -> int:
        """The bytes of all rows."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        """Return all rows as one array."""
        array = self.read(0, self.shape[0]) if self.shape[0] else np.empty(self.shape, self.dtype)
        return array.astype(self.dtype if dtype is None else dtype)


def view_rows(field: Any, rows: slice) -> Array | StreamedArray:
    """Return rows of a field: a view of host memory, or a stream of pieces from a device."""
    if isinstance(field, np.ndarray):
        return field[rows]
    shape = (rows.stop - rows.start, *field.shape[1:])
    return StreamedArray(shape, field.dtype, lambda first, end: field[rows.start + first : rows.start + end])


def pieces(array: Array | StreamedArray) -> Iterator[tuple[int, Array]]:
    """Yield consecutive rows of an array, up to 16 MiB at a time, each with the number of its first row."""
    rows = array.shape[0]
    step = max(_PIECE_BYTES * rows // max(array.nbytes, 1), 1)
    for first in range(0, rows, step):
        end = min(first + step, rows)
        yield first, array.read(first, end) if isinstance(array, StreamedArray) else array[first:end]
