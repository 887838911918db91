"""Horovod: the default under horovodrun, mpirun and srun. The only file that imports it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

from torch import Tensor

from hvdqn.comm.base import Comm, LaunchError
from hvdqn.comm.mpi import start_mpi
from hvdqn.comm.tensors import as_bytes, check_reducible

T = TypeVar("T")


def _import_horovod() -> Any:
    try:
        import horovod.torch as hvd
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        raise LaunchError(
            f"Horovod cannot be used ({reason}); run launch/install_horovod.sh, or start with torchrun"
        ) from None
    if not hasattr(hvd, "init"):  # its import only prints what is wrong with its library
        raise LaunchError(
            "Horovod was built for another torch than the one installed; run launch/install_horovod.sh again"
        )
    return hvd


@dataclass(slots=True)
class _Pending:
    hvd: Any
    handle: int
    tensor: Tensor

    def wait(self) -> Tensor:
        # Spins in C++ without the GIL, so that a watchdog thread can run.
        self.hvd.synchronize(self.handle)
        return self.tensor


class HorovodComm(Comm):
    """All ranks of the job, over Horovod's MPI or Gloo controller.

    Horovod reads its settings (HOROVOD_CYCLE_TIME, HOROVOD_STALL_CHECK_TIME_SECONDS, ...) from the
    environment while this is constructed: whoever wants other defaults sets them before.
    """

    name = "horovod"

    def __init__(self, device: str, over_mpi: bool) -> None:
        # MPI must be up before Horovod: then Horovod reuses it and leaves finalizing it to mpi4py.
        self._mpi: Any = start_mpi() if over_mpi and find_spec("mpi4py") else None
        self._hvd: Any = _import_horovod()
        if device.startswith("cuda") and not self._hvd.nccl_built():
            raise LaunchError(
                "Horovod was built without NCCL, which --device cuda needs; run launch/install_horovod.sh where "
                "nvcc and NCCL are found, or choose --comm mpi, or start with torchrun"
            )
        self._hvd.init()
        hvd = self._hvd
        super().__init__(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())

    def allreduce_mean_async(self, tensor: Tensor, name: str) -> _Pending:
        """See `Comm`."""
        check_reducible(tensor)
        handle = self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Average)
        return _Pending(self._hvd, handle, tensor)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        """See `Comm`."""
        if tensor.numel():
            self._hvd.broadcast_(as_bytes(tensor), root, name="hvdqn.broadcast")

    def broadcast_object(self, obj: T, root: int = 0) -> T:
        """See `Comm`."""
        received: T = self._hvd.broadcast_object(obj, root, name="hvdqn.broadcast_object")
        return received

    def all_gather_object(self, obj: T) -> list[T]:
        """See `Comm`."""
        gathered: list[T] = self._hvd.allgather_object(obj, name="hvdqn.all_gather_object")
        return gathered

    def barrier(self) -> None:
        """See `Comm`."""
        self._hvd.barrier()

    def _end_peers(self, code: int) -> None:
        if self._mpi is not None:
            # srun, unlike mpirun and horovodrun, goes on when one rank exits, unless it is told otherwise.
            self._mpi.COMM_WORLD.Abort(code)

    def close(self) -> None:
        """See `Comm`."""
        self.barrier()  # the first rank to shut Horovod down fails whatever the others still have under way
        self._hvd.shutdown()
