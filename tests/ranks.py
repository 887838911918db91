"""Several ranks in one process, each a thread: `run_ranks(3, body)` calls `body(comm)` on each of them."""

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


class Meeting:
    """Where the ranks lay down what they have, and read what the others had."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_SECONDS)
        self.laid: list[Any] = [None] * size
        self._lock, self._successor = threading.Lock(), None

    def successor(self, size: int) -> Meeting:
        """The one that some of the ranks go on with."""
        with self._lock:
            self._successor = self._successor or Meeting(size)
            return self._successor

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
        return self.tensor.copy_(torch.stack(self.comm.all_gather_object(self.sent)).sum(dim=0))


@dataclass
class Request:
    wait: Callable[[], object] = lambda: None
    has_come: Callable[[], bool] = lambda: True

    def Wait(self) -> None:  # noqa: N802
        self.wait()


class Channel:
    """Messages between two ranks, as mpi4py sends them."""

    def __init__(self, rank: int, boxes: list[dict[int, deque[bytes]]], meeting: Meeting) -> None:
        self.rank, self.boxes, self.meeting = rank, boxes, meeting

    def Isend(self, buffer: np.ndarray, to: int) -> Request:  # noqa: N802
        self.boxes[to][self.rank].append(buffer.tobytes())
        return Request()

    def Irecv(self, buffer: np.ndarray, source: int) -> Request:  # noqa: N802
        return Request(lambda: self.receive(buffer, source), lambda: bool(self.boxes[self.rank][source]))

    def receive(self, buffer: np.ndarray, source: int) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not self.boxes[self.rank][source]:
            if self.meeting.barrier.broken:
                raise threading.BrokenBarrierError
            assert time.monotonic() < deadline, f"rank {self.rank} waited in vain for rank {source}"
            time.sleep(1e-4)
        message = self.boxes[self.rank][source].popleft()
        buffer[: len(message)] = np.frombuffer(message, np.uint8)


class ThreadComm(Comm):
    """One of the ranks; it remembers the names of its allreduces. Messages between two go as in `MpiComm`."""

    name = "mpi"

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size, rank, size)
        self.meeting, self.names = meeting, list[str]()

    def duplicate(self) -> Channel:
        mine = [{rank: deque[bytes]() for rank in range(self.size)} for _ in range(self.size)]
        return Channel(self.rank, self.broadcast_object(mine), self.meeting)

    def first_done(self, requests: Sequence[Request]) -> int | None:
        for index, request in enumerate(requests):
            if request.has_come():
                request.Wait()
                return index
        return None

    def keep(self, ranks: Sequence[int]) -> None:
        others: Meeting = self.meeting.successor(len(ranks))
        self.rank, self.size, self.meeting = ranks.index(self.rank), len(ranks), others

    def abort(self, code: int) -> NoReturn:
        self.meeting.barrier.abort()
        raise SystemExit(code)

    def allreduce_sum_async(self, tensor: Tensor, name: str) -> Pending:
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
