"""Sums over the ranks of a host through shared memory, for every engine.

Ranks add the messages of their host in the order of ranks, so that all get the same bits. Between hosts, one rank of
each host (its leader) sums through the engine, and passes the result on through shared memory. On a single host,
broadcasts and objects take the same way, and the engine is idle.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from hvdqn.comm.base import Comm, Handle
from hvdqn.comm.host import SHARED_MEMORY, Signals, make_memory, map_memory, place_of
from hvdqn.comm.tensors import as_bytes, check_reducible
from hvdqn.errors import LaunchError

log = logging.getLogger(__name__)

T = TypeVar("T")
Array = np.ndarray[Any, Any]

LINE = 64  # bytes of a cache line; messages of different ranks are on different lines
# Of a longer message each rank adds one slice and reads the sums of the others. That takes a second signal, but a rank
# reads two messages and not those of all ranks.
SLICED_FROM = 1 << 18
OBJECT_BYTES = 4096  # longer objects go through the engine


class Messages:
    """Messages with one name in shared memory, one of each rank of a host, and their sum.

    A message that all ranks read at once has two places, used in turn: a rank that writes message k + 2 into the place
    of message k has waited for message k + 1 of all ranks, and they posted that after they had read message k. Else
    one place is enough: a rank that writes message k + 1 has the sum of messages k, made after all had been read.

    Args:
        signals: between the ranks of this host.
        number: of the signals that these messages use.
        like: [n], has the dtype of the messages.
        leaders: connects the leaders of all hosts, None if there is one host; on other ranks not used.

    Attributes:
        nbytes: of the memory that `open` needs.
    """

    def __init__(self, signals: Signals, number: int, like: Tensor, leaders: Comm | None) -> None:
        self._signals, self._leaders = signals, leaders
        self._posted, self._done = 2 * number, 2 * number + 1
        self._numel, self._dtype, self._array_dtype = like.numel(), like.dtype, like.detach().numpy().dtype
        self._sliced = like.nbytes >= SLICED_FROM
        self._places = 1 if self._sliced or leaders else 2
        self._stride = max(-(-like.nbytes // LINE), 1) * LINE
        self.nbytes = (self._places * signals.size + 1) * self._stride
        ends = [self._numel * index // signals.size for index in range(signals.size + 1)]
        self._slice = slice(ends[signals.index], ends[signals.index + 1])
        self._leader = [0] if signals.index else []  # where a rank that does not lead sends signals
        self._to_post = self._leader if leaders and not self._sliced else signals.others
        self._count = 0

    def open(self, memory: mmap.mmap) -> None:
        """Begin to use this memory."""
        size = self._signals.size
        arrays = [
            np.frombuffer(memory, self._array_dtype, self._numel, index * self._stride)
            for index in range(self._places * size + 1)
        ]
        self._result = arrays.pop()
        self._messages = [arrays[place * size : (place + 1) * size] for place in range(self._places)]

    def fits(self, tensor: Tensor) -> bool:
        """Return True if `tensor` has the length and dtype of these messages."""
        return tensor.numel() == self._numel and tensor.dtype == self._dtype

    def post(self, array: Array) -> list[Array]:
        """Write this rank's next message and signal it; return the places of all ranks' messages."""
        self._count += 1
        messages = self._messages[self._count % self._places]
        np.copyto(messages[self._signals.index], array)
        self._signals.send(self._posted, self._to_post)
        return messages

    def sum_(self, messages: Sequence[Array], total: Array) -> None:
        """Write the sum of the ranks of this host into `total`, or into the shared result if ranks add slices."""
        signals = self._signals
        signals.wait(self._posted, signals.others)
        if not self._sliced:
            _add(messages, total)
            return
        _add([message[self._slice] for message in messages], self._result[self._slice])
        signals.send(self._done, self._leader if self._leaders else signals.others)
        if not self._leaders or signals.index == 0:
            signals.wait(self._done, signals.others)
            np.copyto(total, self._result)

    def sum_over_hosts_(self, messages: Sequence[Array], tensor: Tensor, name: str) -> None:
        """Overwrite `tensor`, which was posted, with the sum over all ranks of all hosts."""
        signals, leaders, total = self._signals, self._leaders, tensor.detach().numpy()
        if leaders is None or self._sliced or signals.index == 0:
            self.sum_(messages, total)
        if leaders is None:
            return
        if signals.index == 0:
            leaders.allreduce_sum_async(tensor, name).wait()
            np.copyto(self._result, total)
            signals.send(self._done, signals.others)
        else:
            signals.wait(self._done, self._leader)
            np.copyto(total, self._result)


def _add(messages: Sequence[Array], out: Array) -> None:
    if len(messages) == 1:  # the only rank of its host
        np.copyto(out, messages[0])
        return
    np.add(messages[0], messages[1], out=out)
    for message in messages[2:]:
        np.add(out, message, out=out)


class _Pending:
    """A sum that `wait` computes, or a thread meanwhile; the messages of this host travel in any case."""

    __slots__ = ("_future", "_messages", "_name", "_posted", "_tensor")

    def __init__(
        self, messages: Messages, tensor: Tensor, name: str, thread: ThreadPoolExecutor | None
    ) -> None:
        self._messages: Messages | None = messages
        self._tensor, self._name = tensor, name
        self._posted = messages.post(tensor.detach().numpy())
        self._future: Future[None] | None = thread.submit(self._sum) if thread else None

    def wait(self) -> Tensor:
        """Wait for the messages of all ranks, and return the tensor, overwritten with their sum."""
        if self._future is not None:
            self._future.result()
        elif self._messages is not None:
            self._sum()
        return self._tensor

    def _sum(self) -> None:
        messages, self._messages = self._messages, None
        if messages is not None:
            messages.sum_over_hosts_(self._posted, self._tensor, self._name)


class HostSumComm(Comm):
    """An engine whose sums go through shared memory within a host; made by `with_host_sum`.

    Args:
        engine: connects all ranks.
        signals: between the ranks of this host.
        ranks: those of this host.
        leaders: see `Messages`.
    """

    def __init__(self, engine: Comm, signals: Signals, ranks: Sequence[int], leaders: Comm | None) -> None:
        super().__init__(engine.rank, engine.size, engine.local_rank, engine.local_size)
        self.name, self.title, self.why = engine.name, engine.title, engine.why
        self.ranks_may_share_a_gpu = engine.ranks_may_share_a_gpu
        self._engine, self._signals, self._ranks, self._leaders = engine, signals, ranks, leaders
        self._messages: dict[str, Messages | None] = {}
        # Between hosts sums take long: they go on while environments step.
        self._thread = ThreadPoolExecutor(1, "host-sum") if leaders and leaders.works_in_threads else None
        self._numbers: dict[str, int] = {}
        self._box: mmap.mmap | None = None  # for broadcasts
        self._has_box = leaders is None
        self._objects: mmap.mmap | None = None
        self._object_rounds = 0
        if leaders is None:
            self._objects = self._share_memory(2 * signals.size * OBJECT_BYTES, "objects")

    @property
    def path(self) -> str:
        """Return what sums travel through."""
        return f"{self.title} between hosts, shared memory within" if self._leaders else "shared memory"

    def _number(self, name: str) -> int:
        """Return a number for a name, the same on all ranks because they ask for names in the same order."""
        number = self._numbers.setdefault(name, len(self._numbers))
        assert number < 128, "too many names"
        return number

    def _share_memory(self, nbytes: int, name: str) -> mmap.mmap | None:
        """Return new memory that the ranks of each host share, None if a rank cannot have it. A collective call."""
        descriptor, place, failure, memory = -1, None, "", None
        try:
            if self._signals.index == 0:
                descriptor = make_memory(nbytes)
                place = place_of(descriptor)
        except OSError as error:
            failure = str(error.strerror)
        place = self.all_gather_object(place)[self._ranks[0]]
        try:
            memory = map_memory(place) if place else None
        except OSError as error:
            failure = str(error.strerror)
        failures = [one for one in self.all_gather_object(failure) if one]
        if descriptor >= 0:
            os.close(descriptor)
        if failures and self.rank == 0:
            log.warning(
                f"{self.title} carries {name}: {nbytes:,} bytes of shared memory cannot be had in {SHARED_MEMORY} "
                f"({failures[0]})"
            )
        return None if failures else memory

    def allreduce_sum_async(self, tensor: Tensor, name: str) -> Handle:
        """Start to sum `tensor` over all ranks, in place; see `Comm.allreduce_sum_async`."""
        check_reducible(tensor)
        messages = self._messages.get(name)
        if messages is None or not messages.fits(tensor):
            messages = self._make_messages(tensor, name)
        if messages is None:
            return self._engine.allreduce_sum_async(tensor, name)
        return _Pending(messages, tensor, name, self._thread)

    def _make_messages(self, like: Tensor, name: str) -> Messages | None:
        """Return new messages with this name; None if the engine is to carry them."""
        if like.is_cuda or (name in self._messages and self._messages[name] is None):
            return None
        messages = Messages(self._signals, self._number(name), like, self._leaders)
        memory = self._share_memory(messages.nbytes, f"'{name}'")
        if memory is not None:
            messages.open(memory)
        self._messages[name] = messages if memory is not None else None
        return self._messages[name]

    def broadcast_(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite `tensor` with that of rank `root`."""
        content = as_bytes(tensor)
        if self._has_box and not tensor.is_cuda and len(self._box or ()) < len(content):
            self._box = self._share_memory(len(content), "broadcasts")
            self._has_box = self._box is not None
        if self._box is None or tensor.is_cuda:
            self._engine.broadcast_(tensor, root)
            return
        signals, posted = self._signals, 2 * self._number("broadcast")
        box = np.frombuffer(self._box, np.uint8, len(content))
        if signals.index == root:
            np.copyto(box, content.numpy())
            signals.send(posted, signals.others)
        else:
            signals.wait(posted, [root])
            np.copyto(content.numpy(), box)
            signals.send(posted + 1, signals.others)
        # Any rank may be the next to write: all have to know that the others have read.
        signals.wait(posted + 1, [rank for rank in signals.others if rank != root])

    def _exchange_objects(self, content: bytes) -> list[bytes] | None:
        """Return the contents of all ranks of the only host, None if one is too long. A collective call.

        There are two places, used in turn, as in `Messages`.
        """
        if self._objects is None:
            return None
        signals, posted = self._signals, 2 * self._number("objects")
        self._object_rounds += 1
        place = self._object_rounds % 2 * signals.size * OBJECT_BYTES
        begin = place + signals.index * OBJECT_BYTES
        self._objects[begin : begin + 8] = len(content).to_bytes(8, "little")
        if len(content) <= OBJECT_BYTES - 8:
            self._objects[begin + 8 : begin + 8 + len(content)] = content
        signals.send(posted, signals.others)
        signals.wait(posted, signals.others)
        contents = []
        for begin in range(place, place + signals.size * OBJECT_BYTES, OBJECT_BYTES):
            length = int.from_bytes(self._objects[begin : begin + 8], "little")
            if length > OBJECT_BYTES - 8:
                return None
            contents.append(self._objects[begin + 8 : begin + 8 + length])
        return contents

    def broadcast_object(self, obj: T, root: int = 0) -> T:
        """Return the object that rank `root` passed, on every rank."""
        contents = self._exchange_objects(pickle.dumps(obj) if self.rank == root else b"")
        if contents is None:
            return self._engine.broadcast_object(obj, root)
        received: T = pickle.loads(contents[root])
        return received

    def all_gather_object(self, obj: T) -> list[T]:
        """Return the objects that all ranks passed, ordered by rank."""
        contents = self._exchange_objects(pickle.dumps(obj))
        if contents is None:
            return self._engine.all_gather_object(obj)
        return [pickle.loads(content) for content in contents]

    def barrier(self) -> None:
        """Return when every rank has called this."""
        if self._exchange_objects(b"") is None:
            self._engine.barrier()

    def split(self, color: int) -> Comm:
        """Return the ranks that pass the same `color`, with sums through shared memory if all of them share a host."""
        return with_host_sum(self._engine.split(color), "auto", several_hosts=False)

    def _end_peers(self, code: int) -> None:
        self._engine._end_peers(code)

    def close(self) -> None:
        """Disconnect, together with all other ranks; no collective may follow."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._leaders is not None:
            self._leaders.close()
        self._engine.close()
        self.release()

    def release(self) -> None:
        """Leave the other ranks of this host, which may be dead; those that wait for this one raise an error."""
        self._signals.close()


def with_host_sum(engine: Comm, choice: str, several_hosts: bool = True) -> Comm:
    """Return `engine` with sums through shared memory within each host, if it can be had. A collective call.

    Args:
        engine: connects all ranks.
        choice: auto, on or off; `on` insists.
        several_hosts: whether the engine can connect the leaders of several hosts.

    Raises:
        LaunchError: on all ranks, if it cannot be had and `choice` is `on`.
    """
    # Ranks with and without a GPU may differ in their choice; they are refused later, and must not wait here.
    hosts, choices = zip(*engine.all_gather_object((socket.gethostname(), choice)), strict=True)
    if "off" in choices:
        return engine
    ranks = [rank for rank, host in enumerate(hosts) if host == hosts[engine.rank]]
    if len(set(hosts)) == engine.size:  # no two ranks share a host
        return engine
    signals, reason = _connect_host(engine, ranks), "/dev/shm is missing, full or not shared"
    leaders = None
    if signals is not None and len(set(hosts)) > 1:
        try:
            leaders = engine.split(int(ranks[0] != engine.rank)) if several_hosts else None
            reason = "elastic ranks are on several hosts"
        except LaunchError as error:
            reason = str(error)
        if leaders is None:
            signals.close()
            signals = None
    if signals is not None:
        return HostSumComm(engine, signals, ranks, leaders)
    if choice == "on":
        raise LaunchError(f"--host-sum on: {reason}")
    if engine.rank == 0:
        log.info(f"no sums through shared memory: {reason}; {engine.title} does it all")
    return engine


def _connect_host(engine: Comm, ranks: Sequence[int]) -> Signals | None:
    """Connect the ranks of each host; return None on all ranks if that fails on any. A collective call."""
    folder, signals, index = "", None, ranks.index(engine.rank)
    if index == 0:
        with contextlib.suppress(OSError):
            folder = tempfile.mkdtemp(prefix=f"hvdqn-{os.getpid()}-", dir=SHARED_MEMORY)
            Signals.make(Path(folder), len(ranks))
    folders = engine.all_gather_object(folder)
    # Ranks with the same host name may be in containers that do not share /dev/shm: then they cannot open it.
    with contextlib.suppress(OSError):
        signals = Signals(Path(folders[ranks[0]]), index, len(ranks))
    all_connected = all(engine.all_gather_object(signals is not None))
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    if signals is not None and not all_connected:
        signals.close()
    return signals if all_connected else None
