"""Read a large array piece by piece, because a copy of all of a replay would double the memory that it takes."""

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
    """An array whose rows are read or computed only when asked for, a piece at a time.

    Args:
        shape: `(rows, *shape of one row)`.
        dtype: dtype of its numbers.
        read: called as `read(first, end)`; returns the rows [first, end) as an array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[int, int], Array]

    @property
    def nbytes(self) -> int:
        """The number of bytes of all rows together."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        """Read all rows into one array `[rows, ...]`; NumPy calls this, as in `np.asarray(streamed)`."""
        array = self.read(0, self.shape[0]) if self.shape[0] else np.empty(self.shape, self.dtype)
        return array.astype(self.dtype if dtype is None else dtype)


def view_rows(field: Any, rows: slice) -> Array | StreamedArray:
    """Return rows of a field without a copy: a view of host memory, or a `StreamedArray` that reads from a GPU."""
    if isinstance(field, np.ndarray):
        return field[rows]
    shape = (rows.stop - rows.start, *field.shape[1:])
    return StreamedArray(shape, field.dtype, lambda first, end: field[rows.start + first : rows.start + end])


def pieces(array: Array | StreamedArray) -> Iterator[tuple[int, Array]]:
    """Yield pieces of about 16 MiB of consecutive rows, each as the number of its first row and the rows."""
    rows = array.shape[0]
    step = max(_PIECE_BYTES * rows // max(array.nbytes, 1), 1)
    for first in range(0, rows, step):
        end = min(first + step, rows)
        yield first, array.read(first, end) if isinstance(array, StreamedArray) else array[first:end]
