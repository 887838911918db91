"""Where a run comes from: its command line, git commits, hosts and versions."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import hvdqn
from hvdqn.comm import Comm
from hvdqn.paths import absolute

# The libraries that decide what a run computes, where they are loaded.
LIBRARIES = ("torch", "numpy", "gymnasium", "horovod", "mpi4py", "ale_py")
GIT_SECONDS = 5.0


class Launch:
    """This launch of a run. Rank 0 asks git in the background, while the ranks build their parts.

    Args:
        comm: the ranks; a collective call.
    """

    def __init__(self, comm: Comm) -> None:
        self.started_at = time_now()
        self.hosts = sorted(set(comm.all_gather_object(socket.gethostname())))
        self._rank = comm.rank
        self._git = {"git": ask_git(absolute("."))} if comm.rank == 0 else {}
        source = Path(hvdqn.__file__).parents[1]
        if comm.rank == 0 and (source / ".git").exists():  # a clone, not a wheel
            self._git["hvdqn_git"] = ask_git(source)

    def describe(self) -> dict[str, Any]:
        """Return what is recorded. `git` is the commit of the folder of the start, `hvdqn_git` that of hvdqn."""
        versions = {"hvdqn": hvdqn.__version__, "python": sys.version.split()[0]}
        loaded = {name: str(sys.modules[name].__version__) for name in LIBRARIES if name in sys.modules}
        return {
            "started_at": self.started_at,
            "command": shlex.join(sys.orig_argv),
            "folder": str(absolute(".")),
            "hosts": self.hosts,
            **{name: answer_of(process) for name, process in self._git.items()},
            "versions": {**versions, **loaded},
        }


def time_now() -> str:
    """Return the time in UTC, in ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def ask_git(folder: Path) -> subprocess.Popen[str] | None:
    """Start to ask git for the commit and the changes of a folder's repository; None without git."""
    # Files that git does not track do not count as changes: looking for them takes seconds in large folders.
    words = ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    with suppress(OSError):
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    return None


def answer_of(process: subprocess.Popen[str] | None) -> dict[str, Any] | None:
    """Return the commit and whether tracked files were changed since; None outside of a repository."""
    if process is None:
        return None
    try:
        text, _ = process.communicate(timeout=GIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None
    commits = [line.split()[-1] for line in text.splitlines() if line.startswith("# branch.oid ")]
    if process.returncode or not commits:
        return None
    return {"commit": commits[0], "dirty": any(not line.startswith("#") for line in text.splitlines())}
