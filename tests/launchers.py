"""Start real ranks through the users' own launchers, and leave nothing behind.

    result = launch("mpirun", 4, ["-m", "hvdqn.train", "--preset", "smoke"], timeout=60)
    assert result.returncode == 0, result

    with start("horovodrun-gloo", 2, ["-m", "hvdqn.train"], timeout=60) as job:  # to inject a fault
        job.wait_for("updates")
        job.ranks()[1].kill()
        result = job.wait()

Every process of a job carries a unique HVDQN_TEST_ID in its environment. When the job's timeout has passed, or the
`with` block is left, all that still carry it are killed. A job that had to be killed for its timeout, or whose
launcher ended before its ranks did, fails the test.
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

BIN = Path(sys.executable).parent  # the venv's own horovodrun, mpirun and torchrun
REPOSITORY = Path(__file__).parents[1]

_COMMANDS = {
    "python": (),
    # No cache: horovodruns that start side by side would find the one file in ~/.horovod half written.
    "horovodrun-gloo": ("horovodrun", "--disable-cache", "--gloo", "-np", "{np}"),
    "horovodrun-mpi": ("horovodrun", "--disable-cache", "--mpi", "-np", "{np}"),
    "mpirun": ("mpirun", "-np", "{np}"),
    # Standalone: a free port instead of 29500, so that two jobs do not meet. The command is no script but python.
    "torchrun": ("torchrun", "--standalone", "--nproc-per-node", "{np}", "--no-python"),
}
LAUNCHERS = tuple(_COMMANDS)

_RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "RANK")
_INHERITED = ("HOROVOD_", "OMPI_", "PMI_", "PMIX_", "SLURM_", "TORCHELASTIC_")
_INHERITED_EXACT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long the last processes of a job may take to vanish once its launcher has returned.
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Result:
    """What a job left: the launcher's exit code, what all ranks printed, and how long it ran."""

    returncode: int | None  # None: it has not ended
    stdout: str
    stderr: str
    seconds: float
    ended: float  # as time.time() has it, to compare with what the ranks print

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
    """Run `python *args` on `np` ranks under `launcher` (one of `LAUNCHERS`) to its end.

    Args:
        launcher: "python" starts one process without a launcher.
        np: ranks; more than there are cores is fine.
        args: what follows `python`, such as ["-m", "hvdqn.train", ...] or [script, ...].
        timeout: seconds after which the job is killed and the test fails.
        env: variables to add to this process's environment, less what launchers set.
        cwd: where to start; this process's folder if None.
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
    """Like `launch`, but return at once. Use it as a context manager, which kills what is left at its end."""
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
    """Run a line as a user types it, with this environment's programs, to its end; see `launch`."""
    with Job(["bash", "-c", line], np, timeout, clean_environment() | dict(env or {}), cwd) as job:
        return job.wait()


def clean_environment() -> dict[str, str]:
    """This process's environment as a fresh shell would have it: of no rank, one thread each, root allowed."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_INHERITED) and name not in _INHERITED_EXACT
    }
    env["PATH"] = f"{BIN}{os.pathsep}{env.get('PATH', os.defpath)}"
    # The checkout under test, wherever the job starts and whatever is installed.
    env["PYTHONPATH"] = f"{REPOSITORY}{os.pathsep}{env.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    env["OMP_NUM_THREADS"] = "1"
    # There are more ranks than cores: none is tied to a core, and those that wait leave it to those they wait for.
    env["OMPI_MCA_rmaps_base_oversubscribe"] = "1"
    env["OMPI_MCA_hwloc_base_binding_policy"] = "none"
    env["OMPI_MCA_mpi_yield_when_idle"] = "1"
    env["HVDQN_SLEEP_WHEN_WAITING"] = "1"
    env["HOROVOD_CYCLE_TIME"] = "1"  # not hvdqn's 0: its threads look for tensors in what time they can get
    if os.geteuid() == 0:
        env["OMPI_ALLOW_RUN_AS_ROOT"] = env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    return env


class Job:
    """A job under way: the launcher, its ranks and their output so far."""

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
        # Files, not pipes: nothing blocks when nobody reads, and a test can look while the job runs.
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
        """The process that was started: mpirun, horovodrun, torchrun, or python itself."""
        return psutil.Process(self._process.pid)

    def output(self) -> str:
        """What all ranks printed so far, stdout then stderr."""
        return _text(self._stdout) + _text(self._stderr)

    def wait_for(self, text: str) -> None:
        """Return once `text` stands in the output; fail if the job ends or times out first."""
        self.wait_until(lambda: text in self.output(), f"it had printed {text!r}")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Return once `condition` holds; fail if the job ends or times out before `what`."""
        while not condition():
            if self._process.poll() is not None and not condition():
                raise AssertionError(f"the job ended before {what}\n{self._result()}")
            self._check_time(f"waiting until {what}")
            time.sleep(0.02)

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the python process of every rank, once all of them run."""
        while True:
            found: dict[int, psutil.Process] = {}
            for process in sorted(self.alive(), key=_age):  # a rank is older than the workers it forks
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
        """Wait for the end; fail on a timeout, and if any process outlives the launcher."""
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
        # A parent may start another child while it is being looked for: until none is found.
        while left := self.alive():
            for process in left:
                _signal(process, signal.SIGKILL)
            self._process.poll()  # reap the launcher: a zombie is not alive
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
        # Ranks are told apart from the launcher's own shells and daemons by what they run.
        if _command_line(process)[:1] != [sys.executable]:
            return None
        environment = _environment(process)
        for name in _RANK_VARIABLES:
            if name in environment:
                return int(environment[name])
        # Not the process of torchrun or horovodrun: these are scripts of the same Python.
        return 0 if self._without_launcher and process.pid == self._process.pid else None


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    # A pytest that is itself killed runs no clean-up: then the launcher is told, and ends its ranks.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _text(file: IO[bytes]) -> str:
    number = file.fileno()
    # pread: the ranks go on writing at the offset that they share with this descriptor.
    return os.pread(number, os.fstat(number).st_size, 0).decode(errors="replace")


def _age(process: psutil.Process) -> float:
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
