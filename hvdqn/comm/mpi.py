"""Connect ranks through MPI, by mpi4py.

Horovod negotiates each allreduce in a helper thread. This engine does not, so it suits small networks best.
"""

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
    """Import and return `mpi4py.MPI`, which starts MPI and finalizes it at exit.

    Raises:
        LaunchError: mpi4py is missing or finds no MPI library.
    """
    # An Open MPI that pip installed was built for another folder, and needs OPAL_PREFIX to find its files. Its mpirun
    # sets the variable. srun does not, and MPI_Init would end the process.
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


class _HostCopy:
    """A buffer in pinned host memory for copies of CUDA tensors of one shape, used again in every update."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def start_copy(self, tensor: Tensor) -> None:
        """Start to copy `tensor` from the GPU into the buffer; return at once."""
        self.tensor.copy_(tensor, non_blocking=True)
        self._copied.record()

    def wait(self) -> Tensor:
        """Block until the copy is complete, and return the buffer."""
        self._copied.synchronize()
        return self.tensor


class _Pending:
    """The handle of an allreduce that `wait` computes, with one blocking call.

    Open MPI advances a nonblocking collective only inside other MPI calls, and there are none while the environments
    step. So MPI_Iallreduce would overlap nothing, and it is slower than the blocking call.
    """

    __slots__ = ("_comm", "_host_copy", "_tensor")

    def __init__(self, comm: MpiComm, tensor: Tensor, host_copy: _HostCopy | None = None) -> None:
        self._comm: MpiComm | None = comm
        self._tensor, self._host_copy = tensor, host_copy

    def wait(self) -> Tensor:
        """Compute the sum over ranks, and return the tensor, which then holds it."""
        comm, self._comm = self._comm, None
        if comm is None:  # `wait` was called before
            return self._tensor
        if self._host_copy is None:
            comm.sum_(self._tensor)
        else:
            self._tensor.copy_(comm.sum_(self._host_copy.wait()), non_blocking=True)
        return self._tensor


# If the messages of all ranks together have at most this many bytes, they are summed through shared memory. Larger ones
# are faster with MPI_Allreduce.
SHARED_UP_TO = 1 << 20


class MpiComm(Comm):
    """Connects the ranks of MPI_COMM_WORLD.

    It copies CUDA tensors to pinned host memory and sums them there. If all ranks are on one host, it sums short
    messages through shared memory.
    """

    name = "mpi"

    def __init__(self) -> None:
        self._mpi: Any = start_mpi()
        # On a communicator of its own, messages cannot be mistaken for those of Horovod, which may use MPI too.
        self._world: Any = self._mpi.COMM_WORLD.Dup()
        host = self._world.Split_type(self._mpi.COMM_TYPE_SHARED)
        super().__init__(self._world.rank, self._world.size, host.rank, host.size)
        self._host: Any = host if 1 < host.size == self._world.size else None
        """A communicator of all ranks, if they are on one host and share memory; else None."""
        if self._host is None:
            host.Free()
        self._shared: dict[str, SharedSum] = {}
        self._host_copies: dict[str, _HostCopy] = {}

    def allreduce_sum_async(self, tensor: Tensor, name: str) -> Handle:
        """Start to sum `tensor` over all ranks, in place; see `Comm.allreduce_sum_async`."""
        check_reducible(tensor)
        if not tensor.is_cuda:
            shared = self._shared_sum(tensor, name)
            return _Pending(self, tensor) if shared is None else shared.post(tensor)
        copy = self._host_copies.get(name)
        if copy is None or copy.tensor.shape != tensor.shape or copy.tensor.dtype != tensor.dtype:
            copy = self._host_copies[name] = _HostCopy(tensor)
        copy.start_copy(tensor)
        return _Pending(self, tensor, copy)

    def _shared_sum(self, tensor: Tensor, name: str) -> SharedSum | None:
        """Return the object that sums tensors of this name through shared memory; None: MPI has to sum them."""
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
        except self._mpi.Exception:  # for example because a container limits its shared memory
            shared = None
        all_have_it = all(self._host.allgather(shared is not None))
        if shared is None or not all_have_it:
            self._host = None
            return None
        self._shared[name] = shared
        return shared

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor in host memory over all ranks, in place, and return it; blocks until the sum is complete."""
        self._world.Allreduce(self._mpi.IN_PLACE, tensor.detach().numpy())
        return tensor

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite `tensor` with that of rank `root`."""
        view = as_bytes(tensor)
        host = view.cpu()  # no copy if the tensor is on the host
        self._world.Bcast(host.numpy(), root)
        if view.is_cuda:
            view.copy_(host)

    def broadcast_object(self, obj: T, root: int = 0) -> T:
        """Return the object that rank `root` passed, on every rank."""
        received: T = self._world.bcast(obj, root)
        return received

    def all_gather_object(self, obj: T) -> list[T]:
        """Return the objects that all ranks passed, ordered by rank."""
        gathered: list[T] = self._world.allgather(obj)
        return gathered

    def barrier(self) -> None:
        """Return when every rank has called this."""
        self._world.Barrier()

    def duplicate(self) -> Any:
        """Return a new communicator of all ranks, for messages from rank to rank. All ranks must call this together."""
        return self._world.Dup()

    def first_done(self, requests: Sequence[Any]) -> int | None:
        """Return the index of a complete MPI request among these, or None; does not block."""
        index, done = self._mpi.Request.Testany(requests)
        return index if done else None

    def keep(self, ranks: Sequence[int]) -> None:
        """Shrink the job to these ranks, numbered anew in this order; set `rank` and `size` accordingly.

        All `ranks` must call it; the others may be dead.
        """
        self._world = self._world.Create_group(self._world.group.Incl(ranks))
        self._host = None  # freeing the shared memory would need the ranks that are gone
        self.rank, self.size = self._world.rank, self._world.size

    def _end_peers(self, code: int) -> None:
        # Unlike mpirun, srun by default lets the other ranks run on when one exits.
        self._mpi.COMM_WORLD.Abort(code)

    def close(self) -> None:
        """Disconnect, together with all other ranks; no collective may follow."""
        if self._host is not None:
            for shared in self._shared.values():
                shared.close()
            self._host.Free()
        self._world.Free()
