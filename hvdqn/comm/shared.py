"""Sums over the ranks of one host, through memory that all of them see (MPI 3, section 11.2.3).

A rank writes what it brings the moment it has it, and says so with a number; whoever waits later finds that of the
others there and sums up, in the order of ranks, so that all have the same bits. Nothing has to be moved on meanwhile.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

LINE = 64  # bytes of a cache line: numbers that different ranks write share none


class SharedSum:
    """The messages of one name, one after the other; a handle of the one that was posted last.

    Two buffers take turns. Whoever writes message k + 2 has had message k + 1 from all, who had read message k by then.
    Making one is a collective call; none may post before all have made theirs.

    Args:
        mpi: mpi4py's module.
        host: a communicator of ranks that share memory.
        like: a message: float, [n].
    """

    def __init__(self, mpi: Any, host: Any, like: Tensor) -> None:
        self._numbers, self._dtype, dtype = like.numel(), like.dtype, like.detach().numpy().dtype
        stride = -(-like.nbytes // LINE) * LINE
        self._window = mpi.Win.Allocate_shared(LINE + 2 * stride, comm=host)
        self._window.Lock_all()
        self._slots: tuple[list[Tensor], list[Tensor]] = ([], [])
        counters: list[memoryview] = []
        for rank in range(host.size):
            memory = memoryview(self._window.Shared_query(rank)[0]).cast("B")
            counters.append(memory[:8].cast("q"))
            for turn, slots in enumerate(self._slots):
                slot = np.frombuffer(memory, dtype, self._numbers, LINE + turn * stride)
                slots.append(torch.from_numpy(slot))
        # NumPy copies as the C library does, which does not fetch first what it overwrites: a third of torch's time.
        self._mine = [slots[host.rank].numpy() for slots in self._slots]
        self._counter = counters.pop(host.rank)
        self._counters_of_others = counters
        self._count = self._counter[0] = 0
        self._tensor, self._waiting = like, False

    def fits(self, tensor: Tensor) -> bool:
        """Whether it is as long as these messages, and of their type."""
        return tensor.numel() == self._numbers and tensor.dtype == self._dtype

    def post(self, tensor: Tensor) -> SharedSum:
        """Let the others have this rank's next message, [n], which `wait` will overwrite."""
        self._count += 1
        np.copyto(self._mine[self._count % 2], tensor.detach().numpy())
        self._window.Sync()  # the message before the number
        self._counter[0] = self._count
        self._tensor, self._waiting = tensor, True
        return self

    def wait(self) -> Tensor:
        """The message that was posted, overwritten by the sum of those of all ranks, once they have posted theirs."""
        tensor = self._tensor
        if not self._waiting:
            return tensor
        self._waiting = False
        for counter in self._counters_of_others:
            while counter[0] < self._count:
                os.sched_yield()
        self._window.Sync()
        first, second, *others = self._slots[self._count % 2]
        torch.add(first, second, out=tensor)
        for message in others:
            tensor.add_(message)
        return tensor

    def close(self) -> None:
        """Give the memory back; a collective call."""
        self._slots, self._mine, self._counters_of_others = ([], []), [], []
        self._window.Unlock_all()
        self._window.Free()
