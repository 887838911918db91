"""Launchers are detected from their environment variables, and an engine is chosen. No launcher is started."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hvdqn.comm
from hvdqn.comm import CHOICES, connect, launcher_rank, launcher_size
from hvdqn.comm.auto import check_size, choose_engine, detect_launchers
from hvdqn.comm.torch import TorchComm
from hvdqn.errors import LaunchError

HOROVODRUN = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_CONTROLLER": "gloo"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1"}
MASTER = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", **MASTER}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", **MASTER}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"}
# What Slurm sets in a batch script or an salloc shell of two tasks...
SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
# ... and in the second of the two tasks of a step.
SRUN = {**SBATCH, "SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
SRUN_PMIX = {**SRUN, "PMIX_RANK": "1"}


def one(environ: dict[str, str]) -> dict[str, str]:
    """Return the environment of the same launcher with a single rank."""
    return {
        name: "0" if name.endswith(("_RANK", "RANK", "PROCID")) else "1" if value == "2" else value
        for name, value in environ.items()
    }


def all_installed(module: str) -> bool:
    return True


@pytest.mark.parametrize(
    ("environ", "engine", "launcher", "rank"),
    [
        ({}, "local", None, 0),
        (HOROVODRUN, "horovod", "horovodrun", 1),
        (MPIRUN, "horovod", "mpirun", 1),
        (MPICH, "horovod", "mpiexec", 1),
        (MVAPICH, "horovod", "mpiexec", 1),
        (SRUN_PMIX, "horovod", "srun", 1),
        ({**SRUN, **MPICH}, "horovod", "mpiexec", 1),
        (SRUN, "horovod", "srun", 1),
        ({**SRUN, **MASTER}, "torch", "srun", 1),
        ({**SRUN_PMIX, **MASTER}, "horovod", "srun", 1),
        ({"PMIX_RANK": "1"}, "horovod", "PMIx", 1),
        (TORCHRUN, "torch", "torchrun", 1),
        (BY_HAND, "torch", "hand", 1),
        # Nested launchers: the innermost started the ranks.
        ({**SBATCH, **HOROVODRUN}, "horovod", "horovodrun", 1),
        ({**SBATCH, **MPIRUN}, "horovod", "mpirun", 1),
        ({**SBATCH, **TORCHRUN}, "torch", "torchrun", 1),
        ({**TORCHRUN, **MPIRUN, **SRUN}, "torch", "torchrun", 1),
        ({**MPIRUN, **SRUN, "SLURM_PROCID": "0"}, "horovod", "mpirun", 1),
        # These variables alone do not show that a launcher started the process.
        ({"RANK": "1", "WORLD_SIZE": "2"}, "local", None, 0),
        ({"HOROVOD_RANK": "1"}, "local", None, 0),
        # Jobs with one rank.
        (one(HOROVODRUN), "local", "horovodrun", 0),
        (one(MPIRUN), "local", "mpirun", 0),
        (one(SRUN_PMIX), "local", "srun", 0),
        (one(TORCHRUN), "local", "torchrun", 0),
        (one(SBATCH), "local", None, 0),
    ],
)
def test_auto_follows_the_launcher(
    environ: dict[str, str], engine: str, launcher: str | None, rank: int
) -> None:
    choice = choose_engine("auto", environ, all_installed)
    assert choice.engine == engine
    assert (choice.launcher.launcher if choice.launcher else None) == launcher
    assert (launcher or "no launcher") in choice.why
    assert launcher_rank(environ) == rank


def test_auto_chooses_mpi4py_if_horovod_is_missing() -> None:
    choice = choose_engine("auto", MPIRUN, lambda module: module != "horovod.torch")
    assert choice.engine == "mpi"
    assert "Horovod is not installed" in choice.why


@pytest.mark.parametrize(
    ("choice", "environ", "missing", "message"),
    [
        ("auto", SBATCH, "", "SLURM_NTASKS=2 but no launcher started this process; put srun"),
        ("auto", {**one(SRUN), "SLURM_NTASKS": "2"}, "", "SLURM_NTASKS=2 but no launcher"),  # an salloc shell
        ("auto", MPIRUN, "horovod.torch mpi4py", "horovod is not installed; run launch/install_horovod.sh"),
        ("auto", HOROVODRUN, "horovod.torch", "horovod is not installed"),
        ("auto", {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "two"}, "", "OMPI_COMM_WORLD_SIZE=two: whole numbers"),
        (
            "auto",
            {**MPIRUN, "OMPI_COMM_WORLD_RANK": "2"},
            "",
            "OMPI_COMM_WORLD_RANK=2, OMPI_COMM_WORLD_SIZE=2",
        ),
        ("auto", {**MPIRUN, "OMPI_COMM_WORLD_RANK": "-1"}, "", "ranks go from 0"),
        ("local", MPIRUN, "", "mpirun started 2 ranks, but --comm local connects 1; start a single process"),
        ("horovod", {}, "", "started by no launcher; start it with horovodrun -np N"),
        ("horovod", TORCHRUN, "", "started by torchrun; start it with horovodrun -np N"),
        ("horovod", MPIRUN, "horovod.torch", "horovod is not installed; run launch/install_horovod.sh"),
        ("mpi", {}, "", "started by no launcher; start it with mpirun -np N"),
        ("mpi", HOROVODRUN, "", "started by horovodrun; start it with mpirun -np N"),
        ("mpi", TORCHRUN, "", "started by torchrun; start it with mpirun -np N"),
        ("mpi", MPIRUN, "mpi4py", "mpi4py is not installed; pip install 'hvdqn[mpi]'"),
        ("torch", {}, "", "started by no launcher; start it with torchrun --nproc-per-node N"),
        ("torch", MPIRUN, "", "started by mpirun; start it with torchrun"),
        (
            "torch",
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
            "",
            "by hand; start it with torchrun",
        ),
        (
            "auto",
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
            "",
            "MASTER_PORT are not both set",
        ),
        ("nccl", {}, "", "--comm nccl is unknown; choose one of auto, local, horovod, torch, mpi"),
    ],
)
def test_an_engine_that_cannot_work_is_refused_with_a_remedy(
    choice: str, environ: dict[str, str], missing: str, message: str
) -> None:
    with pytest.raises(LaunchError) as refusal:
        choose_engine(choice, environ, lambda module: module not in missing.split())
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("choice", "environ"),
    [
        ("local", SBATCH),
        ("local", one(MPIRUN)),
        ("horovod", one(HOROVODRUN)),
        ("mpi", SRUN_PMIX),
        ("torch", {**MPIRUN, **MASTER}),
        ("torch", {**SRUN, **MASTER}),
    ],
)
def test_an_engine_that_can_work_may_be_requested(choice: str, environ: dict[str, str]) -> None:
    assert choose_engine(choice, environ, all_installed).engine == choice


@pytest.mark.parametrize(
    ("environ", "size", "right"),
    [
        (MPIRUN, 2, True),
        (MPIRUN, 1, False),  # each rank runs alone
        (MPIRUN, 4, False),
        ({"PMIX_RANK": "1"}, 4, True),  # its variables hold no size
        ({**TORCHRUN, "WORLD_SIZE": "8", **SRUN}, 8, True),  # srun started one torchrun on each of two hosts
        ({**TORCHRUN, "WORLD_SIZE": "8", **SRUN}, 4, False),
        ({**one(TORCHRUN), **SRUN}, 1, False),
        ({**HOROVODRUN, "HOROVOD_SIZE": "4", **MPIRUN}, 4, True),
        ({}, 1, True),
    ],
)
def test_the_size_is_compared_with_every_launcher(environ: dict[str, str], size: int, right: bool) -> None:
    if right:
        check_size("horovod", size, detect_launchers(environ))
    else:
        with pytest.raises(LaunchError, match=rf"started \d ranks, but --comm horovod connects {size}; .+"):
            check_size("horovod", size, detect_launchers(environ))


def test_launcher_rank_needs_no_connection_and_ignores_errors() -> None:
    assert launcher_rank({}) == 0
    assert launcher_rank(SRUN) == 1
    assert launcher_rank({**MPIRUN, "OMPI_COMM_WORLD_RANK": "x"}) == 0


def test_launcher_size() -> None:
    assert launcher_size({}) == 1
    assert launcher_size(SRUN) == 2
    assert launcher_size({"PMIX_RANK": "1"}) == 0
    assert launcher_size({**MPIRUN, "OMPI_COMM_WORLD_RANK": "x"}) == 1


def test_connect_knows_every_engine() -> None:
    assert hvdqn.comm._CONNECT.keys() == set(CHOICES) - {"auto"}


def test_connect_raises_if_an_engine_was_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hvdqn.comm, "_CONNECT", {})
    with pytest.raises(KeyError, match="local"):
        connect("local")


def test_local_is_the_identity() -> None:
    comm = connect("local")
    assert (comm.rank, comm.size, comm.local_rank, comm.local_size) == (0, 1, 0, 1)
    tensor = torch.randn(5)
    before = tensor.clone()
    assert comm.allreduce_sum_async(tensor, "x").wait() is tensor
    comm.broadcast_(tensor)
    assert torch.equal(tensor, before)
    assert comm.broadcast_object("a") == "a"
    assert comm.all_gather_object("a") == ["a"]
    comm.barrier()
    comm.close()


def test_connecting_fails_if_a_rank_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    import hvdqn.comm.torch as engine

    monkeypatch.setattr(engine, "CONNECT_TIMEOUT", datetime.timedelta(seconds=1))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(LaunchError, match=r"rank 0 did not meet all 2 ranks within 1 s .*; start them all"):
        TorchComm("cpu", rank=0, size=2)


def test_torch_waits_longer_than_the_watchdog() -> None:
    from hvdqn.comm.torch import COLLECTIVE_TIMEOUT, LONGEST_TIMEOUT, collective_timeout

    assert collective_timeout(0) == LONGEST_TIMEOUT
    assert collective_timeout(600) == COLLECTIVE_TIMEOUT
    assert collective_timeout(7200).total_seconds() > 7200
    assert collective_timeout(1e300) == LONGEST_TIMEOUT


LATE_RANK = """
import datetime, sys, time
import hvdqn.comm.torch as engine
from hvdqn.comm import connect
engine.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=1)
comm = connect("torch", "cpu", float(sys.argv[1]), host_sum="off")
if comm.rank == 1:
    time.sleep(3)
comm.barrier()
comm.close()
"""


@pytest.mark.parametrize(("stall_timeout", "survives"), [("0", True), ("0.1", False)])
def test_without_a_watchdog_torch_waits_for_a_late_rank(stall_timeout: str, survives: bool) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LATE_RANK, stall_timeout],
            env={**common, "RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            rank.communicate(timeout=60)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode == 0 for rank in ranks] == [survives, survives]


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_only_its_engine_imports_a_library() -> None:
    for path in Path(hvdqn.comm.__file__).parent.glob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        ours = {name for name in imports(path) if name.split(".")[0] == "hvdqn"}
        assert all(name.startswith(("hvdqn.comm", "hvdqn.errors")) for name in ours), path
        assert ("horovod" in roots) == (path.name == "horovod.py")
        assert ("mpi4py" in roots) == (path.name == "mpi.py")
