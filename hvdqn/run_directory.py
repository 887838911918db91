"""Create the run directory, check that all ranks see it, lock it against other jobs, and write its `config.yaml`."""

from __future__ import annotations

import contextlib
import json
import logging
import os.path
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hvdqn.comm import Comm
from hvdqn.config import Config, as_yaml
from hvdqn.errors import UserError
from hvdqn.faults import raise_on_all_ranks
from hvdqn.metrics import replace_file
from hvdqn.paths import absolute

log = logging.getLogger(__name__)

LAUNCH = "# launch: "  # begins the comment of a launch in config.yaml


def open_run_dir(config: Config, comm: Comm) -> Path:
    """Create the run directory on rank 0 if it does not exist, and return its path on all ranks.

    Without `--run-dir` it is a new one, `runs/<environment>-<preset>-seed<seed>-<time>`. All ranks must call this
    together.

    Raises:
        UserError: rank 0 cannot write to the directory, or another rank does not see it.
    """
    probe = comm.broadcast_object(f".visible-{time.time_ns()}")
    made = raise_on_all_ranks(comm, lambda: _make_run_dir(config, probe) if comm.rank == 0 else "")
    run_dir = absolute(comm.broadcast_object(made))  # hosts may mount a shared folder at different places
    try:
        raise_on_all_ranks(comm, lambda: wait_until_visible(run_dir / probe, comm.rank))
    except UserError:
        with contextlib.suppress(OSError):
            (run_dir / probe).unlink()
            run_dir.rmdir()
        raise
    if comm.rank == 0:
        (run_dir / probe).unlink(missing_ok=True)
    return run_dir


def _make_run_dir(config: Config, probe: str) -> str:
    """Create the run directory and a file named `probe` in it; return its path, relative if `--run-dir` is."""
    path = Path(config.run.run_dir or _default_path(config))
    try:
        if config.run.run_dir:
            absolute(path).mkdir(parents=True, exist_ok=True)
        else:
            path = path.with_name(_make_new_directory(absolute(path)).name)
        (absolute(path) / probe).touch()
    except OSError as error:
        raise UserError(
            f"cannot write to the run directory '{path}': {error.strerror}; choose another with --run-dir"
        ) from None
    return str(path)


def _default_path(config: Config) -> Path:
    """Return the path of a run directory without `--run-dir`: `runs/<environment>-<preset>-seed<seed>-<time>`."""
    time_now = time.strftime("%Y%m%d-%H%M%S")
    words = (config.environment.env, config.preset, f"seed{config.run.seed}", time_now)
    return Path("runs") / "-".join(re.sub(r"[^\w.]+", "_", word) for word in words if word)


def _make_new_directory(path: Path) -> Path:
    """Create a new directory and return its path, with a number appended if `path` exists already."""
    new, number = path, 1
    while True:
        try:
            new.mkdir(parents=True)
            return new
        except FileExistsError:
            number += 1
            new = path.with_name(f"{path.name}-{number}")


def wait_until_visible(probe: Path, rank: int, patience_seconds: float = 10.0) -> None:
    """Wait until this rank sees the file `probe` that rank 0 wrote; some network file systems take a moment.

    Raises:
        UserError: this rank does not see the file within `patience_seconds`.
    """
    deadline = time.monotonic() + patience_seconds
    while not os.path.exists(probe):  # noqa: PTH110 - Path.exists raises if the directory may not be entered
        if time.monotonic() > deadline:
            raise UserError(
                f"rank {rank} on host {socket.gethostname()} does not see what rank 0 writes to the run directory "
                f"'{probe.parent}'; with --run-dir name a folder that all hosts share"
            )
        time.sleep(0.1)


@contextlib.contextmanager
def sole_job(run_dir: Path, comm: Comm, patience_seconds: float = 10.0) -> Iterator[None]:
    """Lock the run directory against other jobs during the `with` block. All ranks must enter it together.

    The kernel releases the lock however the job ends. On a file system without locks, this logs a warning and locks
    nothing.

    Args:
        run_dir: the run directory, in which the lock file lies.
        comm: the collectives over all ranks of this job; rank 0 holds the lock.
        patience_seconds: how long to wait for another job that holds the lock, which may be about to end.

    Raises:
        UserError: another job trains in this directory.
    """
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            if comm.rank == 0:
                stack.enter_context(_locked(run_dir / "lock", patience_seconds))

        raise_on_all_ranks(comm, lock)
        yield


@contextlib.contextmanager
def _locked(path: Path, patience_seconds: float) -> Iterator[None]:
    lock = FileLock(path, timeout=patience_seconds, poll_interval=0.1, mode=0o644, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another job trains in '{path.parent}'; wait until it ends, or choose another --run-dir"
        ) from None
    except OSError:
        log.warning(
            f"the file system of '{path.parent}' has no locks: make sure that no second job trains there"
        )
    try:
        yield
    finally:
        if lock.is_locked:
            # Removed before the lock is released, so that a job that waits for it notices, and creates a new file.
            with contextlib.suppress(OSError):
                path.unlink()
            lock.release()


def record_config(
    config: Config, comm: Comm, run_dir: Path, launch: Mapping[str, Any] | None = None, anew: bool = False
) -> None:
    """Write `config.yaml` on rank 0: a comment for each launch, then the settings; if that fails, only log a warning.

    Args:
        config: the configuration.
        comm: the collectives over all ranks.
        run_dir: the run directory.
        launch: what `Launch.describe` returned; None if the file has it already.
        anew: whether the run begins. A different `config.yaml`, perhaps the user's own, is then kept as `*.old`.
    """
    path, text = run_dir / "config.yaml", as_yaml(config)
    try:
        if comm.rank == 0:
            text_before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
            before = text_before.splitlines()
            launches = [line for line in before if line.startswith(LAUNCH)]
            settings = [line for line in before if not line.startswith(LAUNCH)]
            if anew and settings and settings != text.splitlines():
                set_aside(path)
                launches = []
            if launch is not None:
                launches.append(LAUNCH + json.dumps(launch))
            replace_file(path, "\n".join([*launches, text]).encode())
    except OSError as error:
        log.warning(f"config.yaml could not be written: {error}")


def read_launches(run_dir: Path) -> list[dict[str, Any]]:
    """Return the launches that `config.yaml` records, oldest first; none if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        lines = (run_dir / "config.yaml").read_text(encoding="utf-8").splitlines()
        return [json.loads(line.removeprefix(LAUNCH)) for line in lines if line.startswith(LAUNCH)]
    return []


def set_aside(path: Path) -> str:
    """Rename a file to `*.old`, so that it is not overwritten; return the new name, or "" if it is missing or empty.

    Raises:
        OSError: the file cannot be renamed.
    """
    if not path.is_file() or not path.stat().st_size:
        return ""
    old, number = path.with_name(f"{path.name}.old"), 1
    while old.exists():
        number += 1
        old = path.with_name(f"{path.name}.old{number}")
    return path.rename(old).name
