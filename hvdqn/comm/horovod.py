"""Connect ranks through Horovod, the default engine under horovodrun, mpirun and srun."""

from __future__ import annotations

import http.client
import os
import pickle
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvdqn.comm.base import Comm, Group
from hvdqn.comm.host import SHARED_MEMORY
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
# How often Horovod looks for tensors while sums go through shared memory.
IDLE_CYCLE_MS = "5"


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
    this object is created. Two settings have other defaults here; the environment still takes precedence:

    - OMPI_MCA_mpi_yield_when_idle=1 over MPI: waiting threads yield. Each rank has two threads, which would compete
      where the rank has only one core.
    - HOROVOD_CYCLE_TIME, if all ranks are on one host. If their sums go through shared memory, 5 ms, so that Horovod's
      thread leaves the core alone. Otherwise, over MPI, 0: Horovod looks for tensors continuously, as its own 1 ms is
      longer than a whole update of an MLP.

    Over Gloo, separate threads serve the sockets and need a core. If a host has more ranks than cores, or
    HVDQN_SLEEP_WHEN_WAITING=1 is set, a waiting rank sleeps between checks and leaves its core to them. That is faster
    only where cores are short.

    Args:
        device: the device of the tensors to reduce.
        over_mpi: whether the launcher starts ranks through MPI, not through Gloo.
        host_sum: whether sums within a host go through shared memory.
    """

    name = "horovod"
    title = "Horovod"
    ranks_may_share_a_gpu = False  # NCCL needs one GPU per rank

    def __init__(self, device: str, over_mpi: bool, host_sum: bool = False) -> None:
        self._mpi: Any = None
        host_sum = host_sum and os.access(SHARED_MEMORY, os.W_OK)
        one_host = not over_mpi and os.environ.get("HOROVOD_LOCAL_SIZE") == os.environ.get("HOROVOD_SIZE")
        if over_mpi:
            os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        if over_mpi and find_spec("mpi4py"):
            # Horovod uses an MPI that is already started, and leaves it to mpi4py to finalize it.
            self._mpi = start_mpi()
            world = self._mpi.COMM_WORLD
            host = world.Split_type(self._mpi.COMM_TYPE_SHARED)
            one_host = host.size == world.size
            host.Free()
        if one_host and (host_sum or over_mpi):
            os.environ.setdefault("HOROVOD_CYCLE_TIME", IDLE_CYCLE_MS if host_sum else "0")
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
        self._over_mpi, self._set, self._ranks = over_mpi, hvd.global_process_set, list(range(self.size))
        self._sets: dict[tuple[int, ...], Any] = {tuple(self._ranks): hvd.global_process_set}
        self._sleeps = not over_mpi and (crowded or os.environ.get("HVDQN_SLEEP_WHEN_WAITING") == "1")

    def allreduce_sum_async(self, tensor: Tensor, name: str) -> _Pending:
        """Start to sum `tensor` over all ranks, in place; see `Comm.allreduce_sum_async`."""
        check_reducible(tensor)
        handle = self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum, process_set=self._set)
        return _Pending(self._hvd, handle, tensor, pause=self._sleeps and not tensor.is_cuda)

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite `tensor` with that of rank `root`."""
        if tensor.numel():
            root = self._ranks[root]
            self._hvd.broadcast_(as_bytes(tensor), root, name="hvdqn.broadcast", process_set=self._set)

    def broadcast_object(self, obj: T, root: int = 0) -> T:
        """Return the object that rank `root` passed, on every rank."""
        received: T = self._hvd.broadcast_object(
            obj, self._ranks[root], name="hvdqn.broadcast_object", process_set=self._set
        )
        return received

    def all_gather_object(self, obj: T) -> list[T]:
        """Return the objects that all ranks passed, ordered by rank."""
        content = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        length = torch.tensor([len(content)])
        lengths, contents = (
            self._hvd.allgather(tensor, name=f"hvdqn.all_gather_object.{name}", process_set=self._set)
            for name, tensor in (("length", length), ("content", content))
        )
        return [pickle.loads(piece.numpy()) for piece in contents.split(lengths.tolist())]

    def barrier(self) -> None:
        """Return when every rank has called this."""
        self._hvd.barrier(process_set=self._set)

    def split(self, color: int) -> HorovodGroup:
        """Return the ranks that pass the same `color`; see `Comm.split`.

        Horovod starts again with the process sets: sets that are added while it runs (HOROVOD_DYNAMIC_PROCESS_SETS)
        cost two more exchanges of all ranks in every cycle.
        """
        if self._over_mpi and self._mpi is None:
            raise LaunchError("groups of ranks over Horovod and MPI need mpi4py; pip install 'hvdqn[mpi]'")
        group = self.divide(color)
        for ranks in group.groups:
            if tuple(ranks) not in self._sets:
                self._sets[tuple(ranks)] = self._hvd.ProcessSet(ranks)
        if not self._over_mpi:
            hosts = self.all_gather_object(os.environ["HOROVOD_HOSTNAME"])
            if self.rank == 0:
                clear_rendezvous(sorted(set(hosts)), self.size)
        self.barrier()
        self._hvd.shutdown()
        self._hvd.init(process_sets=[one for one in self._sets.values() if one.process_set_id != 0])
        return HorovodGroup(self, group, self._sets[tuple(group.ranks)])

    def _end_peers(self, code: int) -> None:
        if self._mpi is not None:
            # Unlike mpirun and horovodrun, srun by default lets the other ranks run on when one exits.
            self._mpi.COMM_WORLD.Abort(code)

    def close(self) -> None:
        """Disconnect, together with all other ranks; no collective may follow."""
        self.barrier()  # collectives that other ranks have in progress would fail when this one shuts Horovod down
        self._hvd.shutdown()


class HorovodGroup(HorovodComm):
    """Some ranks of the job, as a process set of Horovod; made by `HorovodComm.split`."""

    def __init__(self, job: HorovodComm, group: Group, process_set: Any) -> None:
        Comm.__init__(self, group.rank, len(group.ranks), group.local_rank, group.local_size)
        self._hvd, self._mpi, self._sleeps = job._hvd, job._mpi, job._sleeps
        self._set, self._ranks = process_set, group.ranks

    def close(self) -> None:
        """Do nothing: Horovod drops the process set when the job closes."""


def clear_rendezvous(hosts: Sequence[str], size: int) -> None:
    """Make horovodrun's key-value store forget the addresses of ranks that are connected over Gloo.

    It forgets the keys of a scope when as many requests to delete have come as the scope has ranks. But then it
    forgets also what it has counted for other scopes, so the keys of these may stay (Horovod 0.28.1). Ranks that
    connect again would read them.
    """
    address = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])

    def request(method: str, path: str) -> bool:
        with closing(http.client.HTTPConnection(*address, timeout=30)) as connection:
            connection.request(method, path)
            response = connection.getresponse()
            response.read()
            return response.status == http.client.OK

    for scope in ("global", *(f"local_{host}" for host in hosts), *(f"cross_{rank}" for rank in range(size))):
        while request("GET", f"/{scope}/0"):
            request("DELETE", f"/{scope}/0")
