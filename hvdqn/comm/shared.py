"""Sum tensors over the ranks of one host through shared memory (MPI 3, section 11.2.3).

Each rank writes its tensor, the message, to its own shared memory, then increases a counter there, which tells the
others that the message is complete. `wait` reads the messages of all ranks and adds them in the order of ranks, so that
every rank gets the same bits. Ranks need no MPI call for a message to arrive.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

LINE = 64  # bytes of a cache line; each rank's counter has a line of its own, or ranks would slow each other down


class SharedSum:
    """Computes the allreduces of one name, one after the other, and serves as the handle of the latest one.

    Messages use two buffers in turn. When a rank writes message k + 2 over message k, every rank has read message k:
    the rank has waited for message k + 1 of all ranks, and they post that only after they have read message k.

    All ranks must create theirs together, and none may post before all have.

    Args:
        mpi: the module `mpi4py.MPI`.
        host: a communicator of the ranks, which share memory.
        like: a tensor with the shape and dtype of the messages: [n] float.
    """

    def __init__(self, mpi: Any, host: Any, like: Tensor) -> None:
        self._numel, self._dtype, dtype = like.numel(), like.dtype, like.detach().numpy().dtype
        stride = -(-like.nbytes // LINE) * LINE
        self._window = mpi.Win.Allocate_shared(LINE + 2 * stride, comm=host)
        self._window.Lock_all()
        self._buffers: tuple[list[Tensor], list[Tensor]] = ([], [])  # each holds the message of every rank
        counters: list[memoryview] = []
        for rank in range(host.size):
            memory = memoryview(self._window.Shared_query(rank)[0]).cast("B")
            counters.append(memory[:8].cast("q"))
            for index, messages in enumerate(self._buffers):
                message = np.frombuffer(memory, dtype, self._numel, LINE + index * stride)
                messages.append(torch.from_numpy(message))
        # NumPy arrays: NumPy copies faster than torch, since it does not first fetch the memory that it overwrites.
        self._mine = [messages[host.rank].numpy() for messages in self._buffers]
        self._counter = counters.pop(host.rank)
        self._counters_of_others = counters
        self._count = self._counter[0] = 0
        self._tensor, self._waiting = like, False

    def fits(self, tensor: Tensor) -> bool:
        """Return True if `tensor` has the length and dtype of these messages."""
        return tensor.numel() == self._numel and tensor.dtype == self._dtype

    def post(self, tensor: Tensor) -> SharedSum:
        """Write this rank's next message `tensor` [n] to shared memory; `wait` will overwrite `tensor` with the sum."""
        self._count += 1
        np.copyto(self._mine[self._count % 2], tensor.detach().numpy())
        self._window.Sync()  # other ranks must see the message before they see the counter
        self._counter[0] = self._count
        self._tensor, self._waiting = tensor, True
        return self

    def wait(self) -> Tensor:
        """Wait until all ranks have posted, then overwrite the posted tensor with the sum and return it."""
        tensor = self._tensor
        if not self._waiting:
            return tensor
        self._waiting = False
        for counter in self._counters_of_others:
            while counter[0] < self._count:
                os.sched_yield()
        self._window.Sync()
        first, second, *others = self._buffers[self._count % 2]
        torch.add(first, second, out=tensor)
        for message in others:
            tensor.add_(message)
        return tensor

    def close(self) -> None:
        """Free the shared memory. All ranks must call this together."""
        self._buffers, self._mine, self._counters_of_others = ([], []), [], []
        self._window.Unlock_all()
        self._window.Free()
