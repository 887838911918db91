"""The few collectives a rank needs, over whichever engine the launcher allows.

comm = connect("auto")
pending = comm.allreduce_sum_async(gradient, "gradient")
...
pending.wait()
comm.close()
"""

from __future__ import annotations

import os

from hvdqn.comm import auto
from hvdqn.comm.auto import CHOICES, launcher_rank, launcher_size
from hvdqn.comm.base import Comm, Handle
from hvdqn.errors import LaunchError

__all__ = ["CHOICES", "Comm", "Handle", "LaunchError", "connect", "launcher_rank", "launcher_size"]


def connect(choice: str, device: str = "cpu") -> Comm:
    """Connect this process to the other ranks of its job.

    Args:
        choice: auto, local, horovod, torch or mpi. auto follows the launcher and says why in `Comm.why`.
        device: where the tensors to reduce will lie, as torch spells it ("cpu", "cuda", "cuda:1").

    Raises:
        LaunchError: the engine cannot work as this process was started, or it connected another number of
            ranks than the launcher promised: never a silent world of one.
    """
    chosen = auto.choose(choice)
    comm = _start(chosen, device)
    comm.why = chosen.why
    auto.check_size(chosen.engine, comm.size, auto.promises(os.environ))
    return comm


def _start(chosen: auto.Choice, device: str) -> Comm:
    # Imported here: each engine brings a library that the others' users may not have, and that costs time.
    promise = chosen.promise
    if chosen.engine == "horovod":
        from hvdqn.comm.horovod import HorovodComm

        return HorovodComm(device, over_mpi=promise is not None and promise.starts_mpi)
    if chosen.engine == "mpi":
        from hvdqn.comm.mpi import MpiComm

        return MpiComm()
    if chosen.engine == "torch":
        from hvdqn.comm.torch import TorchComm

        assert promise is not None, "choose() has refused this"
        return TorchComm(device, promise.rank, promise.size)
    from hvdqn.comm.local import LocalComm

    return LocalComm()
