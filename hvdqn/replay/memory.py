"""Where the arrays of a replay are: the interface, and host memory. `device.py` has what only GPUs need.

`replay_memory` in `hvdqn/parts.py` decides which memory a run uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hvdqn.replay.batch import ObservationBatch, Rows

Array: TypeAlias = npt.NDArray[Any]


class ObservationArray(Protocol):
    """The observations of all rows [rows, *shape]: a NumPy array, or what takes its place on a GPU."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(rows, *shape)`."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of one number."""

    @property
    def nbytes(self) -> int:
        """The bytes reserved."""

    def __getitem__(self, rows: slice, /) -> Array:
        """Return consecutive rows."""

    def __setitem__(self, rows: slice | Rows, observation: Array, /) -> None:
        """Overwrite rows. observation: [batch, *shape]."""

    def take(self, rows: Rows, /, *, axis: int, out: Any, mode: Literal["clip"]) -> Any:
        """Copy `rows` [...] into `out` [..., *shape]. axis: 0."""


class Memory:
    """Allocates the arrays of a replay in host memory. `device.py` has pinned memory and GPUs."""

    note = ""
    """What the description of a replay says of its memory."""

    def observations(self, shape: Sequence[int], dtype: npt.DTypeLike) -> ObservationArray:
        """Return an array for the observations of all rows."""
        return np.empty(shape, dtype)

    def batch_observations(self, shape: Sequence[int], dtype: npt.DTypeLike) -> ObservationBatch:
        """Return an array for the observations of a minibatch, which `ObservationArray.take` can fill."""
        return np.empty(shape, dtype)

    def batch_array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Return an array for another field of a minibatch; always in host memory."""
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
