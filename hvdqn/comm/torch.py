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

from hvdqn.comm.base import Comm
from hvdqn.comm.gpus import assign_gpus, visible_gpus
from hvdqn.comm.tensors import as_bytes, check_reducible
from hvdqn.errors import LaunchError

T = TypeVar("T")

# How far apart the ranks of a job may arrive: imports from a network disk are slow.
CONNECT_TIMEOUT = timedelta(minutes=5)
# The longest one rank may keep the others waiting (a checkpoint, a long evaluation).
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(slots=True)
class _Pending:
    work: dist.Work | None
    tensor: Tensor

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.tensor


def _meet(rank: int, size: int) -> tuple[Store, list[str]]:
    """Meet the other ranks at MASTER_ADDR:MASTER_PORT; return the store there and every rank's host name.

    Raises:
        LaunchError: some rank has not come within `CONNECT_TIMEOUT`, or no store answers at that address.
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


def _have_a_gpu_each(size: int, device: str) -> bool:
    """Whether every rank of the job has a GPU that no other one has; a collective call, wherever tensors lie."""
    seen: list[list[str]] = [[]] * size
    dist.all_gather_object(seen, visible_gpus() if device.startswith("cuda") else [])
    dealt = assign_gpus(seen)
    return None not in dealt and len(set(dealt)) == size


class TorchComm(Comm):
    """All ranks of the job, over torch.distributed. All is Gloo's where ranks share a GPU: NCCL would refuse."""

    name = "torch"

    def __init__(self, device: str, rank: int, size: int) -> None:
        store, hosts = _meet(rank, size)
        # Objects, barriers and host tensors travel over Gloo even where gradients travel over NCCL.
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
        self._on_device: dist.ProcessGroup | None = None
        if _have_a_gpu_each(size, device):
            self._on_device = dist.new_group(backend="nccl", timeout=COLLECTIVE_TIMEOUT)
        here = [peer for peer in range(size) if hosts[peer] == hosts[rank]]
        super().__init__(rank, size, local_rank=here.index(rank), local_size=len(here))

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._on_device if tensor.is_cuda else None

    def allreduce_sum_async(self, tensor: Tensor, name: str) -> _Pending:
        """See `Comm`."""
        check_reducible(tensor)
        work = dist.all_reduce(tensor.detach(), group=self._group(tensor), async_op=True)
        return _Pending(work, tensor)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        """See `Comm`."""
        if tensor.numel():
            dist.broadcast(as_bytes(tensor), root, group=self._group(tensor))

    def broadcast_object(self, obj: T, root: int = 0) -> T:
        """See `Comm`."""
        box = [obj]
        dist.broadcast_object_list(box, root)
        return box[0]

    def all_gather_object(self, obj: T) -> list[T]:
        """See `Comm`."""
        gathered = [obj] * self.size
        dist.all_gather_object(gathered, obj)
        return gathered

    def barrier(self) -> None:
        """See `Comm`."""
        dist.barrier()

    def close(self) -> None:
        """See `Comm`."""
        self.barrier()  # the first rank to hang up fails whatever the others still have under way
        dist.destroy_process_group()
