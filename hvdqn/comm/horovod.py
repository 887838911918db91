"""Connect ranks through Horovod, the default engine under horovodrun, mpirun and srun."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

from torch import Tensor

from hvdqn.comm.base import Comm
from hvdqn.comm.mpi import start_mpi
from hvdqn.comm.tensors import as_bytes, check_reducible
from hvdqn.errors import LaunchError

T = TypeVar("T")


def import_horovod() -> Any:
    """Return the module `horovod.torch`.

    Raises:
        LaunchError: Horovod is not installed, or was built for another version of torch.
    """
    try:
        import horovod.torch as hvd
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        raise LaunchError(
            f"Horovod cannot be used ({reason}); run launch/install_horovod.sh, or start with torchrun"
        ) from None
    if not hasattr(hvd, "init"):  # if its library does not load, the import prints why and succeeds
        raise LaunchError(
            "Horovod was built for another torch than the one installed; run launch/install_horovod.sh again"
        )
    return hvd


# How long a rank sleeps between two checks whether an allreduce over Gloo is complete.
PAUSE_SECONDS = 5e-5


@dataclass(slots=True)
class _Pending:
    """An allreduce in progress. If `pause`, `wait` sleeps between checks and leaves its core to other threads."""

    hvd: Any
    handle: int
    tensor: Tensor
    pause: bool

    def wait(self) -> Tensor:
        """Wait for the sum over ranks, and return the tensor, which then holds it."""
        if self.pause:
            while not self.hvd.poll(self.handle):
                time.sleep(PAUSE_SECONDS)
            self.pause = False  # `synchronize` below removes the handle, so a second `wait` must not poll it
        # Horovod waits in C++ without holding the GIL, so that the watchdog thread can run.
        self.hvd.synchronize(self.handle)
        return self.tensor


class HorovodComm(Comm):
    """Connects all ranks of the job through Horovod, which coordinates them over MPI or Gloo.

    Horovod reads its settings (HOROVOD_CYCLE_TIME, HOROVOD_STALL_CHECK_TIME_SECONDS, ...) from the environment when
    this object is created. Over MPI, the constructor sets two variables unless they are already set:

    - OMPI_MCA_mpi_yield_when_idle=1: waiting threads yield. Each rank has two threads, which would compete where the
      rank has only one core.
    - HOROVOD_CYCLE_TIME=0, if all ranks are on one host: Horovod looks for tensors continuously. Its own 1 ms is longer
      than a whole update of an MLP.

    Over Gloo, separate threads serve the sockets and need a core. If a host has more ranks than cores, or
    HVDQN_SLEEP_WHEN_WAITING=1 is set, a waiting rank sleeps between checks and leaves its core to them. That is faster
    only where cores are short.

    Args:
        device: the device of the tensors to reduce.
        over_mpi: whether the launcher starts ranks through MPI, not through Gloo.
    """

    name = "horovod"
    ranks_may_share_a_gpu = False  # NCCL needs one GPU per rank

    def __init__(self, device: str, over_mpi: bool) -> None:
        self._mpi: Any = None
        if over_mpi:
            os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        if over_mpi and find_spec("mpi4py"):
            # Horovod uses an MPI that is already started, and leaves it to mpi4py to finalize it.
            self._mpi = start_mpi()
            world = self._mpi.COMM_WORLD
            host = world.Split_type(self._mpi.COMM_TYPE_SHARED)
            if host.size == world.size:
                os.environ.setdefault("HOROVOD_CYCLE_TIME", "0")
            host.Free()
        self._hvd: Any = import_horovod()
        if device.startswith("cuda") and not self._hvd.nccl_built():
            raise LaunchError(
                "Horovod was built without NCCL, which --device cuda needs; run launch/install_horovod.sh --gpu where "
                "nvcc and NCCL are found, or choose --comm mpi, or start with torchrun"
            )
        self._hvd.init()
        hvd = self._hvd
        super().__init__(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())
        # Horovod's launcher does not bind ranks to cores: all ranks of the host share the cores that this one may use.
        crowded = hvd.local_size() > len(os.sched_getaffinity(0))
        self._sleeps = not over_mpi and (crowded or os.environ.get("HVDQN_SLEEP_WHEN_WAITING") == "1")

    def allreduce_sum_async(self, tensor: Tensor, name: str) -> _Pending:
        """Start to sum `tensor` over all ranks, in place; see `Comm.allreduce_sum_async`."""
        check_reducible(tensor)
        handle = self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum)
        return _Pending(self._hvd, handle, tensor, pause=self._sleeps and not tensor.is_cuda)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite `tensor` with that of rank `root`."""
        if tensor.numel():
            self._hvd.broadcast_(as_bytes(tensor), root, name="hvdqn.broadcast")

    def broadcast_object(self, obj: T, root: int = 0) -> T:
        """Return the object that rank `root` passed, on every rank."""
        received: T = self._hvd.broadcast_object(obj, root, name="hvdqn.broadcast_object")
        return received

    def all_gather_object(self, obj: T) -> list[T]:
        """Return the objects that all ranks passed, ordered by rank."""
        gathered: list[T] = self._hvd.allgather_object(obj, name="hvdqn.all_gather_object")
        return gathered

    def barrier(self) -> None:
        """Return when every rank has called this."""
        self._hvd.barrier()

    def _end_peers(self, code: int) -> None:
        if self._mpi is not None:
            # Unlike mpirun and horovodrun, srun by default lets the other ranks run on when one exits.
            self._mpi.COMM_WORLD.Abort(code)

    def close(self) -> None:
        """Disconnect, together with all other ranks; no collective may follow."""
        self.barrier()  # collectives that other ranks have in progress would fail when this one shuts Horovod down
        self._hvd.shutdown()
