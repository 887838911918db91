"""Choose the device of each rank's networks, and the arguments of the engine that connects the ranks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from hvdqn.comm import Comm
from hvdqn.comm.gpus import assign_gpus, visible_gpus
from hvdqn.config import Config
from hvdqn.errors import UserError
from hvdqn.metrics import PhaseTimer


def engine_settings(config: Config) -> tuple[str, str, float, str]:
    """Return the arguments of `connect`: choice, device, stall_timeout and host_sum.

    Raises:
        UserError: see `device_kind`.
    """
    parallel = config.parallel
    # The server's ranks send messages to each other through plain MPI.
    host_sum = "off" if parallel.sync == "server" else parallel.host_sum
    return parallel.comm, device_kind(config), parallel.stall_timeout, host_sum


def device_kind(config: Config) -> str:
    """Return the kind of device that `--device` stands for on this host: "cpu" or "cuda".

    Raises:
        UserError: `--device cuda` is given, and torch sees no CUDA device.
    """
    wanted = config.parallel.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda, but torch sees no CUDA device here; use --device cpu or a CUDA build of torch"
        )
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def choose_device(config: Config, comm: Comm, timer: PhaseTimer) -> tuple[torch.device, int]:
    """Return this rank's device, and how many ranks use it. All ranks must call this together.

    Each rank gets a GPU of its own, as long as there are enough.

    Raises:
        UserError: on all ranks, if some see GPUs and others none, or if two would share one and the engine does not
            allow it.
    """
    seen = visible_gpus() if device_kind(config) == "cuda" else []
    with timer.during("comm"):
        assigned = assign_gpus(comm.all_gather_object(seen))
    if not any(assigned):
        return torch.device("cpu"), comm.local_size
    check_gpus(assigned, comm)
    mine = assigned[comm.rank]
    assert mine is not None
    device = torch.device("cuda", seen.index(mine))
    torch.cuda.set_device(device)
    # Autograd's thread warns of this once, and then creates the context by itself.
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
    return device, assigned.count(mine)


def check_gpus(assigned: Sequence[str | None], comm: Comm) -> None:
    """Check that every rank got a GPU, and that no two share one if the engine does not allow that.

    Args:
        assigned: the UUID of each rank's GPU, from `assign_gpus`.
        comm: the collectives over all ranks.

    Raises:
        UserError: some ranks see no GPU, or two share one and the engine does not allow it.
    """
    without = [str(rank) for rank, gpu in enumerate(assigned) if gpu is None]
    if without:
        raise UserError(
            f"no GPU is seen by rank {', '.join(without)}, and one is by others; start all where there are GPUs, or "
            "give --device cpu"
        )
    ranks, gpus = len(assigned), len(set(assigned))
    if ranks > gpus and not comm.ranks_may_share_a_gpu:
        raise UserError(
            f"--comm {comm.name} wants a GPU for each rank, and {ranks} ranks see {gpus} GPU{'s' * (gpus != 1)}; start "
            "fewer ranks on a host, choose --comm mpi, or start with torchrun"
        )
