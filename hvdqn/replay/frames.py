"""Where single observations are kept: in the host's memory, or on the device that learns from them.

A GPU learns faster than stacks of frames are copied to it. Where the frames lie on the GPU, the host still decides
which rows a minibatch is made of, and sends their numbers; the GPU reads and stacks them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array: TypeAlias = npt.NDArray[Any]
Rows: TypeAlias = npt.NDArray[np.int64]
Stacks: TypeAlias = Array | Tensor


class Frames(Protocol):
    """Rows of observations `[rows, *shape]`, as much of an array as a ring asks for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(rows, *shape)`."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of one number of an observation."""

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""

    def __getitem__(self, rows: slice) -> Array:
        """Consecutive rows, as a view if they are in the host's memory."""

    def __setitem__(self, rows: slice | Rows, observation: Array) -> None:
        """Overwrite rows. [batch, *shape]."""

    def read(self, rows: Rows, out: Stacks) -> None:
        """Copy `rows` [...] into `out` [..., *shape], which `stacks` gave."""

    def stacks(self, shape: Sequence[int]) -> Stacks:
        """Memory for observations that `read` fills, where the learner wants them. [*shape, *shape of one]."""

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Memory of the host for what else a minibatch has."""


MakeFrames: TypeAlias = Callable[[int, Sequence[int], npt.DTypeLike], Frames]


class HostFrames:
    """In the host's memory, which is touched as it fills.

    Args:
        rows: how many.
        shape: of one observation.
        dtype: its dtype.
    """

    def __init__(self, rows: int, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        self.rows: Array = np.empty((rows, *shape), dtype)
        self.shape, self.dtype, self.nbytes = self.rows.shape, self.rows.dtype, self.rows.nbytes

    def __getitem__(self, rows: slice) -> Array:
        """Consecutive rows, as a view."""
        return self.rows[rows]

    def __setitem__(self, rows: slice | Rows, observation: Array) -> None:
        """Overwrite rows. [batch, *shape]."""
        self.rows[rows] = observation

    def read(self, rows: Rows, out: Stacks) -> None:
        """Copy `rows` [...] into `out` [..., *shape]."""
        assert isinstance(out, np.ndarray)
        self.rows.take(rows, axis=0, out=out, mode="clip")  # rows are in range; "clip" avoids a hidden copy

    def stacks(self, shape: Sequence[int]) -> Stacks:
        """Memory for observations that `read` fills. [*shape, *shape of one]."""
        return self.empty((*shape, *self.shape[1:]), self.dtype)

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Memory of the host for what else a minibatch has."""
        return np.empty(shape, dtype)


class PinnedFrames(HostFrames):
    """In the host's memory, minibatches in pages that never move: a GPU fetches those while the host goes on."""

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Pinned memory of the host; needs CUDA."""
        return _empty(shape, dtype, pinned=True)


class DeviceFrames:
    """On a device, where minibatches are read and stacked.

    Args:
        rows: how many.
        shape: of one observation.
        dtype: its dtype.
        device: which.
    """

    def __init__(self, rows: int, shape: Sequence[int], dtype: npt.DTypeLike, device: torch.device) -> None:
        self.rows = torch.empty((rows, *shape), dtype=_torch_dtype(dtype), device=device)
        self.shape, self.dtype, self.nbytes = tuple(self.rows.shape), np.dtype(dtype), self.rows.nbytes

    def __getitem__(self, rows: slice) -> Array:
        """Consecutive rows: from a GPU, a copy."""
        found: Array = self.rows[rows].cpu().numpy()
        return found

    def __setitem__(self, rows: slice | Rows, observation: Array) -> None:
        """Overwrite rows. [batch, *shape]."""
        moved = self._moved(observation)
        if isinstance(rows, slice):
            self.rows[rows] = moved
        else:
            self.rows.index_copy_(0, self._moved(rows), moved)

    def read(self, rows: Rows, out: Stacks) -> None:
        """Copy `rows` [...] into `out` [..., *shape]."""
        assert isinstance(out, Tensor)
        torch.index_select(self.rows, 0, self._moved(rows.reshape(-1)), out=out.view(-1, *self.shape[1:]))

    def stacks(self, shape: Sequence[int]) -> Stacks:
        """Memory of the device for observations that `read` fills. [*shape, *shape of one]."""
        return self.rows.new_empty((*shape, *self.shape[1:]))

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Memory of the host for what else a minibatch has, pinned where it is copied to a GPU."""
        return _empty(shape, dtype, pinned=self.rows.is_cuda)

    def _moved(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(array)
        if not self.rows.is_cuda:
            return tensor
        # Pinned memory that torch lends is not lent again before the copy from it is done.
        return tensor.pin_memory().to(self.rows.device, non_blocking=True)


def _empty(shape: Sequence[int], dtype: npt.DTypeLike, pinned: bool) -> Array:
    made: Array = torch.empty(tuple(shape), dtype=_torch_dtype(dtype), pin_memory=pinned).numpy()
    return made


def _torch_dtype(dtype: npt.DTypeLike) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
