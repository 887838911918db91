"""Find and kill the processes that this process has started, and those that they have started in turn."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def descendants() -> list[int]:
    """Return the ids of all living processes that descend from this one."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # The process may have ended meanwhile. Its name, in parentheses, may contain anything.
        with contextlib.suppress(OSError, ValueError):
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [os.getpid()]
    for process in found:  # the loop visits also what it appends
        found += children.get(process, [])
    return found[1:]


def kill_descendants() -> None:
    """Kill all processes that descend from this one, such as environments' worker processes and their helpers.

    It spares the resource tracker of `multiprocessing`, which removes shared memory after its last user and then ends.
    """
    for _ in range(2):  # the second pass finds processes that were started during the first
        for process in descendants():
            with contextlib.suppress(OSError):
                if b"resource_tracker" not in Path(f"/proc/{process}/cmdline").read_bytes():
                    os.kill(process, signal.SIGKILL)
