"""torch.distributed: the engine under torchrun. Gloo for host tensors, NCCL for CUDA tensors."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from hvdqn.comm.base import Comm, Group
from hvdqn.comm.gpus import assign_gpus, visible_gpus
from hvdqn.comm.tensors import as_bytes, check_reducible
from hvdqn.errors import LaunchError

T = TypeVar("T")

# How long ranks wait for each other at the start. Imports from a network file system are slow.
CONNECT_TIMEOUT = timedelta(minutes=5)
# How long one rank may keep the others waiting, for example while it writes a checkpoint. The watchdog ends a job that
# stalls, with a message that names the rank, and torch's own timeout only if the watchdog fails.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# Torch has no "wait for ever". This is the most that fits into 31 bits of milliseconds, rounded down.
LONGEST_TIMEOUT = timedelta(days=24)


@dataclass(slots=True)
class _Pending:
    """An allreduce in progress; `work` is None once it was waited for."""

    work: dist.Work | None
    tensor: Tensor

    def wait(self) -> Tensor:
        """Wait for the sum and return the tensor."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.tensor


def _connect_store(rank: int, size: int) -> tuple[Store, list[str]]:
    """Connect to the store at MASTER_ADDR:MASTER_PORT; return it and the host name of every rank.

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
    """Return how long torch lets ranks wait for each other: always longer than the watchdog, for ever without it.

    Args:
        stall_timeout: seconds after which the watchdog ends a job that stalls; 0: never.
    """
    if stall_timeout == 0 or stall_timeout >= LONGEST_TIMEOUT.total_seconds() / 2:
        return LONGEST_TIMEOUT
    return max(COLLECTIVE_TIMEOUT, timedelta(seconds=2 * stall_timeout))


def _each_rank_has_its_own_gpu(size: int, device: str) -> bool:
    """Return True if no two ranks share a GPU and none is without one. A collective call, for any device."""
    visible: list[list[str]] = [[]] * size
    dist.all_gather_object(visible, visible_gpus() if device.startswith("cuda") else [])
    assigned = assign_gpus(visible)
    return None not in assigned and len(set(assigned)) == size


class TorchComm(Comm):
    """All ranks of the job, over torch.distributed. Without a GPU for each rank, which NCCL needs, Gloo does it all.

    Args:
        device: where the tensors to reduce are.
        rank: this rank.
        size: number of ranks.
        stall_timeout: see `collective_timeout`.
    """

    name = "torch"
    title = "torch.distributed"

    def __init__(self, device: str, rank: int, size: int, stall_timeout: float = 600.0) -> None:
        store, hosts = _connect_store(rank, size)
        # NCCL only reduces and broadcasts CUDA tensors: objects, barriers and host tensors always go over Gloo.
        timeout = collective_timeout(stall_timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        self._timeout = timeout
        self._on_host: dist.ProcessGroup | None = None  # torch's default group
        self._on_device: dist.ProcessGroup | None = None
        if _each_rank_has_its_own_gpu(size, device):
            self._on_device = dist.new_group(backend="nccl", timeout=timeout)
        local = [peer for peer in range(size) if hosts[peer] == hosts[rank]]
        super().__init__(rank, size, local_rank=local.index(rank), local_size=len(local))

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._on_device if tensor.is_cuda else self._on_host

    def allreduce_sum_async(self, tensor: Tensor, name: str) -> _Pending:
        """See `Comm`."""
        check_reducible(tensor)
        work = dist.all_reduce(tensor.detach(), group=self._group(tensor), async_op=True)
        return _Pending(work, tensor)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        """See `Comm`."""
        if tensor.numel():
            dist.broadcast(as_bytes(tensor), group=self._group(tensor), group_src=root)

    def broadcast_object(self, obj: T, root: int = 0) -> T:
        """See `Comm`."""
        box = [obj]
        dist.broadcast_object_list(box, group=self._on_host, group_src=root)
        return box[0]

    def all_gather_object(self, obj: T) -> list[T]:
        """See `Comm`."""
        gathered = [obj] * self.size
        dist.all_gather_object(gathered, obj, group=self._on_host)
        return gathered

    def barrier(self) -> None:
        """See `Comm`."""
        dist.barrier(group=self._on_host)

    def split(self, color: int) -> TorchGroup:
        """See `Comm`."""
        group = self.divide(color)
        # Every rank takes part in making every group.
        on_host = [dist.new_group(ranks, self._timeout, "gloo") for ranks in group.groups]
        on_device = [
            dist.new_group(ranks, self._timeout, "nccl") if self._on_device else None
            for ranks in group.groups
        ]
        mine = group.groups.index(group.ranks)
        return TorchGroup(group, on_host[mine], on_device[mine])

    def close(self) -> None:
        """See `Comm`."""
        self.barrier()  # collectives that other ranks have in progress would fail when this one disconnects
        if self._on_device is not None and self._on_host is not None:
            dist.destroy_process_group(self._on_device)
        dist.destroy_process_group(self._on_host)


class TorchGroup(TorchComm):
    """Some ranks of the job, over process groups of torch; made by `TorchComm.split`."""

    def __init__(self, group: Group, on_host: dist.ProcessGroup, on_device: dist.ProcessGroup | None) -> None:
        Comm.__init__(self, group.rank, len(group.ranks), group.local_rank, group.local_size)
        self._on_host, self._on_device = on_host, on_device
