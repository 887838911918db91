"""Define the interface of all engines (Horovod, MPI, torch.distributed): the collectives that ranks need."""

from __future__ import annotations

import os
import socket
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NoReturn, Protocol, TypeVar

from hvdqn.comm.processes import kill_descendants

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Handle(Protocol):
    """An allreduce in progress, as `Comm.allreduce_sum_async` returns it."""

    def wait(self) -> Tensor:
        """Wait for the sum over all ranks and return it: the tensor that was passed, overwritten in place."""
        ...


class Comm(ABC):
    """Connects the ranks of one job. All ranks must call the same collectives in the same order.

    Tensors are reduced and broadcast in place and must be contiguous. If a rank fails while other ranks may be waiting
    in a collective, it must call `abort`: the other ranks would wait forever for a rank that only returns.

    Attributes:
        name: the engine's name, as for `--comm`.
        why: one line that says why this engine was chosen.
        rank: number of this process, 0 <= rank < size.
        size: number of processes in the job.
        local_rank: index of this process among those on its host.
        local_size: number of processes on this host.
        ranks_may_share_a_gpu: whether the engine can reduce tensors of two ranks that use the same GPU.
    """

    name: ClassVar[str]
    ranks_may_share_a_gpu: ClassVar[bool] = True
    why: str = ""

    def __init__(self, rank: int, size: int, local_rank: int, local_size: int) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.local_size = local_size

    @abstractmethod
    def allreduce_sum_async(self, tensor: Tensor, name: str) -> Handle:
        """Start to sum `tensor` over all ranks, in place. Do not read or write it before the handle's `wait` returns.

        All ranks get the same bits, and equal inputs give equal bits in every run of the same size. Several sums with
        different names may be in progress; wait for them in the order in which they were started.

        Args:
            tensor: a flat tensor [n], float32 or float64, with the same n and dtype on every rank.
            name: a name for this kind of sum, the same on every rank and in every update (Horovod uses it as a key).
        """

    @abstractmethod
    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite `tensor` with that of rank `root`. It may have any shape and dtype, the same on every rank."""

    @abstractmethod
    def broadcast_object(self, obj: T, root: int = 0) -> T:
        """Return the object that rank `root` passed, on every rank. The engine pickles it to send it."""

    @abstractmethod
    def all_gather_object(self, obj: T) -> list[T]:
        """Return the objects that all ranks passed, ordered by rank. The engine pickles them to send them."""

    def cores_of_host(self) -> list[set[int]]:
        """Return, for each rank on this host, the CPU cores that it may use. All ranks must call this together."""
        host, mine = socket.gethostname(), os.sched_getaffinity(0)
        return [cores for name, cores in self.all_gather_object((host, mine)) if name == host]

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has called this."""

    def abort(self, code: int) -> NoReturn:
        """End the whole job at once with exit code `code` (not 0), without waiting for other ranks. Thread-safe.

        A normal exit would hang, because the engines' exit hooks wait for ranks that no longer answer. This kills also
        the processes that environments have started; one that hangs would else stay behind.
        """
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        kill_descendants()
        self._end_peers(code)
        os._exit(code)

    # Engines whose launchers end the other ranks when one exits with a code that is not 0 need not override this.
    def _end_peers(self, code: int) -> None:  # noqa: B027
        """End the other ranks of the job, if the launcher does not do so when this process exits."""

    @abstractmethod
    def close(self) -> None:
        """Disconnect, together with all other ranks. No collective may follow.

        Call this last: launchers end the other ranks when one has exited with a code that is not 0.
        """
