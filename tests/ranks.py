"""Ranks that are threads of one process: `run_ranks(3, body)` calls `body(comm)` on each of them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from hvdqn.comm import Comm

T = TypeVar("T")
TIMEOUT_SECONDS = 60.0


class Shared:
    """The memory through which the ranks exchange objects."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_SECONDS)
        self.values: list[Any] = [None] * size
        self._lock, self._successor = threading.Lock(), None

    def successor(self, size: int) -> Shared:
        """Return the memory of those ranks that continue after `ThreadComm.keep`, the same for all of them."""
        with self._lock:
            self._successor = self._successor or Shared(size)
            return self._successor

    def all_gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        gathered = list(self.values)
        self.barrier.wait()
        return gathered


class Pending:
    def __init__(self, comm: ThreadComm, tensor: Tensor) -> None:
        self.comm, self.tensor, self.message = comm, tensor, tensor.clone()

    def wait(self) -> Tensor:
        return self.tensor.copy_(torch.stack(self.comm.all_gather_object(self.message)).sum(dim=0))


@dataclass
class Request:
    """A message in progress, as mpi4py's `Request`."""

    wait: Callable[[], object] = lambda: None
    is_complete: Callable[[], bool] = lambda: True

    def Wait(self) -> None:  # noqa: N802
        self.wait()


class Channel:
    """A communicator for messages from rank to rank, as mpi4py's `Comm`. queues[to][source] holds bytes."""

    def __init__(self, rank: int, queues: list[dict[int, deque[bytes]]], shared: Shared) -> None:
        self.rank, self.queues, self.shared = rank, queues, shared

    def Isend(self, buffer: np.ndarray, to: int) -> Request:  # noqa: N802
        self.queues[to][self.rank].append(buffer.tobytes())
        return Request()

    def Irecv(self, buffer: np.ndarray, source: int) -> Request:  # noqa: N802
        return Request(lambda: self.receive(buffer, source), lambda: bool(self.queues[self.rank][source]))

    def receive(self, buffer: np.ndarray, source: int) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not self.queues[self.rank][source]:
            if self.shared.barrier.broken:
                raise threading.BrokenBarrierError
            assert time.monotonic() < deadline, f"rank {self.rank} timed out waiting for rank {source}"
            time.sleep(1e-4)
        message = self.queues[self.rank][source].popleft()
        buffer[: len(message)] = np.frombuffer(message, np.uint8)


class ThreadComm(Comm):
    """One rank, with the methods of `MpiComm`. `names` lists the names of its allreduces."""

    name = "mpi"
    title = "threads"

    def __init__(self, rank: int, size: int, shared: Shared) -> None:
        super().__init__(rank, size, rank, size)
        self.shared, self.names = shared, list[str]()

    def duplicate(self) -> Channel:
        queues = [{rank: deque[bytes]() for rank in range(self.size)} for _ in range(self.size)]
        return Channel(self.rank, self.broadcast_object(queues), self.shared)

    def first_done(self, requests: Sequence[Request]) -> int | None:
        for index, request in enumerate(requests):
            if request.is_complete():
                request.Wait()
                return index
        return None

    def keep(self, ranks: Sequence[int]) -> None:
        shared = self.shared.successor(len(ranks))
        self.rank, self.size, self.shared = ranks.index(self.rank), len(ranks), shared

    def abort(self, code: int) -> NoReturn:
        self.shared.barrier.abort()
        raise SystemExit(code)

    def allreduce_sum_async(self, tensor: Tensor, name: str) -> Pending:
        self.names.append(name)
        return Pending(self, tensor)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        tensor.copy_(self.all_gather_object(tensor.clone())[root])

    def broadcast_object(self, obj: T, root: int = 0) -> T:
        return self.all_gather_object(obj)[root]

    def all_gather_object(self, obj: T) -> list[T]:
        return self.shared.all_gather(self.rank, obj)

    def split(self, color: int) -> ThreadComm:
        everyone = self.all_gather_object((color, Shared(self.size)))
        ranks = [rank for rank, (other, _) in enumerate(everyone) if other == color]
        shared = everyone[ranks[0]][1].successor(len(ranks))
        return ThreadComm(ranks.index(self.rank), len(ranks), shared)

    def barrier(self) -> None:
        self.shared.barrier.wait()

    def close(self) -> None:
        pass


def run_ranks(size: int, body: Callable[[ThreadComm], T]) -> list[T]:
    """Call `body` on each rank; return the results, or raise the first error."""
    shared = Shared(size)

    def run(rank: int) -> T:
        try:
            return body(ThreadComm(rank, size, shared))
        except BaseException:
            shared.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception())]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
