"""Horovod: the default under horovodrun, mpirun and srun. The only file that imports it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from hvdqn.comm.base import Comm
from hvdqn.comm.mpi import start_mpi
from hvdqn.comm.tensors import as_bytes, check_reducible
from hvdqn.errors import LaunchError

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


# Between two looks at whether an average has come over Gloo.
PAUSE_SECONDS = 5e-5


@dataclass(slots=True)
class _Pending:
    hvd: Any
    handle: int
    tensor: Tensor
    pause: bool

    def wait(self) -> Tensor:
        if self.pause:
            while not self.hvd.poll(self.handle):
                time.sleep(PAUSE_SECONDS)
            self.pause = False  # Horovod knows the handle no longer once it was waited for
        # Spins in C++ without the GIL, so that a watchdog thread can run.
        self.hvd.synchronize(self.handle)
        return self.tensor


class HorovodComm(Comm):
    """All ranks of the job, over Horovod's MPI or Gloo controller.

    Horovod reads its settings (HOROVOD_CYCLE_TIME, HOROVOD_STALL_CHECK_TIME_SECONDS, ...) from the environment while
    this is constructed. Over MPI two have other defaults here; what the environment says holds. Waiting threads yield:
    a rank has two, and where it has one core they starve each other. And on one host Horovod looks for tensors all
    the time rather than once a millisecond (HOROVOD_CYCLE_TIME=0), which takes longer than an MLP's whole update.

    Over Gloo threads of their own serve the sockets, and need a core that ranks would spin on. Where a host has more
    ranks than cores, or HVDQN_SLEEP_WHEN_WAITING=1, a rank that waits sleeps in between: an MLP's update on 3 ranks and
    2 cores took a third of the time so. With a core for each rank it took half as long again.
    """

    name = "horovod"
    ranks_may_share_a_gpu = False  # NCCL wants one for each

    def __init__(self, device: str, over_mpi: bool) -> None:
        self._mpi: Any = None
        if over_mpi:
            os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        if over_mpi and find_spec("mpi4py"):
            # MPI must be up before Horovod: then Horovod reuses it and leaves finalizing it to mpi4py.
            self._mpi = start_mpi()
            world = self._mpi.COMM_WORLD
            host = world.Split_type(self._mpi.COMM_TYPE_SHARED)
            if host.size == world.size:
                os.environ.setdefault("HOROVOD_CYCLE_TIME", "0")
            host.Free()
        self._hvd: Any = _import_horovod()
        if device.startswith("cuda") and not self._hvd.nccl_built():
            raise LaunchError(
                "Horovod was built without NCCL, which --device cuda needs; run launch/install_horovod.sh --gpu where "
                "nvcc and NCCL are found, or choose --comm mpi, or start with torchrun"
            )
        self._hvd.init()
        hvd = self._hvd
        super().__init__(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())
        # Horovod's launcher ties no rank to a core of its own: what this one may use, all of its host may.
        crowded = hvd.local_size() > len(os.sched_getaffinity(0))
        self._sleeps = not over_mpi and (crowded or os.environ.get("HVDQN_SLEEP_WHEN_WAITING") == "1")

    def allreduce_sum_async(self, tensor: Tensor, name: str) -> _Pending:
        """See `Comm`."""
        check_reducible(tensor)
        handle = self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum)
        return _Pending(self._hvd, handle, tensor, pause=self._sleeps and not tensor.is_cuda)

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


class ElasticWorld:
    """A job whose ranks come and go: Horovod's elastic mode, over Gloo.

    The launcher (horovodrun with --min-np) plans who belongs to the job. After each change every process asks for its
    place in the new plan, and those that are there connect anew. Horovod's own `init` would ask and connect at once;
    but all would wait for processes that still start, and one that dies there ends all others with a C++ exception.
    So the members of a plan first meet in the launcher's key-value store. Who comes late joins with the next plan.

    Args:
        patience_seconds: how long a job that has not begun waits for processes that start, and how long until it
            asks for others in place of those that do not come.

    Attributes:
        peer_lost: what collectives raise when a rank is lost.

    Raises:
        LaunchError: this process was not started by horovodrun in elastic mode.
    """

    # Old hands arrive together: the launcher answers them at once.
    _OLD_HANDS_WITHIN_SECONDS = 1.0

    def __init__(self, patience_seconds: float) -> None:
        if os.environ.get("HOROVOD_ELASTIC") != "1":
            raise LaunchError("not started in Horovod's elastic mode; start with launch/elastic.sh")
        os.environ["HOROVOD_ELASTIC"] = "0"  # `init` must not ask for a place: this class does
        self._hvd = _import_horovod()
        from horovod.common.exceptions import HorovodInternalError
        from horovod.runner.elastic.worker import WorkerNotificationManager

        self.peer_lost: type[Exception] = HorovodInternalError
        self._patience_seconds = patience_seconds
        self._host = os.environ["HOROVOD_HOSTNAME"]
        self._slot = f"{self._host}:{os.environ['HOROVOD_LOCAL_RANK']}"
        self._plan = (int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"]))
        self._connected = False
        self._sockets: set[tuple[int, int]] = set()
        self._missing: list[int] = []
        self._planned_at = time.monotonic()
        self._hosts_changed = False
        notifications = WorkerNotificationManager()
        notifications.init()
        notifications.register_listener(self)

    def on_hosts_updated(self, timestamp: int, update: int) -> None:
        """Called by Horovod on rank 0, from a thread of its own."""
        self._hosts_changed = True

    def connect(self) -> HorovodComm | None:
        """Leave the ranks of the plan before and connect to those of the newest; None: it has no place for us.

        Raises:
            LaunchError: the launcher does not answer.
        """
        if self._connected:
            self._hvd.shutdown()
        present = {} if self._connected else self._meet(self._patience_seconds)
        while self._plan[0] not in present:
            self._ask_for_plan()
            if self._plan[0] < 0:
                return None
            present = self._meet(
                self._OLD_HANDS_WITHIN_SECONDS if self._connected else self._patience_seconds
            )
        self._missing = [rank for rank in range(self._plan[1]) if rank not in present]
        self._connected = True
        os.environ.update(place_among(self._plan[0], present))
        before = _open_sockets()
        comm = HorovodComm("cpu", over_mpi=False)
        self._sockets = _open_sockets() - before
        comm.why = "elastic, started by horovodrun"
        if comm.size != len(present):
            raise LaunchError(
                f"{len(present)} ranks met, but Horovod connects {comm.size}; start the job again"
            )
        return comm

    def cut(self) -> None:
        """End the connections to the other ranks, once one of them is lost.

        Horovod's shutdown leaves them open, and a rank that waits for this one, not for the lost one, would learn of
        the loss after HOROVOD_GLOO_TIMEOUT_SECONDS only.
        """
        for descriptor, inode in self._sockets:
            # Horovod's thread may close it at any moment: looked at, then used, is a copy that nobody else closes.
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                if os.fstat(connection.fileno()).st_ino == inode:
                    connection.shutdown(socket.SHUT_RDWR)

    def changed(self) -> bool:
        """Whether to `connect` anew: hosts came or went, or who was late is there. To be asked on rank 0."""
        if not self._missing:
            return self._hosts_changed
        # A new plan waits for all members of the old one: not while some are still starting.
        late = time.monotonic() - self._planned_at > self._patience_seconds
        return late or all(map(self._is_here, self._missing))

    def _ask_for_plan(self) -> None:
        """Wait until all members of the last plan asked or died, and take the place in the next one."""
        self._hosts_changed = False  # what changes from here on may not be in the plan
        limit = float(os.environ.get("HOROVOD_ELASTIC_TIMEOUT", "600"))
        try:
            plan = self._ask("GET", f"rank_and_size/{self._slot}", limit_seconds=limit)
        except LaunchError as error:
            raise LaunchError(
                f"no new plan of who belongs to the job: {error}. Workers that hang keep it back, and too few hosts"
            ) from None
        rank, size, *_ = plan.decode().split(",")
        self._plan = (int(rank), int(size))
        self._planned_at = time.monotonic()

    def _meet(self, seconds: float) -> dict[int, str]:
        """Who is there of the plan, by its ranks, each with its host. Rank 0 decides and tells the others.

        A new plan empties the store.
        """
        rank, size = self._plan
        self._ask("PUT", f"hvdqn/{rank}", self._host.encode())
        deadline = time.monotonic() + seconds
        if rank == 0:
            while not all(here := list(map(self._is_here, range(size)))) and time.monotonic() < deadline:
                time.sleep(0.1)
            present = {r: host for r, host in enumerate(here) if host}
            self._ask("PUT", "hvdqn/present", json.dumps(present).encode())
            return present
        while time.monotonic() < deadline + 10.0:  # rank 0 may have come a little later, and may have died
            if answer := self._ask("GET", "hvdqn/present"):
                return {int(r): host for r, host in json.loads(answer).items()}
            time.sleep(0.1)
        self._ask("DELETE", f"hvdqn/{rank}")
        return {}

    def _is_here(self, rank: int) -> str:
        """The host of a member that is there; "" of one that is not."""
        return self._ask("GET", f"hvdqn/{rank}").decode()

    def _ask(self, method: str, path: str, body: bytes = b"", limit_seconds: float = 30.0) -> bytes:
        """One request to the launcher; b"" where it knows no such key."""
        address = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])
        failure = f"waited {limit_seconds:g} s"
        for attempt in range(3):
            time.sleep(attempt * 0.5)
            connection = http.client.HTTPConnection(*address, timeout=limit_seconds)
            try:
                connection.request(method, "/" + path, body)
                response = connection.getresponse()
                content = response.read()
                return content if response.status == http.client.OK else b""
            except TimeoutError:
                break
            except OSError as error:
                failure = str(error)
            finally:
                connection.close()
        raise LaunchError(f"horovodrun does not answer at {address[0]}:{address[1]} ({failure})")


def _open_sockets() -> set[tuple[int, int]]:
    """Descriptor and inode of each socket of this process; a descriptor alone may be another socket later."""
    found = set()
    for entry in Path("/dev/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since; so is the one that listed them
            status = os.fstat(int(entry.name))
            if stat.S_ISSOCK(status.st_mode):
                found.add((int(entry.name), status.st_ino))
    return found


def place_among(rank: int, present: Mapping[int, str]) -> dict[str, str]:
    """The variables that tell Horovod where `rank` of a plan stands among those present, each with its host."""
    members = sorted(present)
    hosts = [present[member] for member in members]
    local_ranks = [hosts[:i].count(host) for i, host in enumerate(hosts)]
    mine = members.index(rank)
    # Across hosts, ranks of equal local rank form a group.
    across = [i for i, local_rank in enumerate(local_ranks) if local_rank == local_ranks[mine]]
    place = {
        "RANK": mine,
        "SIZE": len(members),
        "LOCAL_RANK": local_ranks[mine],
        "LOCAL_SIZE": hosts.count(hosts[mine]),
        "CROSS_RANK": across.index(mine),
        "CROSS_SIZE": len(across),
    }
    return {f"HOROVOD_{name}": str(value) for name, value in place.items()}
