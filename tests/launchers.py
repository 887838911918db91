"""Start ranks with real launchers, and kill every process at the end.

    result = launch("mpirun", 4, ["-m", "hvdqn.train", "--preset", "smoke"], timeout=60)
    assert result.returncode == 0, result

    with start("horovodrun-gloo", 2, ["-m", "hvdqn.train"], timeout=60) as job:  # to kill a rank
        job.wait_for("updates")
        job.ranks()[1].kill()
        result = job.wait()

Every process of a job has the job's unique HVDQN_TEST_ID in its environment. When the timeout has passed, or at the end
of the `with` block, all processes with that id are killed. The test fails if the job timed out, or if its launcher
ended before its ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil
import pytest

BIN = Path(sys.executable).parent  # where horovodrun, mpirun and torchrun are installed
REPOSITORY = Path(__file__).parents[1]

_COMMANDS = {
    "python": (),
    # No cache: two horovodruns that start at the same time could read the file in ~/.horovod half written.
    "horovodrun-gloo": ("horovodrun", "--disable-cache", "--gloo", "-np", "{np}"),
    "horovodrun-mpi": ("horovodrun", "--disable-cache", "--mpi", "-np", "{np}"),
    "mpirun": ("mpirun", "-np", "{np}"),
    # Standalone: a free port instead of 29500, so that two jobs do not connect to each other.
    "torchrun": ("torchrun", "--standalone", "--nproc-per-node", "{np}", "--no-python"),
}
LAUNCHERS = tuple(_COMMANDS)

_RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "RANK")
_INHERITED = ("HOROVOD_", "OMPI_", "PMI_", "PMIX_", "SLURM_", "TORCHELASTIC_")
_INHERITED_EXACT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long the last processes of a job may take to end after its launcher.
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Result:
    """The launcher's exit code, the output of all ranks, and how long the job ran."""

    returncode: int | None  # None while the job runs
    stdout: str
    stderr: str
    seconds: float
    ended: float  # time.time() at the end, to compare with times that ranks print

    def __str__(self) -> str:
        return (
            f"exit code {self.returncode} after {self.seconds:.1f} s\n"
            f"--- stdout\n{self.stdout[-4000:]}\n--- stderr\n{self.stderr[-4000:]}"
        )


def launch(
    launcher: str,
    np: int,
    args: Sequence[str],
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Result:
    """Run `python *args` on `np` ranks under `launcher` (one of `LAUNCHERS`), and wait for it.

    Args:
        launcher: "python" starts one process without a launcher.
        np: number of ranks; there may be fewer cores.
        args: arguments of `python`, such as ["-m", "hvdqn.train", ...] or [script, ...].
        timeout: seconds after which the job is killed and the test fails.
        env: variables to add to `clean_environment()`.
        cwd: the folder in which to start; that of this process if None.
    """
    with start(launcher, np, args, timeout, env, cwd) as job:
        return job.wait()


def start(
    launcher: str,
    np: int,
    args: Sequence[str],
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Job:
    """Start a job as `launch` does, without waiting. Use it as a context manager, which kills what is left."""
    if launcher == "python" and np != 1:
        raise ValueError("python starts one process; choose a launcher for more")
    command = [word.format(np=np) for word in _COMMANDS[launcher]]
    if command:
        program = shutil.which(command[0], path=str(BIN))
        if program is None:
            pytest.skip(f"{command[0]} is not installed in {BIN}: {launcher} is NOT tested")
        command[0] = program
    return Job([*command, sys.executable, *args], np, timeout, clean_environment() | dict(env or {}), cwd)


def launch_line(
    line: str, np: int, timeout: float, env: Mapping[str, str] | None = None, cwd: str | Path | None = None
) -> Result:
    """Run a shell command line with this environment's programs in PATH, and wait for it; see `launch`."""
    with Job(["bash", "-c", line], np, timeout, clean_environment() | dict(env or {}), cwd) as job:
        return job.wait()


def clean_environment() -> dict[str, str]:
    """Return this process's environment without variables of launchers, and with settings for tests."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_INHERITED) and name not in _INHERITED_EXACT
    }
    env["PATH"] = f"{BIN}{os.pathsep}{env.get('PATH', os.defpath)}"
    # Ranks import hvdqn from this repository, whatever is installed.
    env["PYTHONPATH"] = f"{REPOSITORY}{os.pathsep}{env.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    env["OMP_NUM_THREADS"] = "1"
    # There may be more ranks than cores: bind none to a core, and let waiting ranks yield theirs.
    env["OMPI_MCA_rmaps_base_oversubscribe"] = "1"
    env["OMPI_MCA_hwloc_base_binding_policy"] = "none"
    env["OMPI_MCA_mpi_yield_when_idle"] = "1"
    env["HVDQN_SLEEP_WHEN_WAITING"] = "1"
    env["HOROVOD_CYCLE_TIME"] = "1"  # with hvdqn's 0, Horovod's threads would take the cores from the ranks
    if os.geteuid() == 0:
        env["OMPI_ALLOW_RUN_AS_ROOT"] = env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    return env


class Job:
    """A running job: its launcher, its ranks and their output so far."""

    def __init__(
        self,
        command: Sequence[str],
        np: int,
        timeout: float,
        env: Mapping[str, str],
        cwd: str | Path | None,
    ) -> None:
        self.np = np
        self._without_launcher = command[0] == sys.executable
        self._id = uuid.uuid4().hex
        self._timeout = timeout
        # Files, not pipes: a full pipe would block the job, and tests read the output while the job runs.
        self._stdout = tempfile.TemporaryFile()  # noqa: SIM115
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._stdout,
            stderr=self._stderr,
            env=dict(env) | {"HVDQN_TEST_ID": self._id},
            cwd=cwd,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )

    @property
    def launcher(self) -> psutil.Process:
        """Return the process that was started: mpirun, horovodrun, torchrun or python."""
        return psutil.Process(self._process.pid)

    def output(self) -> str:
        """Return the output of all ranks so far, stdout then stderr."""
        return _text(self._stdout) + _text(self._stderr)

    def wait_for(self, text: str) -> None:
        """Wait until the output contains `text`; fail if the job ends or times out first."""
        self.wait_until(lambda: text in self.output(), f"it had printed {text!r}")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition()` is true; fail if the job ends or times out before `what`."""
        while not condition():
            if self._process.poll() is not None and not condition():
                raise AssertionError(f"the job ended before {what}\n{self._result()}")
            self._check_time(f"waiting until {what}")
            time.sleep(0.02)

    def ranks(self) -> dict[int, psutil.Process]:
        """Wait until all ranks run; return their python processes."""
        while True:
            found: dict[int, psutil.Process] = {}
            for process in sorted(
                self.alive(), key=_start_time
            ):  # a rank comes before the workers that it forks
                rank = self._rank_of(process)
                if rank is not None:
                    found.setdefault(rank, process)
            if len(found) == self.np:
                return found
            self._check_time(f"only the ranks {sorted(found)} of {self.np} were found")
            time.sleep(0.05)

    def alive(self) -> list[psutil.Process]:
        """Return every process of the job that has not ended: launcher, daemons, ranks and their children."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def wait(self) -> Result:
        """Wait for the launcher; fail if it times out or any process outlives it."""
        while self._process.poll() is None:
            self._check_time("it was still running")
            time.sleep(0.02)
        result = self._result()
        deadline = time.monotonic() + _GRACE_SECONDS
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.05)
        if left:
            names = [f"{process.pid}: {' '.join(_command_line(process))[:200]}" for process in left]
            self.kill()
            raise AssertionError("left behind by the job:\n" + "\n".join(names) + f"\n{result}")
        return result

    def kill(self) -> None:
        """Kill every process of the job."""
        # A process may start another one meanwhile, so repeat until none is found.
        while left := self.alive():
            for process in left:
                _signal(process, signal.SIGKILL)
            self._process.poll()  # reap the launcher
            time.sleep(0.01)
        self._process.wait()

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self._stdout.close()
        self._stderr.close()

    def _result(self) -> Result:
        return Result(
            returncode=self._process.poll(),
            stdout=_text(self._stdout),
            stderr=_text(self._stderr),
            seconds=time.monotonic() - self._started,
            ended=time.time(),
        )

    def _check_time(self, state: str) -> None:
        if time.monotonic() - self._started > self._timeout:
            result = self._result()
            self.kill()
            raise AssertionError(f"the job was killed after {self._timeout} s: {state}\n{result}")

    def _is_ours(self, process: psutil.Process) -> bool:
        return _environment(process).get("HVDQN_TEST_ID") == self._id

    def _rank_of(self, process: psutil.Process) -> int | None:
        # A rank runs python; the launcher's own shells and daemons do not.
        if _command_line(process)[:1] != [sys.executable]:
            return None
        environment = _environment(process)
        for name in _RANK_VARIABLES:
            if name in environment:
                return int(environment[name])
        # torchrun and horovodrun are scripts of the same Python, but not ranks.
        return 0 if self._without_launcher and process.pid == self._process.pid else None


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    # If pytest is killed it cannot clean up: then the kernel signals the launcher, which ends its ranks.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _text(file: IO[bytes]) -> str:
    number = file.fileno()
    # pread does not move the file offset, which this descriptor shares with the ranks.
    return os.pread(number, os.fstat(number).st_size, 0).decode(errors="replace")


def _start_time(process: psutil.Process) -> float:
    try:
        return process.create_time()
    except psutil.Error:
        return float("inf")


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return {}
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.Error, OSError):
        return []


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
