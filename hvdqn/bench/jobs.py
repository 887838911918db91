"""Benchmarks as jobs of their own: started by a launcher, on chosen cores, read back as JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hvdqn.errors import UserError

PACKAGE_ROOT = Path(__file__).parents[2]
# What marks a process as a rank: a job started from a rank would take itself for that rank.
_OF_A_RANK = ("HOROVOD_RANK", "OMPI_", "PMI_", "PMIX_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_")


@dataclass(frozen=True)
class Engine:
    """One way to connect ranks: the command that starts them, and `--comm`."""

    launcher: tuple[str, ...]
    comm: str
    needs: str
    """Module without which it cannot be had."""


# Not bound to cores: open MPI would keep all threads of a lone rank on one core. `--pin` does it for every launcher.
_MPIRUN = ("mpirun", "--oversubscribe", "--bind-to", "none", "-np", "{np}")
ENGINES: Mapping[str, Engine] = {
    "mpi": Engine(_MPIRUN, "mpi", "mpi4py"),
    "horovod-mpi": Engine(_MPIRUN, "horovod", "horovod"),
    "horovod-gloo": Engine(("horovodrun", "--gloo", "-np", "{np}"), "horovod", "horovod"),
    "torch": Engine(
        ("torchrun", "--standalone", "--nproc-per-node", "{np}", "--no-python"), "torch", "torch"
    ),
}


def available() -> list[str]:
    """Engines whose launcher and library are installed."""
    return [
        name
        for name, engine in ENGINES.items()
        if find_spec(engine.needs) is not None and _program(engine.launcher[0]) is not None
    ]


def _search_path() -> str:
    # Those of the environment that this Python belongs to come first, whether it was activated or not.
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _program(name: str) -> str | None:
    return shutil.which(name, path=_search_path())


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a job is started with: as if from a shell, and with the package that runs now."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_RANK)}
    # Settings of the user's MPI stay.
    env |= {
        name: value for name, value in os.environ.items() if name.startswith(("OMPI_MCA_", "OMPI_ALLOW_"))
    }
    env["PATH"] = _search_path()
    env["PYTHONPATH"] = f"{PACKAGE_ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    return env | dict(variables or {})


def bench(
    words: Sequence[str],
    engine: str = "",
    np: int = 1,
    cores: Sequence[int] = (),
    variables: Mapping[str, str] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run `hvdqn bench WORDS` as a job and return the JSON it wrote.

    Args:
        words: benchmark and flags.
        engine: of `ENGINES`; "": one process without a launcher.
        np: ranks.
        cores: that the job may use; all that this process may if none are given.
        variables: to set beside this process's environment.
        stopped: whether the job is to be ended, looked at now and then.

    Raises:
        UserError: the job failed; the message holds why, or the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="hvdqn-bench-") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "hvdqn", "bench", *words, "--json", str(result)]
        if engine:
            launcher = [word.format(np=np) for word in ENGINES[engine].launcher]
            launcher[0] = _program(launcher[0]) or launcher[0]
            command = [*launcher, *command, "--comm", ENGINES[engine].comm]
        run(command, cores, variables, stopped)
        read: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return read


def run(
    command: Sequence[str],
    cores: Sequence[int] = (),
    variables: Mapping[str, str] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Run a command on these cores until it ends or is to be `stopped`; return what it printed.

    Raises:
        UserError: it failed.
    """
    before = os.sched_getaffinity(0)
    # Inherited by the child; `preexec_fn` is not safe in a process that has threads.
    os.sched_setaffinity(0, cores or before)
    try:
        process = subprocess.Popen(
            command,
            env=environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise UserError(f"cannot start {command[0]}: {error.strerror}") from None
    finally:
        os.sched_setaffinity(0, before)
    try:
        printed, said = _communicate(process, stopped)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        raise UserError(_why(command, process.returncode, said.strip() or printed.strip()))
    return printed


def _communicate(process: subprocess.Popen[str], stopped: Callable[[], bool]) -> tuple[str, str]:
    told = False
    while True:
        try:
            return process.communicate(timeout=1.0)
        except subprocess.TimeoutExpired:
            if stopped() and not told:
                process.terminate()
                told = True


def _why(command: Sequence[str], code: int, said: str) -> str:
    """What a job that failed said of it, in its own words where it knew."""
    if known := re.search(r"hvdqn[\w ]*: error: (.*)", said):
        return known[1]
    shown = " ".join("..." if "\n" in word else word for word in command)
    return f"{shown} ended with exit code {code}: {said[-600:]}"
