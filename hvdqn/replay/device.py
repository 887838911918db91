"""Allocate the arrays of a replay for a learner on a GPU: in pinned host memory, or in the GPU's own.

Copying stacks of frames to a GPU takes longer than learning from them. With `DeviceMemory` the observations are on the
GPU: the host still decides which rows make a minibatch, and the GPU reads and stacks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hvdqn.replay.batch import ObservationBatch, Rows
from hvdqn.replay.memory import Array, Memory, ObservationArray


class PinnedMemory(Memory):
    """Keeps observations in host memory, and minibatches in pinned memory, from which a GPU copies asynchronously."""

    def batch_observations(self, shape: Sequence[int], dtype: npt.DTypeLike) -> ObservationBatch:
        """Return an uninitialized array in pinned memory for the observations of a minibatch `[batch, ...]`."""
        return _empty(shape, dtype, pinned=True)

    def batch_array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Return a pinned array."""
        return _empty(shape, dtype, pinned=True)


class DeviceMemory(Memory):
    """Keeps all observations of the replay, and those of a minibatch, in the memory of a GPU.

    Args:
        device: the learner's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.note = f", observations on {device}"

    def observations(self, shape: Sequence[int], dtype: npt.DTypeLike) -> ObservationArray:
        """Return an uninitialized array on the device for the observations of all rows `[rows, ...]`."""
        return DeviceArray(shape, dtype, self.device)

    def batch_observations(self, shape: Sequence[int], dtype: npt.DTypeLike) -> ObservationBatch:
        """Return an uninitialized tensor on the device for the observations of a minibatch `[batch, ...]`."""
        return torch.empty(tuple(shape), dtype=_torch_dtype(dtype), device=self.device)

    def batch_array(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Array:
        """Return an array in host memory, pinned if it will be copied to a GPU."""
        return _empty(shape, dtype, pinned=self.device.type == "cuda")


class DeviceArray:
    """An array in the memory of a device, with the part of NumPy's interface that `Replay` uses.

    Args:
        shape: `(rows, *shape of one observation)`.
        dtype: NumPy's dtype of its numbers.
        device: the device that holds it.
    """

    def __init__(self, shape: Sequence[int], dtype: npt.DTypeLike, device: torch.device) -> None:
        self.tensor = torch.empty(tuple(shape), dtype=_torch_dtype(dtype), device=device)
        self.shape, self.dtype, self.nbytes = tuple(shape), np.dtype(dtype), self.tensor.nbytes

    def __getitem__(self, rows: slice) -> Array:
        """Return consecutive rows as a NumPy array: a copy if the device is a GPU, else a view."""
        found: Array = self.tensor[rows].cpu().numpy()
        return found

    def __setitem__(self, rows: slice | Rows, observation: Array) -> None:
        """Write `observation` [batch, *shape] over the rows that `rows` names: a slice, or row numbers [batch]."""
        moved = self._to_device(observation)
        if isinstance(rows, slice):
            self.tensor[rows] = moved
        else:
            self.tensor.index_copy_(0, self._to_device(rows), moved)

    def take(self, rows: Rows, *, axis: int, out: Tensor, mode: Literal["clip"]) -> Tensor:
        """Copy the observations of the row numbers `rows` [...] into `out` [..., *shape]. All must be in range."""
        flat = out.view(-1, *self.shape[1:])
        torch.index_select(self.tensor, axis, self._to_device(rows.reshape(-1)), out=flat)
        return out

    def _to_device(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(array)
        if not self.tensor.is_cuda:
            return tensor
        # The pinned copy may be freed at once: PyTorch does not reuse its memory before the GPU has read it.
        return tensor.pin_memory().to(self.tensor.device, non_blocking=True)


def _empty(shape: Sequence[int], dtype: npt.DTypeLike, pinned: bool) -> Array:
    array: Array = torch.empty(tuple(shape), dtype=_torch_dtype(dtype), pin_memory=pinned).numpy()
    return array


def _torch_dtype(dtype: npt.DTypeLike) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
