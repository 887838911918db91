"""What a rank may ask of its peers: a handful of collectives, the same on every engine."""

from __future__ import annotations

import os
import socket
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NoReturn, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Handle(Protocol):
    """An allreduce under way."""

    def wait(self) -> Tensor:
        """Return the tensor summed up, the same object that was given, once every rank's part is in it."""
        ...


class Comm(ABC):
    """The ranks of one job. Every collective must be called by all ranks, in the same order.

    Tensors are reduced and broadcast in place and must be contiguous. A rank that fails in the middle
    leaves its peers inside a collective: call `abort`, never return, when an exception is not the user's.

    Attributes:
        name: the engine, as `--comm` names it.
        why: one line on how the engine was chosen.
        rank: this process, 0 <= rank < size.
        size: processes in the job.
        local_rank: this process among those of its host.
        local_size: processes on this host.
        ranks_may_share_a_gpu: whether it reduces tensors of two ranks on one GPU.
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
        """Begin to replace `tensor` by its sum over all ranks; leave it alone until `wait` returns.

        All ranks end with the same bits, and equal inputs give equal bits in every run of the same size.
        Several may be under way under different names; wait for them in the order they were launched.

        Args:
            tensor: [n] float32 or float64, the same n and dtype on every rank.
            name: the same on every rank and in every update (Horovod caches the agreement by name).
        """

    @abstractmethod
    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite `tensor` (any shape and dtype, the same on every rank) with rank `root`'s."""

    @abstractmethod
    def broadcast_object(self, obj: T, root: int = 0) -> T:
        """Return rank `root`'s `obj` on every rank; it travels pickled between the ranks of this job only."""

    @abstractmethod
    def all_gather_object(self, obj: T) -> list[T]:
        """Return every rank's `obj`, ordered by rank; pickled as in `broadcast_object`."""

    def cores_of_host(self) -> list[set[int]]:
        """The cores that each rank of this host may use; a collective call."""
        host, mine = socket.gethostname(), os.sched_getaffinity(0)
        return [cores for name, cores in self.all_gather_object((host, mine)) if name == host]

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called this."""

    def abort(self, code: int) -> NoReturn:
        """End the whole job now with `code` (not 0), without waiting for any peer. Any thread may call it.

        A normal exit would not do: exit hooks of the engines wait for peers that will never answer.
        """
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._end_peers(code)
        os._exit(code)

    # Engines whose launcher ends the other ranks when one exits non-zero have nothing to add.
    def _end_peers(self, code: int) -> None:  # noqa: B027
        """Tell the launcher to end the job, where it would not notice by this process's exit."""

    @abstractmethod
    def close(self) -> None:
        """Leave the job together with all other ranks; nothing can be sent afterwards.

        Do this last: launchers end the other ranks once one has exited with a code that is not 0.
        """
