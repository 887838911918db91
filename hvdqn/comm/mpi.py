"""Plain MPI through mpi4py: no negotiation and no helper threads, the cheapest engine for small networks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvdqn.comm.base import Comm, Handle
from hvdqn.comm.shared import SharedSum
from hvdqn.comm.tensors import as_bytes, check_reducible
from hvdqn.errors import LaunchError

T = TypeVar("T")


def start_mpi() -> ModuleType:
    """Import `mpi4py.MPI`, which starts MPI and will finalize it at exit.

    Raises:
        LaunchError: mpi4py is missing or finds no MPI library.
    """
    # An Open MPI from a wheel was built for another folder. Its own mpirun tells the ranks where it lies now;
    # srun does not, and MPI_Init would end the process.
    if (Path(sys.prefix) / "lib" / "libmpi.so").exists():
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise LaunchError(
            f"mpi4py cannot be used ({reason}); pip install 'hvdqn[mpi]' beside the MPI that starts the ranks"
        ) from None
    return MPI


class _Staged:
    """The pinned host copy of one CUDA tensor, kept from update to update."""

    def __init__(self, tensor: Tensor) -> None:
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def fetch(self, tensor: Tensor) -> None:
        self.host.copy_(tensor, non_blocking=True)
        self._copied.record()

    def arrived(self) -> Tensor:
        self._copied.synchronize()  # the CPU waits for the GPU here
        return self.host


class _Pending:
    """A sum that is taken when it is waited for.

    Open MPI moves a nonblocking collective on only inside other MPI calls, and there are none while the
    environments step: MPI_Iallreduce hid nothing and cost 1.4 to 2.4 times the blocking call (2 ranks on one
    host, 1.7e4 to 1.7e6 floats).
    """

    __slots__ = ("_comm", "_staged", "_tensor")

    def __init__(self, comm: MpiComm, tensor: Tensor, staged: _Staged | None = None) -> None:
        self._comm: MpiComm | None = comm
        self._tensor, self._staged = tensor, staged

    def wait(self) -> Tensor:
        comm, self._comm = self._comm, None
        if comm is None:  # waited for before
            return self._tensor
        if self._staged is None:
            comm.sum_(self._tensor)
        else:
            self._tensor.copy_(comm.sum_(self._staged.arrived()), non_blocking=True)
        return self._tensor


# Bytes of all ranks' messages up to which they are summed up from shared memory. On two ranks that takes as long as
# MPI_Allreduce there, and longer beyond; but nobody waits until the others have stepped their environments.
SHARED_UP_TO = 1 << 20


class MpiComm(Comm):
    """The ranks of MPI_COMM_WORLD.

    CUDA tensors travel through pinned host memory, short messages of ranks of one host through memory that they share.
    """

    name = "mpi"

    def __init__(self) -> None:
        self._mpi: Any = start_mpi()
        # A communicator of its own: no message of another user of MPI in this process can be taken for ours.
        self._world: Any = self._mpi.COMM_WORLD.Dup()
        host = self._world.Split_type(self._mpi.COMM_TYPE_SHARED)
        super().__init__(self._world.rank, self._world.size, host.rank, host.size)
        self._host: Any = host if 1 < host.size == self._world.size else None
        """All ranks, if they share memory."""
        if self._host is None:
            host.Free()
        self._shared: dict[str, SharedSum] = {}
        self._staged: dict[str, _Staged] = {}

    def allreduce_sum_async(self, tensor: Tensor, name: str) -> Handle:
        """See `Comm`."""
        check_reducible(tensor)
        if not tensor.is_cuda:
            shared = self._sharing(tensor, name)
            return _Pending(self, tensor) if shared is None else shared.post(tensor)
        staged = self._staged.get(name)
        if staged is None or staged.host.shape != tensor.shape or staged.host.dtype != tensor.dtype:
            staged = self._staged[name] = _Staged(tensor)
        staged.fetch(tensor)
        return _Pending(self, tensor, staged)

    def _sharing(self, tensor: Tensor, name: str) -> SharedSum | None:
        """What is shared for messages of this name; None: they are not for shared memory."""
        if self._host is None:
            return None
        shared = self._shared.get(name)
        if shared is not None and shared.fits(tensor):
            return shared
        if self.size * tensor.nbytes > SHARED_UP_TO:
            return None
        if shared is not None:
            self._shared.pop(name).close()
        try:
            shared = SharedSum(self._mpi, self._host, tensor)
        except self._mpi.Exception:  # no room in the memory that a container may share, say
            shared = None
        everywhere = all(self._host.allgather(shared is not None))
        if shared is None or not everywhere:
            self._host = None
            return None
        self._shared[name] = shared
        return shared

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a host tensor by its sum over all ranks, now, and return it."""
        self._world.Allreduce(self._mpi.IN_PLACE, tensor.detach().numpy())
        return tensor

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        """See `Comm`."""
        sent = as_bytes(tensor)
        host = sent.cpu()  # the same memory where the tensor is on the host
        self._world.Bcast(host.numpy(), root)
        if sent.is_cuda:
            sent.copy_(host)

    def broadcast_object(self, obj: T, root: int = 0) -> T:
        """See `Comm`."""
        received: T = self._world.bcast(obj, root)
        return received

    def all_gather_object(self, obj: T) -> list[T]:
        """See `Comm`."""
        gathered: list[T] = self._world.allgather(obj)
        return gathered

    def barrier(self) -> None:
        """See `Comm`."""
        self._world.Barrier()

    def duplicate(self) -> Any:
        """A communicator of its own between all ranks, for messages between two of them; a collective call."""
        return self._world.Dup()

    def first_done(self, requests: Sequence[Any]) -> int | None:
        """Which of these messages has come, by its place among them; None if none has."""
        index, done = self._mpi.Request.Testany(requests)
        return index if done else None

    def keep(self, ranks: Sequence[int]) -> None:
        """Go on without the other ranks, which may be dead; called by all that stay, who are numbered anew."""
        self._world = self._world.Create_group(self._world.group.Incl(ranks))
        self._host = None  # what is shared with the dead is not given back
        self.rank, self.size = self._world.rank, self._world.size

    def _end_peers(self, code: int) -> None:
        # srun, unlike mpirun, lets the others go on when one rank exits.
        self._mpi.COMM_WORLD.Abort(code)

    def close(self) -> None:
        """See `Comm`."""
        if self._host is not None:
            for shared in self._shared.values():
                shared.close()
            self._host.Free()
        self._world.Free()
