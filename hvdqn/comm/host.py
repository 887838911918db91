"""What the ranks of one host share: memory, and pipes that signal when it may be read.

Memory order: a rank writes a message into shared memory and then a byte into a pipe; another rank reads the byte and
then the message. The kernel copies the byte in and out under the lock of the pipe. The writer releases that lock after
its stores and the reader acquires it before its loads, so the reader sees the whole message on every processor, also
where stores of one core may reach others in another order (ARM, POWER). Nothing else orders memory here: no counter in
shared memory is polled, because Python has no load or store with such a promise.

The pipes lie in /dev/shm and are removed as soon as all ranks have opened them; memory has no name there. So a job
that is killed leaves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import select
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from hvdqn.errors import PeerLostError

SHARED_MEMORY = Path("/dev/shm")
# How long a waiting rank yields its core to others before it sleeps. To wake it takes the kernel about as long, but
# a core that is needed elsewhere is soon free.
YIELD_SECONDS = 2e-4
# A yield that takes longer than this let another process run. The kernel charges a rank that yields for the rest of its
# time slice, so that on a busy core it falls behind; a rank that sleeps runs as soon as a signal arrives. So the rank
# stops yielding for BUSY_SECONDS.
SLOW_YIELD_SECONDS = 1e-4
BUSY_SECONDS = 1.0
# How often a sleeping rank looks whether the rank that it waits for is alive.
ALIVE_MS = 1000


class Signals:
    """Pipes from each rank of a host to each other one, and a lock that each rank holds as long as it lives.

    Args:
        folder: where `make` made the pipes.
        index: of this rank among those of its host.
        size: number of ranks on this host, 2 or more.

    Raises:
        OSError: this rank does not see the folder, or has no more file descriptors.
    """

    def __init__(self, folder: Path, index: int, size: int) -> None:
        self.index, self.size, self._busy_until = index, size, 0.0
        self.others = [peer for peer in range(size) if peer != index]
        self._received = [
            bytearray(256) for _ in range(size)
        ]  # by peer, how many of each signal await `wait`
        self._pipes_from, self._pipes_to, self._locks = dict[int, int](), dict[int, int](), -1
        try:
            # Opened for reading and writing, so that no open waits for the other side.
            for peer in self.others:
                self._pipes_from[peer] = os.open(folder / f"{peer}-{index}", os.O_RDWR | os.O_NONBLOCK)
                self._pipes_to[peer] = os.open(folder / f"{index}-{peer}", os.O_RDWR)
            # The kernel releases this lock when the process ends. Worker processes do not inherit it.
            self._locks = os.open(folder / "locks", os.O_RDWR)
            fcntl.lockf(self._locks, fcntl.LOCK_EX, 1, index)
        except OSError:
            self.close()
            raise
        self._sleepers: dict[int, select.poll] = {}
        for peer, pipe in self._pipes_from.items():
            self._sleepers[peer] = select.poll()
            self._sleepers[peer].register(pipe, select.POLLIN)

    @staticmethod
    def make(folder: Path, size: int) -> None:
        """Make the pipes and the file of locks."""
        for writer in range(size):
            for reader in range(size):
                if writer != reader:
                    os.mkfifo(folder / f"{writer}-{reader}", 0o600)
        (folder / "locks").touch(0o600)

    def send(self, signal: int, peers: Iterable[int]) -> None:
        """Send a signal, 0 to 255, to other ranks of this host. They see all that this rank has written before."""
        for peer in peers:
            os.write(self._pipes_to[peer], bytes((signal,)))

    def wait(self, signal: int, peers: Iterable[int]) -> None:
        """Wait until each of these ranks has sent this signal once more.

        Raises:
            PeerLostError: one of them has ended.
        """
        for peer in peers:
            received = self._received[peer]
            while not received[signal]:
                for one in self._read(peer):
                    received[one] += 1
            received[signal] -= 1

    def _read(self, peer: int) -> bytes:
        """Return the signals from a rank, at least one: yield at first, then sleep; on a busy core, only sleep."""
        pipe, until = self._pipes_from[peer], 0.0
        while True:
            try:
                return os.read(pipe, 64)
            except BlockingIOError:
                now = time.perf_counter()
                until = until or now + YIELD_SECONDS
                if self._busy_until <= now < until:
                    os.sched_yield()
                    after = time.perf_counter()
                    if after - now > SLOW_YIELD_SECONDS:
                        self._busy_until = after + BUSY_SECONDS
                elif not self._sleepers[peer].poll(ALIVE_MS):
                    self._check_alive()

    def _check_alive(self) -> None:
        """Raise if a rank of this host has ended."""
        for peer in self.others:
            with contextlib.suppress(OSError):  # the rank holds its lock
                fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, peer)
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, peer)  # others look as well
                break
        else:
            return
        raise PeerLostError("another rank of this host has ended")

    def close(self) -> None:
        """Close the pipes."""
        for descriptor in (*self._pipes_from.values(), *self._pipes_to.values(), self._locks):
            if descriptor >= 0:
                os.close(descriptor)
        self._pipes_from, self._pipes_to, self._locks = {}, {}, -1


class Place(NamedTuple):
    """Where other processes of this host find memory that `make_memory` made."""

    path: str
    device: int
    inode: int


def make_memory(nbytes: int) -> int:
    """Return a descriptor of new memory in /dev/shm without a name: it is gone when its last user is.

    Raises:
        OSError: there is not enough memory.
    """
    descriptor = os.open(SHARED_MEMORY, os.O_RDWR | os.O_TMPFILE, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)  # without it, a write into missing memory kills the process
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def place_of(descriptor: int) -> Place:
    """Return where other processes find this memory while the descriptor is open."""
    status = os.fstat(descriptor)
    return Place(f"/proc/{os.getpid()}/fd/{descriptor}", status.st_dev, status.st_ino)


def map_memory(place: Place) -> mmap.mmap:
    """Map the memory at a place.

    Raises:
        OSError: this rank does not see it, because it is in a container with processes of its own.
    """
    descriptor = os.open(place.path, os.O_RDWR)
    try:
        if place_of(descriptor)[1:] != place[1:]:
            raise FileNotFoundError(errno.ENOENT, "not shared", place.path)
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
