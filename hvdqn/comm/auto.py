"""Read from the environment which launcher started this process, and which engine can connect it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from hvdqn.errors import LaunchError

# Where launchers are nested (srun starts mpirun's daemons; srun or mpirun start one torchrun a host) the
# variables of all of them are here at once: the innermost comes first.
# launcher, variable of the rank, variable of the size, what else must be set
_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", ""),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ""),  # horovodrun --mpi is one of these
    ("mpiexec", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", ""),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", ""),
    # Not SLURM_NTASKS: a batch script and an salloc shell have it, with SLURM_PROCID=0, and are no tasks of a step.
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ""),
    ("PMIx", "PMIX_RANK", "", ""),
    ("hand", "RANK", "WORLD_SIZE", "MASTER_ADDR"),
)
_MPI_LAUNCHERS = ("mpirun", "mpiexec", "srun", "PMIx")


@dataclass(frozen=True, slots=True)
class Promise:
    """What one launcher's variables say about this process."""

    launcher: str
    rank: int
    size: int  # 0 where the launcher does not say
    variable: str  # where the size was read

    @property
    def starts_mpi(self) -> bool:
        """Whether MPI_Init can find the other ranks under this launcher."""
        return self.launcher in _MPI_LAUNCHERS


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine to connect, one line on why, and the launcher that this process has to thank (or None)."""

    engine: str
    why: str
    promise: Promise | None


@dataclass(frozen=True, slots=True)
class _Engine:
    """What an engine needs, and what to tell a user who has something else."""

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


def promises(environ: Mapping[str, str]) -> list[Promise]:
    """Return what each launcher around this process promised, the innermost first.

    Raises:
        LaunchError: a variable is no number, or a rank lies outside its world.
    """
    found = []
    for launcher, rank_name, size_name, also in _LAUNCHERS:
        if not all(name in environ for name in (rank_name, size_name, also) if name):
            continue
        said = ", ".join(f"{name}={environ[name]}" for name in (rank_name, size_name) if name)
        try:
            rank = int(environ[rank_name])
            size = int(environ[size_name]) if size_name else 0
        except ValueError:
            raise LaunchError(f"{said}: whole numbers are needed; unset them, or use a launcher") from None
        if rank < 0 or (size_name and rank >= size):
            raise LaunchError(f"{said}: ranks go from 0 to size - 1; unset them, or use a launcher")
        found.append(Promise(launcher, rank, size, size_name))
    return found


def launcher_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return the rank that the launcher gave this process, 0 if it gave none; nothing need be connected."""
    promise = _innermost(environ)
    return promise.rank if promise else 0


def launcher_size(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many ranks the launcher promised: 1 without a launcher, 0 where it does not say."""
    promise = _innermost(environ)
    return promise.size if promise else 1


def _innermost(environ: Mapping[str, str]) -> Promise | None:
    try:
        return next(iter(promises(environ)), None)
    except LaunchError:
        return None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package it would be in is missing
        return False


def choose(
    choice: str,
    environ: Mapping[str, str] = os.environ,
    is_installed: Callable[[str], bool] = _is_installed,
) -> Choice:
    """Turn `--comm` and the launcher's environment into the engine to connect.

    Raises:
        LaunchError: the engine asked for cannot work as this process was started.
    """
    if choice not in CHOICES:
        raise LaunchError(f"--comm {choice} is unknown; choose one of {', '.join(CHOICES)}")
    found = promises(environ)
    promise = found[0] if found else None
    if choice == "auto":
        _refuse_unlaunched_slurm(promise, environ)
        engine, why = _pick(promise, environ, is_installed)
    else:
        engine, why = choice, "asked for by --comm"
        _check_launcher(engine, found, environ)
    if not is_installed(_ENGINES[engine].module):
        raise LaunchError(
            f"{_ENGINES[engine].module.split('.')[0]} is not installed; {_ENGINES[engine].install}, "
            "or start with torchrun"
        )
    return Choice(engine, why, promise)


def _refuse_unlaunched_slurm(promise: Promise | None, environ: Mapping[str, str]) -> None:
    """Refuse plain `python` in a batch script or salloc shell of many tasks: it would run just once."""
    tasks = environ.get("SLURM_NTASKS", "")
    alone = promise is None or (promise.launcher == "srun" and promise.size == 1)
    if alone and tasks.isdecimal() and int(tasks) > 1:
        raise LaunchError(
            f"this Slurm job has SLURM_NTASKS={tasks} but no launcher started this process; put srun, mpirun "
            "or horovodrun before python, or ask for a single process with --comm local"
        )


def _pick(
    promise: Promise | None, environ: Mapping[str, str], is_installed: Callable[[str], bool]
) -> tuple[str, str]:
    """Return the engine that suits the launcher, and why."""
    if promise is None:
        return "local", "no launcher started this process"
    if promise.size == 1:
        return "local", f"started by {promise.launcher} as a single rank"
    why = f"started by {promise.launcher}"
    if promise.launcher in ("torchrun", "hand"):
        if not _has_master(environ):
            raise LaunchError(
                f"{why}, but MASTER_ADDR and MASTER_PORT are not both set; use torchrun, or set them"
            )
        return "torch", why
    if promise.launcher == "horovodrun":
        return "horovod", why
    has_pmi = any(name.startswith(("PMI_", "PMIX_")) for name in environ)
    if promise.launcher == "srun" and not has_pmi and _has_master(environ):
        return "torch", f"{why} without PMI but with MASTER_ADDR"
    if is_installed("horovod.torch") or not is_installed("mpi4py"):
        return "horovod", why
    return "mpi", f"{why}, and Horovod is not installed"


def _has_master(environ: Mapping[str, str]) -> bool:
    return "MASTER_ADDR" in environ and "MASTER_PORT" in environ


def _check_launcher(name: str, found: list[Promise], environ: Mapping[str, str]) -> None:
    if name == "local":
        check_size(name, 1, found)
        return
    launcher = found[0].launcher if found else "no launcher"
    possible = launcher in _ENGINES[name].launchers
    if name == "torch":
        possible = possible and found[0].size > 0 and _has_master(environ)
    if not possible:
        raise LaunchError(
            f"--comm {name} cannot connect a process started by {launcher}; "
            f"start it with {_ENGINES[name].start}, or drop --comm"
        )


def check_size(name: str, size: int, found: list[Promise]) -> None:
    """Compare the world that engine `name` connected with what the launchers promised.

    Those around the innermost one may have started fewer processes (one torchrun a host), but not more.

    Raises:
        LaunchError: they differ: every rank may be in a silent world of one.
    """
    for depth, promise in enumerate(found):
        if promise.size > size or (depth == 0 and 0 < promise.size < size):
            inner = found[0].launcher
            remedy = (
                _ENGINES[name].wrong_size if depth == 0 else f"make one {inner} job of their {inner} jobs"
            )
            raise LaunchError(
                f"{promise.variable}={promise.size}: {promise.launcher} started {promise.size} ranks, but "
                f"--comm {name} connects {size}; {remedy}"
            )
