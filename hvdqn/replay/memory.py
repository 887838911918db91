"""Allocate the arrays of a replay in host memory. Subclasses in `device.py` use pinned memory and GPUs.

`replay_memory` in `hvdqn/parts.py` decides which of these classes a run uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hvdqn.replay.batch import ObservationBatch, Rows

Array: TypeAlias = npt.NDArray[Any]


class ObservationArray(Protocol):
    """The observations of all rows of a replay [rows, *shape]: a NumPy array, or a `DeviceArray` on a GPU."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array: `(rows, *shape of one observation)`."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of its numbers."""

    @property
    def nbytes(self) -> int:
        """The number of bytes that are reserved for all rows."""

    def __getitem__(self, rows: slice, /) -> Array:
        """Return consecutive rows as a NumPy array."""

    def __setitem__(self, rows: slice | Rows, observation: Array, /) -> None:
        """Write `observation` [batch, *shape] over the rows that `rows` names: a slice, or row numbers [batch]."""

    def take(self, rows: Rows, /, *, axis: int, out: Any, mode: Literal["clip"]) -> Any:
        """Copy the observations of the row numbers `rows` [...] into `out` [..., *shape]. `axis` must be 0."""


class Memory:
    """Allocates the arrays of a replay in host memory. `device.py` has subclasses for pinned memory and GPUs."""

    note = ""
    """Words that `Replay.description` appends for the log, such as ", observations on cuda:0"."""

    def observations(self, shape: Sequence[int], dtype: npt.DTypeLike) -> ObservationArray:
        """Return an uninitialized array for the observations of all rows. shape: `(rows, *shape of one)`."""
        return np.empty(shape, dtype)

    def batch_observations(self, shape: Sequence[int], dtype: npt.DTypeLike) -> ObservationBatch:
        """Return an uninitialized array for the observations of a minibatch, as `out` of `ObservationArray.take`."""
        return np.empty(shape, dtype)

    def batch_array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Return an uninitialized array for another field of a minibatch; always in host memory."""
        return np.empty(shape, dtype)


HOST_MEMORY = Memory()


def check_sizes(envs: int, capacity: int, frame_stack: int, n_step: int) -> None:
    """Check that each ring of a replay holds at least one transition.

    Raises:
        ValueError: it does not.
    """
    if min(envs, frame_stack, n_step) < 1 or frame_stack > 255:
        raise ValueError(
            f"envs {envs}, frame stack {frame_stack} and n_step {n_step} must be positive, "
            f"and the stack at most 255"
        )
    shortest = frame_stack + n_step - 1
    if capacity // envs < shortest:
        raise ValueError(
            f"replay capacity {capacity} over {envs} envs is too small for frame stack {frame_stack} "
            f"and n_step {n_step}: at least {envs * shortest} transitions per rank"
        )
