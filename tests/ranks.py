"""Several ranks in one process, each a thread: `run_ranks(3, body)` calls `body(comm)` on each of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvdqn.comm import Comm

T = TypeVar("T")
TIMEOUT_SECONDS = 60.0


class Meeting:
    """Where the ranks lay down what they have, and read what the others had."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_SECONDS)
        self.laid: list[Any] = [None] * size

    def share(self, rank: int, value: Any) -> list[Any]:
        self.laid[rank] = value
        self.barrier.wait()
        read = list(self.laid)
        self.barrier.wait()
        return read


class Pending:
    def __init__(self, comm: ThreadComm, tensor: Tensor) -> None:
        self.comm, self.tensor, self.sent = comm, tensor, tensor.clone()

    def wait(self) -> Tensor:
        return self.tensor.copy_(torch.stack(self.comm.all_gather_object(self.sent)).mean(dim=0))


class ThreadComm(Comm):
    """One of the ranks; it remembers the names of its allreduces."""

    name = "local"

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size, rank, size)
        self.meeting, self.names = meeting, list[str]()

    def allreduce_mean_async(self, tensor: Tensor, name: str) -> Pending:
        self.names.append(name)
        return Pending(self, tensor)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        tensor.copy_(self.all_gather_object(tensor.clone())[root])

    def broadcast_object(self, obj: T, root: int = 0) -> T:
        return self.all_gather_object(obj)[root]

    def all_gather_object(self, obj: T) -> list[T]:
        return self.meeting.share(self.rank, obj)

    def barrier(self) -> None:
        self.meeting.barrier.wait()

    def close(self) -> None:
        pass


def run_ranks(size: int, body: Callable[[ThreadComm], T]) -> list[T]:
    """What `body` returned on each rank; the first error of any."""
    meeting = Meeting(size)

    def run(rank: int) -> T:
        try:
            return body(ThreadComm(rank, size, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception())]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
