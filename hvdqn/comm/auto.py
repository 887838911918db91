"""Detect the launcher that started this process, and choose an engine that works under it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from hvdqn.errors import LaunchError

# Launchers may be nested: srun starts mpirun's daemons, and srun or mpirun may start one torchrun on each host. The
# variables of all of them are then set, so the list begins with the launcher that can only be the innermost one.
# Each entry: the launcher, its variable for the rank, its variable for the size, another variable that must be set.
_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", ""),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ""),  # also horovodrun --mpi
    ("mpiexec", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", ""),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", ""),
    # Not SLURM_NTASKS: batch scripts and salloc shells have it too, with SLURM_PROCID=0.
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ""),
    ("PMIx", "PMIX_RANK", "", ""),
    ("hand", "RANK", "WORLD_SIZE", "MASTER_ADDR"),
)
_MPI_LAUNCHERS = ("mpirun", "mpiexec", "srun", "PMIx")


@dataclass(frozen=True, slots=True)
class LauncherInfo:
    """Describes a launcher that started this process, as its environment variables do.

    Attributes:
        launcher: the name of the launcher.
        rank: the rank of this process, 0 <= rank < size.
        size: how many ranks the launcher started; 0 if its variables do not say.
        variable: the environment variable that holds the size.
    """

    launcher: str
    rank: int
    size: int
    variable: str

    @property
    def starts_mpi(self) -> bool:
        """Whether MPI_Init finds the other ranks when this launcher has started them."""
        return self.launcher in _MPI_LAUNCHERS


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine to use, one line that says why, and the launcher that started this process (None: no launcher did)."""

    engine: str
    why: str
    launcher: LauncherInfo | None


@dataclass(frozen=True, slots=True)
class _Engine:
    """What an engine needs, and the advice that its error messages give.

    Attributes:
        module: the Python module that must be installed.
        install: the advice if it is not installed.
        launchers: the launchers under which the engine works.
        start: the command that starts ranks for this engine.
        wrong_size: the advice if the engine connects another number of ranks than the launcher started.
    """

    module: str
    install: str
    launchers: tuple[str, ...]
    start: str
    wrong_size: str


_ENGINES = {
    "local": _Engine("hvdqn", "", (), "python", "start a single process, or drop --comm local"),
    "horovod": _Engine(
        "horovod.torch",
        "run launch/install_horovod.sh",
        ("horovodrun", *_MPI_LAUNCHERS),
        "horovodrun -np N",
        "start with horovodrun -np N, or build Horovod against the launcher's MPI with launch/install_horovod.sh",
    ),
    "torch": _Engine(
        "torch.distributed",
        "install a torch that has it",
        ("torchrun", "hand", "horovodrun", *_MPI_LAUNCHERS),
        "torchrun --nproc-per-node N",
        "give every rank the same WORLD_SIZE, or leave that to torchrun",
    ),
    "mpi": _Engine(
        "mpi4py",
        "pip install 'hvdqn[mpi]'",
        _MPI_LAUNCHERS,
        "mpirun -np N",
        "use the launcher of the MPI that mpi4py is linked to; under Slurm that is mostly srun --mpi=pmix",
    ),
}
CHOICES = ("auto", *_ENGINES)


def detect_launchers(environ: Mapping[str, str]) -> list[LauncherInfo]:
    """Return the launchers whose variables are set, beginning with the one that started this process itself.

    Raises:
        LaunchError: a variable is not a number, or a rank is not between 0 and size - 1.
    """
    found = []
    for launcher, rank_name, size_name, required in _LAUNCHERS:
        if not all(name in environ for name in (rank_name, size_name, required) if name):
            continue
        settings = ", ".join(f"{name}={environ[name]}" for name in (rank_name, size_name) if name)
        try:
            rank = int(environ[rank_name])
            size = int(environ[size_name]) if size_name else 0
        except ValueError:
            raise LaunchError(
                f"{settings}: whole numbers are needed; unset them, or use a launcher"
            ) from None
        if rank < 0 or (size_name and rank >= size):
            raise LaunchError(f"{settings}: ranks go from 0 to size - 1; unset them, or use a launcher")
        found.append(LauncherInfo(launcher, rank, size, size_name))
    return found


def launcher_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return the rank that the launcher gave this process, 0 without a launcher; callable before `connect`."""
    launcher = _innermost(environ)
    return launcher.rank if launcher else 0


def launcher_size(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many ranks the launcher started: 1 without a launcher, 0 if its variables do not say."""
    launcher = _innermost(environ)
    return launcher.size if launcher else 1


def _innermost(environ: Mapping[str, str]) -> LauncherInfo | None:
    try:
        return next(iter(detect_launchers(environ)), None)
    except LaunchError:
        return None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def choose_engine(
    choice: str,
    environ: Mapping[str, str] = os.environ,
    is_installed: Callable[[str], bool] = _is_installed,
) -> Choice:
    """Return the engine to use for `--comm choice` under the launcher that started this process.

    Args:
        choice: "auto", or the name of an engine.
        environ: the environment variables.
        is_installed: returns whether the module of this name is installed.

    Raises:
        LaunchError: the requested engine does not work under this launcher, or is not installed.
    """
    if choice not in CHOICES:
        raise LaunchError(f"--comm {choice} is unknown; choose one of {', '.join(CHOICES)}")
    launchers = detect_launchers(environ)
    launcher = launchers[0] if launchers else None
    if choice == "auto":
        _check_slurm_step(launcher, environ)
        engine, why = _pick_engine(launcher, environ, is_installed)
    else:
        engine, why = choice, "asked for by --comm"
        _check_launcher(engine, launchers, environ)
    if not is_installed(_ENGINES[engine].module):
        raise LaunchError(
            f"{_ENGINES[engine].module.split('.')[0]} is not installed; {_ENGINES[engine].install}, "
            "or start with torchrun"
        )
    return Choice(engine, why, launcher)


def _check_slurm_step(launcher: LauncherInfo | None, environ: Mapping[str, str]) -> None:
    """Raise LaunchError if a Slurm job of many tasks runs `python` without srun or mpirun: only one process starts."""
    tasks = environ.get("SLURM_NTASKS", "")
    single = launcher is None or (launcher.launcher == "srun" and launcher.size == 1)
    if single and tasks.isdecimal() and int(tasks) > 1:
        raise LaunchError(
            f"this Slurm job has SLURM_NTASKS={tasks} but no launcher started this process; put srun, mpirun "
            "or horovodrun before python, or ask for a single process with --comm local"
        )


def _pick_engine(
    launcher: LauncherInfo | None, environ: Mapping[str, str], is_installed: Callable[[str], bool]
) -> tuple[str, str]:
    """Return the name of the engine that fits the launcher, and a line for the log that says why."""
    if launcher is None:
        return "local", "no launcher started this process"
    if launcher.size == 1:
        return "local", f"started by {launcher.launcher} as a single rank"
    why = f"started by {launcher.launcher}"
    if launcher.launcher in ("torchrun", "hand"):
        if not _has_master(environ):
            raise LaunchError(
                f"{why}, but MASTER_ADDR and MASTER_PORT are not both set; use torchrun, or set them"
            )
        return "torch", why
    if launcher.launcher == "horovodrun":
        return "horovod", why
    has_pmi = any(name.startswith(("PMI_", "PMIX_")) for name in environ)
    if launcher.launcher == "srun" and not has_pmi and _has_master(environ):
        return "torch", f"{why} without PMI but with MASTER_ADDR"
    if is_installed("horovod.torch") or not is_installed("mpi4py"):
        return "horovod", why
    return "mpi", f"{why}, and Horovod is not installed"


def _has_master(environ: Mapping[str, str]) -> bool:
    return "MASTER_ADDR" in environ and "MASTER_PORT" in environ


def _check_launcher(engine: str, launchers: list[LauncherInfo], environ: Mapping[str, str]) -> None:
    """Raise LaunchError if the engine that --comm names does not work under the launcher of this process."""
    if engine == "local":
        check_size(engine, 1, launchers)
        return
    name = launchers[0].launcher if launchers else "no launcher"
    works = name in _ENGINES[engine].launchers
    if engine == "torch":
        works = works and launchers[0].size > 0 and _has_master(environ)
    if not works:
        raise LaunchError(
            f"--comm {engine} cannot connect a process started by {name}; "
            f"start it with {_ENGINES[engine].start}, or drop --comm"
        )


def check_size(engine: str, size: int, launchers: list[LauncherInfo]) -> None:
    """Raise LaunchError if the number of ranks that the engine connected is not what the launchers started.

    This catches ranks that each run alone without noticing. A launcher that starts other launchers may have started
    fewer processes than there are ranks (one torchrun on each host), but not more.

    Args:
        engine: the engine's name, as for --comm.
        size: number of ranks that it connected.
        launchers: what `detect_launchers` returned.

    Raises:
        LaunchError: the numbers differ.
    """
    for depth, launcher in enumerate(launchers):
        if launcher.size > size or (depth == 0 and 0 < launcher.size < size):
            inner = launchers[0].launcher
            remedy = (
                _ENGINES[engine].wrong_size if depth == 0 else f"make one {inner} job of their {inner} jobs"
            )
            raise LaunchError(
                f"{launcher.variable}={launcher.size}: {launcher.launcher} started {launcher.size} ranks, but "
                f"--comm {engine} connects {size}; {remedy}"
            )
