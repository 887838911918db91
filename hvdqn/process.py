"""Settings of this process: floating-point mode, memory allocator, threads."""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from hvdqn.comm import Comm, kill_descendants
from hvdqn.config import Config
from hvdqn.networks import QNetwork

# In a network with fewer parameters than this, one operation is too short for a second thread to help.
PARAMETERS_WORTH_THREADS = 500_000
# How long a process that has finished waits for the processes that its environments left.
EXIT_SECONDS = 5.0


def tune_process() -> None:
    """Set up a process that does nothing but train.

    Call it before other threads start: they inherit the floating-point mode.
    """
    flush_denormals()
    keep_freed_memory()
    threading.Thread(target=_end_leftovers, name="exit", daemon=True).start()


@contextmanager
def borrowed_process() -> Iterator[None]:
    """Set up a process that also does other things, such as a notebook, and restore its settings after the body.

    These are the floating-point mode (denormals are flushed, on the main thread only) and the numbers of threads of
    torch and NumPy.
    """
    flushing, threads, blas = flushes_denormals(), torch.get_num_threads(), threadpool_limits(None)
    if threading.current_thread() is threading.main_thread():
        flush_denormals()
    try:
        yield
    finally:
        torch.set_flush_denormal(flushing)
        torch.set_num_threads(threads)
        blas.restore_original_limits()


def flushes_denormals() -> bool:
    """Return True if this thread treats denormal numbers (smaller in magnitude than about 1e-38) as zero."""
    return not float(torch.tensor(1e-39) * 0.5)


def flush_denormals() -> None:
    """Make the processor treat denormal numbers (smaller in magnitude than about 1e-38) as zero, if it can.

    Adam's moments of weights without a gradient fade to such numbers, and some processors compute with them very
    slowly.
    """
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Make the C library keep up to 1 GiB of freed memory instead of returning it to the kernel.

    Every update allocates the same large tensors again, and new pages from the kernel cost time. Without `mallopt` in
    the C library nothing changes.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in <malloc.h>
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 1 << 25)
        library.mallopt(trim_threshold, 1 << 30)


def _end_leftovers() -> None:
    """Kill child processes that environments have left running, a while after the main thread has ended.

    Python ends daemon processes at exit, but waits without limit for all other child processes.
    """
    threading.main_thread().join()
    time.sleep(EXIT_SECONDS)
    kill_descendants()


def use_threads(network: QNetwork, threads: int) -> None:
    """Set the number of threads of torch and NumPy: one for a small network, else `threads`."""
    small = sum(p.numel() for p in network.parameters()) < PARAMETERS_WORTH_THREADS
    used = 1 if small else threads
    torch.set_num_threads(used)
    threadpool_limits(used, user_api="blas")


def share_of_cores(config: Config, comm: Comm) -> int:
    """Return the number of threads of this rank: `--threads-per-rank`, or its share of the cores it may use.

    A collective call: launchers may bind each rank to cores of its own, or all ranks of a host to the same cores. All
    ranks of a host share the quota of its control group.
    """
    mine, ranks = os.sched_getaffinity(0), comm.cores_of_host()
    sharing = sum(not mine.isdisjoint(cores) for cores in ranks)
    share = min(len(mine) / sharing, cpu_quota() / len(ranks))
    return config.parallel.threads_per_rank or max(1, int(share))


def usable_cores() -> int:
    """Return the number of cores that this process may keep busy."""
    return max(1, int(min(len(os.sched_getaffinity(0)), cpu_quota())))


def cpu_quota(root: Path = Path("/")) -> float:
    """Return how many cores the control groups let this process use, as `docker --cpus` sets; infinite without a limit.

    Args:
        root: of the file system.
    """
    mounts = root / "sys" / "fs" / "cgroup"
    try:
        groups = [line.split(":", 2)[1:] for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return math.inf
    quota = math.inf
    for controllers, path in groups:
        if not controllers:
            mount = mounts  # cgroup v2
        elif "cpu" in controllers.split(","):
            mount = mounts / controllers if (mounts / controllers).is_dir() else mounts / "cpu"
        else:
            continue
        # A container may see the path that its group has on the host, but find only the group itself, at the mount.
        group = mount / path.strip("/")
        for folder in (group, *group.parents):
            quota = min(quota, _quota_of_group(folder))
            if folder == mount:
                break
    return quota


def _quota_of_group(folder: Path) -> float:
    """Return the quota of one control group in cores; infinite if it has none, or is not visible."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if quota.strip() not in ("max", "-1") else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
