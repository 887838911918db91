"""Run benchmarks as jobs of their own, started by a launcher, on chosen cores."""

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
# Variables that mark a process as a rank. A job started by a rank must not inherit them.
RANK_VARIABLES = (
    "HOROVOD_RANK", "OMPI_", "PMI_", "PMIX_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_",
)  # fmt: skip
# Variables that begin like those above, but are the user's settings of MPI.
MPI_SETTINGS = ("OMPI_MCA_", "OMPI_ALLOW_")


@dataclass(frozen=True)
class Engine:
    """One way to connect ranks: the command that starts them, and `--comm`."""

    launcher: tuple[str, ...]
    comm: str
    needs: str
    """The module that must be installed."""


# Ranks are not bound to cores: Open MPI would keep all threads of a single rank on one core. `--pin` binds them under
# every launcher.
_MPIRUN = ("mpirun", "--oversubscribe", "--bind-to", "none", "-np", "{np}")
ENGINES: Mapping[str, Engine] = {
    "mpi": Engine(_MPIRUN, "mpi", "mpi4py"),
    "horovod-mpi": Engine(_MPIRUN, "horovod", "horovod"),
    "horovod-gloo": Engine(("horovodrun", "--gloo", "-np", "{np}"), "horovod", "horovod"),
    "torch": Engine(
        ("torchrun", "--standalone", "--nproc-per-node", "{np}", "--no-python"), "torch", "torch"
    ),
}


def available_engines() -> list[str]:
    """Return the engines whose launcher and library are installed."""
    return [
        name
        for name, engine in ENGINES.items()
        if find_spec(engine.needs) is not None and _find_program(engine.launcher[0]) is not None
    ]


def _search_path() -> str:
    # Programs of this Python's environment come first, even if the environment is not activated.
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _find_program(name: str) -> str | None:
    return shutil.which(name, path=_search_path())


def job_environment() -> dict[str, str]:
    """Return the environment variables of a job: those of this process, without a rank's and with this package."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(RANK_VARIABLES) or name.startswith(MPI_SETTINGS)
    }
    env["PATH"] = _search_path()
    env["PYTHONPATH"] = f"{PACKAGE_ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    return env


def run_bench_job(
    args: Sequence[str],
    engine: str = "",
    np: int = 1,
    cores: Sequence[int] = (),
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run `hvdqn bench ARGS` as a job and return the JSON that it wrote.

    Args:
        args: the benchmark and its flags.
        engine: a key of `ENGINES`, or "" for one process without a launcher.
        np: the number of ranks.
        cores: the cores that the job may use; by default all that this process may use.
        stopped: called every second; the job is terminated when it returns True.

    Raises:
        UserError: the job failed; the message holds the reason, or the end of the job's output.
    """
    with tempfile.TemporaryDirectory(prefix="hvdqn-bench-") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "hvdqn", "bench", *args, "--json", str(result)]
        if engine:
            launcher = [word.format(np=np) for word in ENGINES[engine].launcher]
            launcher[0] = _find_program(launcher[0]) or launcher[0]
            command = [*launcher, *command, "--comm", ENGINES[engine].comm]
        run_command(command, cores, stopped)
        content: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return content


def run_command(
    command: Sequence[str], cores: Sequence[int] = (), stopped: Callable[[], bool] = lambda: False
) -> str:
    """Run a command on these cores until it ends; return its standard output.

    Args:
        command: the program and its arguments.
        cores: the cores that it may use; by default all that this process may use.
        stopped: called every second; the command is terminated when it returns True.

    Raises:
        UserError: the command failed.
    """
    process = _start(command, cores)
    try:
        output, errors = _communicate(process, stopped)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        raise UserError(_failure(command, process.returncode, errors.strip() or output.strip()))
    return output


def _start(command: Sequence[str], cores: Sequence[int]) -> subprocess.Popen[str]:
    before = os.sched_getaffinity(0)
    # The child inherits the cores of this process. `preexec_fn` is not safe in a process that has threads.
    os.sched_setaffinity(0, cores or before)
    try:
        return subprocess.Popen(
            command,
            env=job_environment(),
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


def _communicate(process: subprocess.Popen[str], stopped: Callable[[], bool]) -> tuple[str, str]:
    terminated = False
    while True:
        try:
            return process.communicate(timeout=1.0)
        except subprocess.TimeoutExpired:
            if stopped() and not terminated:
                process.terminate()
                terminated = True


def _failure(command: Sequence[str], code: int, output: str) -> str:
    """Return the error message that a job printed, or the end of its output if there is none."""
    if message := re.search(r"hvdqn[\w ]*: error: (.*)", output):
        return message[1]
    shown = " ".join("..." if "\n" in word else word for word in command)
    return f"{shown} ended with exit code {code}: {output[-600:]}"
