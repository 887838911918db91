"""Connect ranks, and offer the collectives that they need over an engine: Horovod, MPI or torch.distributed.

comm = connect("auto")
handle = comm.allreduce_sum_async(gradient, "gradient")
...
handle.wait()
comm.close()
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from hvdqn.comm.auto import (
    CHOICES,
    LauncherInfo,
    check_size,
    choose_engine,
    detect_launchers,
    launcher_rank,
    launcher_size,
)
from hvdqn.comm.base import Comm, Handle
from hvdqn.comm.local import LocalComm
from hvdqn.comm.processes import kill_descendants
from hvdqn.errors import LaunchError

__all__ = [
    "CHOICES",
    "Comm",
    "Handle",
    "LaunchError",
    "LocalComm",
    "connect",
    "kill_descendants",
    "launcher_rank",
    "launcher_size",
]


def connect(choice: str, device: str = "cpu", stall_timeout: float = 600.0) -> Comm:
    """Connect this process to the other ranks of its job.

    Args:
        choice: auto, local, horovod, torch or mpi. auto picks the engine that fits the launcher; `Comm.why` says why.
        device: the device of the tensors to reduce, as torch names it ("cpu", "cuda", "cuda:1").
        stall_timeout: seconds after which the watchdog ends a job that stalls; 0: never. An engine's own timeout is
            always longer.

    Raises:
        LaunchError: the engine does not work under this launcher, or it connects another number of ranks than
            the launcher started.
    """
    chosen = choose_engine(choice)
    comm = _CONNECT[chosen.engine](device, chosen.launcher, stall_timeout)
    comm.why = chosen.why
    check_size(chosen.engine, comm.size, detect_launchers(os.environ))
    return comm


# Each engine is imported only when it is used: its library may not be installed, and importing it takes time.


def _connect_local(device: str, launcher: LauncherInfo | None, stall_timeout: float) -> Comm:
    return LocalComm()


def _connect_horovod(device: str, launcher: LauncherInfo | None, stall_timeout: float) -> Comm:
    from hvdqn.comm.horovod import HorovodComm

    return HorovodComm(device, over_mpi=launcher is not None and launcher.starts_mpi)


def _connect_torch(device: str, launcher: LauncherInfo | None, stall_timeout: float) -> Comm:
    from hvdqn.comm.torch import TorchComm

    assert launcher is not None, "choose_engine raises when no launcher is found"
    return TorchComm(device, launcher.rank, launcher.size, stall_timeout)


def _connect_mpi(device: str, launcher: LauncherInfo | None, stall_timeout: float) -> Comm:
    from hvdqn.comm.mpi import MpiComm

    return MpiComm()


# The function that connects each engine. It needs an entry for every engine in `CHOICES`.
_CONNECT: Mapping[str, Callable[[str, LauncherInfo | None, float], Comm]] = {
    "local": _connect_local,
    "horovod": _connect_horovod,
    "torch": _connect_torch,
    "mpi": _connect_mpi,
}
