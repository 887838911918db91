"""Means between the ranks of one host, through memory that all of them see (MPI 3, section 11.2.3).

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


class SharedMean:
    """The messages of one name, one after the other.

    Two buffers take turns. Whoever writes message k + 2 has had message k + 1 from all, who had read message k by then.
    Making one is a collective call; none may post before all have made theirs.

    Args:
        mpi: mpi4py's module.
        host: a communicator of ranks that share memory.
        like: a message: float, [n].
    """

    def __init__(self, mpi: Any, host: Any, like: Tensor) -> None:
        self._rank = host.rank
        numbers = like.numel()
        stride = -(-numbers * like.element_size() // LINE) * LINE
        self._window = mpi.Win.Allocate_shared(LINE + 2 * stride, comm=host)
        self._window.Lock_all()
        self._slots: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._posted: list[memoryview] = []
        dtype = like.detach().numpy().dtype
        for rank in range(host.size):
            memory = memoryview(self._window.Shared_query(rank)[0]).cast("B")
            self._posted.append(memory[:8].cast("q"))
            for turn, slots in enumerate(self._slots):
                begin = LINE + turn * stride
                slots.append(torch.from_numpy(np.frombuffer(memory, dtype, numbers, begin)))
        self._others = [posted for rank, posted in enumerate(self._posted) if rank != self._rank]
        self._count = 0
        self._posted[self._rank][0] = 0

    def post(self, tensor: Tensor) -> None:
        """Let the others have this rank's next message. [n]."""
        self._count += 1
        self._slots[self._count % 2][self._rank].copy_(tensor)
        self._window.Sync()  # the message before the number
        self._posted[self._rank][0] = self._count

    def mean_(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` [n] by the mean of what all ranks posted, once they have."""
        for posted in self._others:
            while posted[0] < self._count:
                os.sched_yield()
        self._window.Sync()
        first, second, *others = self._slots[self._count % 2]
        torch.add(first, second, out=tensor)
        for message in others:
            tensor.add_(message)
        return tensor.mul_(1.0 / len(self._posted))

    def close(self) -> None:
        """Give the memory back; a collective call."""
        self._slots, self._posted, self._others = ([], []), [], []
        self._window.Unlock_all()
        self._window.Free()
