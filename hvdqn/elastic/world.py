"""Connect the ranks of an elastic job, again and again as ranks join and leave."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from hvdqn.comm import Comm
from hvdqn.comm.horovod import HorovodComm, import_horovod
from hvdqn.comm.host_sum import HostSumComm, with_host_sum
from hvdqn.errors import LaunchError, PeerLostError

# How long rank 0 waits for the members of a new plan when they were connected before: the launcher answers all of them
# at the same time.
_CONNECTED_BEFORE_SECONDS = 1.0
# How much longer than rank 0 the other ranks wait for its list of members: it may have started later, or died.
_EXTRA_SECONDS = 10.0


class ElasticWorld:
    """A job whose ranks join and leave: Horovod's elastic mode, over Gloo.

    The launcher (horovodrun with --min-np) keeps a plan: the workers that belong to the job, each with its rank. After
    each change every worker requests its rank in the new plan, and the workers that are running connect again.

    Horovod's own `init` would request the rank and connect at once. But then all ranks would wait for workers that are
    still starting, and a worker that dies while it starts would end all others with a C++ exception. So the members of
    a plan first register in the launcher's key-value store, and rank 0 decides which of them connect. Workers that
    register later join with the next plan.

    Args:
        join_timeout_seconds: how long to wait for workers that are starting: at the start of the job, and before
            requesting a new plan without them.
        host_sum: as `--host-sum`; only a world on one host sums through shared memory.

    Attributes:
        peer_lost: the exceptions that collectives raise when a rank is lost.

    Raises:
        LaunchError: this process was not started by horovodrun in elastic mode.
    """

    def __init__(self, join_timeout_seconds: float, host_sum: str = "auto") -> None:
        if os.environ.get("HOROVOD_ELASTIC") != "1":
            raise LaunchError("not started in Horovod's elastic mode; start with launch/elastic.sh")
        os.environ["HOROVOD_ELASTIC"] = "0"  # this class requests the rank, so Horovod's `init` must not
        self._hvd = import_horovod()
        from horovod.common.exceptions import HorovodInternalError
        from horovod.runner.elastic.worker import WorkerNotificationManager

        self.peer_lost: tuple[type[Exception], ...] = (HorovodInternalError, PeerLostError)
        self._host_sum = host_sum
        self._comm: Comm | None = None
        self._join_timeout_seconds = join_timeout_seconds
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
        """Note that hosts came or went. Horovod calls this on rank 0, from a thread of its own."""
        self._hosts_changed = True

    def connect(self) -> Comm | None:
        """Disconnect from the ranks of the last plan and connect to those of the newest one.

        Returns:
            The connected ranks, or None if this process has no rank in the newest plan.

        Raises:
            LaunchError: the launcher does not answer.
        """
        if isinstance(self._comm, HostSumComm):
            self._comm.release()
        if self._connected:
            self._hvd.shutdown()
        present = {} if self._connected else self._register(self._join_timeout_seconds)
        while self._plan[0] not in present:
            self._request_plan()
            if self._plan[0] < 0:
                return None
            present = self._register(
                _CONNECTED_BEFORE_SECONDS if self._connected else self._join_timeout_seconds
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
        # Process sets, which would connect the leaders of several hosts, do not work in elastic jobs.
        self._comm = with_host_sum(comm, self._host_sum, several_hosts=False)
        return self._comm

    def cut(self) -> None:
        """Close the connections to the other ranks after one of them is lost.

        Horovod's shutdown leaves them open. A rank that waits for this one, and not for the lost one, would notice the
        loss only after HOROVOD_GLOO_TIMEOUT_SECONDS.
        """
        for descriptor, inode in self._sockets:
            # Horovod's thread may close the descriptor at any moment, so check and shut down a copy of it.
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                if os.fstat(connection.fileno()).st_ino == inode:
                    connection.shutdown(socket.SHUT_RDWR)

    def changed(self) -> bool:
        """Return True if it is time to `connect` again: hosts came or went, or missing workers have started.

        Call it on rank 0.
        """
        if not self._missing:
            return self._hosts_changed
        # The launcher assigns new ranks only when every worker of the last assignment has asked for one, so wait for
        # those that are still starting.
        timed_out = time.monotonic() - self._planned_at > self._join_timeout_seconds
        return timed_out or all(map(self._host_of, self._missing))

    def _request_plan(self) -> None:
        """Request this worker's rank in the next plan. Returns when all members of the last plan asked or died."""
        self._hosts_changed = False  # the plan may not contain changes from here on
        limit = float(os.environ.get("HOROVOD_ELASTIC_TIMEOUT", "600"))
        try:
            plan = self._request("GET", f"rank_and_size/{self._slot}", limit_seconds=limit)
        except LaunchError as error:
            raise LaunchError(
                f"horovodrun made no new plan: {error}. It waits for workers that hang and for enough hosts"
            ) from None
        rank, size, *_ = plan.decode().split(",")
        self._plan = (int(rank), int(size))
        self._planned_at = time.monotonic()

    def _register(self, seconds: float) -> dict[int, str]:
        """Register in the launcher's store; return the members of the plan that connect: rank -> host.

        Rank 0 waits up to `seconds` for all members and stores the list for the others. The launcher empties the store
        for each new plan. The result is empty if rank 0 stored no list.
        """
        rank, size = self._plan
        self._request("PUT", f"hvdqn/{rank}", self._host.encode())
        deadline = time.monotonic() + seconds
        if rank == 0:
            while not all(hosts := list(map(self._host_of, range(size)))) and time.monotonic() < deadline:
                time.sleep(0.1)
            present = {r: host for r, host in enumerate(hosts) if host}
            self._request("PUT", "hvdqn/present", json.dumps(present).encode())
            return present
        while time.monotonic() < deadline + _EXTRA_SECONDS:
            if answer := self._request("GET", "hvdqn/present"):
                return {int(r): host for r, host in json.loads(answer).items()}
            time.sleep(0.1)
        self._request("DELETE", f"hvdqn/{rank}")
        return {}

    def _host_of(self, rank: int) -> str:
        """Return the host of a member that has registered, "" if it has not."""
        return self._request("GET", f"hvdqn/{rank}").decode()

    def _request(self, method: str, path: str, body: bytes = b"", limit_seconds: float = 30.0) -> bytes:
        """Send one request to the launcher's store; return the answer, b"" if there is no such key."""
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
    """Return (descriptor, inode) of each socket of this process. The inode tells reused descriptors apart."""
    found = set()
    for entry in Path("/dev/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile, like the descriptor of this listing
            status = os.fstat(int(entry.name))
            if stat.S_ISSOCK(status.st_mode):
                found.add((int(entry.name), status.st_ino))
    return found


def place_among(rank: int, present: Mapping[int, str]) -> dict[str, str]:
    """Return the HOROVOD_* variables that give a member its place among those that connect.

    Args:
        rank: its rank in the plan.
        present: the members that connect: rank in the plan -> host.
    """
    members = sorted(present)
    hosts = [present[member] for member in members]
    local_ranks = [hosts[:i].count(host) for i, host in enumerate(hosts)]
    mine = members.index(rank)
    # Horovod's "cross" group: the ranks of all hosts with the same local rank.
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
