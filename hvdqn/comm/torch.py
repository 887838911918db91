"""Connect ranks through torch.distributed, the engine under torchrun: Gloo for CPU tensors, NCCL for CUDA tensors."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from hvdqn.comm.base import Comm
from hvdqn.comm.gpus import assign_gpus, visible_gpus
from hvdqn.comm.tensors import as_bytes, check_reducible
from hvdqn.errors import LaunchError

T = TypeVar("T")

# How long ranks wait for each other at the start. Imports from a network file system are slow.
CONNECT_TIMEOUT = timedelta(minutes=5)
# How long torch lets ranks wait for one another, at least; one may write a checkpoint meanwhile. The watchdog ends a
# job that stalls earlier, with a message that names the rank. This timeout acts only if the watchdog fails.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# Torch has no "wait for ever". This is the most that fits into 31 bits of milliseconds, rounded down.
LONGEST_TIMEOUT = timedelta(days=24)


@dataclass(slots=True)
class _Pending:
    """The handle of an allreduce in progress. `work` is torch's handle, and None once `wait` has returned."""

    work: dist.Work | None
    tensor: Tensor

    def wait(self) -> Tensor:
        """Wait for the sum over ranks, and return the tensor, which then holds it."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.tensor


def _connect_store(rank: int, size: int) -> tuple[Store, list[str]]:
    """Connect to torch's key-value store at MASTER_ADDR:MASTER_PORT; return it and the host name of every rank.

    Raises:
        LaunchError: not all ranks connected within `CONNECT_TIMEOUT`, or no store answers at that address.
    """
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=CONNECT_TIMEOUT))
        store.set(f"hvdqn/host/{rank}", socket.gethostname())
        keys = [f"hvdqn/host/{peer}" for peer in range(size)]
        store.wait(keys, CONNECT_TIMEOUT)
        return store, [store.get(key).decode() for key in keys]
    except (dist.DistError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        seconds = CONNECT_TIMEOUT.total_seconds()
        raise LaunchError(
            f"rank {rank} did not meet all {size} ranks within {seconds:.0f} s ({reason}); start them all, with "
            "the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, or leave that to torchrun"
        ) from None


def collective_timeout(stall_timeout: float) -> timedelta:
    """Return how long torch may let ranks wait for each other: longer than the watchdog does, or practically for ever.

    Args:
        stall_timeout: seconds after which the watchdog ends a job that stalls; 0: never.
    """
    if stall_timeout == 0 or stall_timeout >= LONGEST_TIMEOUT.total_seconds() / 2:
        return LONGEST_TIMEOUT
    return max(COLLECTIVE_TIMEOUT, timedelta(seconds=2 * stall_timeout))


def _each_rank_has_its_own_gpu(size: int, device: str) -> bool:
    """Return True if every rank can have a GPU of its own. All ranks must call this together, on the CPU too."""
    visible: list[list[str]] = [[]] * size
    dist.all_gather_object(visible, visible_gpus() if device.startswith("cuda") else [])
    assigned = assign_gpus(visible)
    return None not in assigned and len(set(assigned)) == size


class TorchComm(Comm):
    """Connects all ranks of the job through torch.distributed.

    NCCL needs a GPU for each rank. If there are fewer, Gloo reduces CUDA tensors too.

    Args:
        device: the device of the tensors to reduce.
        rank: this rank.
        size: number of ranks.
        stall_timeout: seconds after which the watchdog ends a job that stalls; 0: never.
    """

    name = "torch"

    def __init__(self, device: str, rank: int, size: int, stall_timeout: float = 600.0) -> None:
        store, hosts = _connect_store(rank, size)
        timeout = collective_timeout(stall_timeout)
        # Gloo carries objects, barriers and CPU tensors. NCCL, if used, carries CUDA tensors.
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        self._on_device: dist.ProcessGroup | None = None
        if _each_rank_has_its_own_gpu(size, device):
            self._on_device = dist.new_group(backend="nccl", timeout=timeout)
        local = [peer for peer in range(size) if hosts[peer] == hosts[rank]]
        super().__init__(rank, size, local_rank=local.index(rank), local_size=len(local))

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._on_device if tensor.is_cuda else None

    def allreduce_sum_async(self, tensor: Tensor, name: str) -> _Pending:
        """Start to sum `tensor` over all ranks, in place; see `Comm.allreduce_sum_async`."""
        check_reducible(tensor)
        work = dist.all_reduce(tensor.detach(), group=self._group(tensor), async_op=True)
        return _Pending(work, tensor)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite `tensor` with that of rank `root`."""
        if tensor.numel():
            dist.broadcast(as_bytes(tensor), root, group=self._group(tensor))

    def broadcast_object(self, obj: T, root: int = 0) -> T:
        """Return the object that rank `root` passed, on every rank."""
        box = [obj]
        dist.broadcast_object_list(box, root)
        return box[0]

    def all_gather_object(self, obj: T) -> list[T]:
        """Return the objects that all ranks passed, ordered by rank."""
        gathered = [obj] * self.size
        dist.all_gather_object(gathered, obj)
        return gathered

    def barrier(self) -> None:
        """Return when every rank has called this."""
        dist.barrier()

    def close(self) -> None:
        """Disconnect, together with all other ranks; no collective may follow."""
        self.barrier()  # collectives that other ranks have in progress would fail when this one disconnects
        dist.destroy_process_group()
