"""Every engine does what `Comm` documents, under real launchers. The checks are in comm_worker.py."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.launchers import Result, launch, launch_line

pytestmark = pytest.mark.distributed

WORKER = str(Path(__file__).with_name("comm_worker.py"))
ENGINES = {  # launcher -> the engine that `--comm auto` chooses for several ranks
    "horovodrun-gloo": "horovod",
    "horovodrun-mpi": "horovod",
    "mpirun": "horovod",
    "torchrun": "torch",
}
TIMEOUT = 120  # seconds; for jobs that hang
END_SECONDS = 30  # from a rank's last line to the end of the job
# The launcher's exit code if a rank exits with 7: Horovod's Gloo launcher and torchrun always return 1.
EXIT_CODES = {"horovodrun-gloo": 1, "horovodrun-mpi": 7, "mpirun": 7, "torchrun": 1}


def assert_ended_soon_after(line: str, count: int, result: Result) -> None:
    times = [float(stamp) for stamp in re.findall(rf"{line} ([\d.]+)", result.stdout)]
    assert len(times) == count, result
    assert result.ended - min(times) < END_SECONDS, result


# Three ranks: no power of two, and a sum whose bits depend on its order. Two and four are in test_gradient.py.
THREE_RANKS = [
    ("horovodrun-gloo", "auto", 3),
    ("horovodrun-mpi", "auto", 3),
    ("mpirun", "mpi", 3),
    ("torchrun", "auto", 3),
]
ONE_RANK = [("python", "auto", 1), ("mpirun", "auto", 1), ("mpirun", "mpi", 1)]


@pytest.mark.parametrize(
    ("launcher", "comm", "np", "host_sum"),
    [
        *((*case, "auto") for case in ONE_RANK),
        *((*case, host_sum) for case in THREE_RANKS for host_sum in ("on", "off")),
        ("horovodrun-gloo", "auto", 2, "on"),
        ("torchrun", "auto", 4, "on"),
    ],
)
def test_engine_conforms_to_comm(launcher: str, comm: str, np: int, host_sum: str) -> None:
    result = launch(launcher, np, [WORKER, "conformance", comm, host_sum], timeout=TIMEOUT)
    assert result.returncode == 0, result
    assert_ended_soon_after("closed at", np, result)
    engine = comm if comm != "auto" else ENGINES[launcher] if np > 1 else "local"
    for rank in range(np):
        assert f"rank {rank} of {np} passed over {engine}" in result.stdout, result
    assert result.stdout.count("shared memory, bits") == (np if host_sum == "on" else 0), result


@pytest.mark.parametrize(("cores", "sleeps"), [(1, True), (2, False)])
def test_waiting_ranks_over_gloo_sleep_if_there_are_more_ranks_than_cores(cores: int, sleeps: bool) -> None:
    """The cores that the job may use count, not those of the machine."""
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        pytest.skip("this test needs two cores, and only one may be used: WHETHER RANKS SLEEP IS NOT TESTED")
    program = (
        "from hvdqn.comm import connect; comm = connect('auto', host_sum='off'); "
        "print('sleeps:', comm._sleeps); comm.close()"
    )
    line = [
        "taskset",
        "-c",
        ",".join(map(str, mine[:cores])),
        "horovodrun",
        "--disable-cache",
        "--gloo",
        "-np",
        "2",
    ]
    result = launch_line(
        shlex.join([*line, sys.executable, "-c", program]), 2, TIMEOUT, env={"HVDQN_SLEEP_WHEN_WAITING": "0"}
    )
    assert result.returncode == 0, result
    assert result.stdout.count(f"sleeps: {sleeps}") == 2, result


@pytest.mark.parametrize(("launcher", "comm", "np"), THREE_RANKS)
def test_abort_ends_ranks_that_hang_and_ranks_that_wait(launcher: str, comm: str, np: int) -> None:
    result = launch(launcher, np, [WORKER, "abort_by_watchdog", comm], timeout=TIMEOUT)
    assert result.returncode == EXIT_CODES[launcher], result
    assert_ended_soon_after("aborting at", 1, result)
    assert "closed" not in result.stdout


def test_an_error_on_one_rank_is_printed_once_and_ends_the_job() -> None:
    result = launch("mpirun", 4, [WORKER, "error_on_one_rank", "mpi"], timeout=TIMEOUT)
    assert result.returncode == 1, result
    assert result.stderr.count("RuntimeError: the environment of this rank broke") == 1, result
    assert "closed" not in result.stdout


@pytest.mark.parametrize(
    ("launcher", "np", "comm", "env", "message"),
    [
        pytest.param(
            "mpirun",
            2,
            "horovod",
            {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"},
            r"OMPI_COMM_WORLD_SIZE=2: mpirun started 2 ranks, but --comm horovod connects 1; start with horovodrun",
            id="gloo-without-its-variables",
        ),
        pytest.param(
            "python",
            1,
            "mpi",
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            r"SLURM_STEP_NUM_TASKS=2: srun started 2 ranks, but --comm mpi connects 1; .* srun --mpi=pmix",
            id="srun-without-pmi",
        ),
        pytest.param(
            "torchrun",
            1,
            "auto",
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            r"srun started 2 ranks, but --comm local connects 1",
            id="torchrun-for-one-on-each-host",
        ),
        pytest.param(
            "mpirun", 2, "local", {}, r"mpirun started 2 ranks, but --comm local connects 1", id="local"
        ),
    ],
)
def test_a_wrong_number_of_ranks_is_refused_once(
    launcher: str, np: int, comm: str, env: dict[str, str], message: str
) -> None:
    result = launch(launcher, np, [WORKER, "conformance", comm], timeout=TIMEOUT, env=env)
    assert result.returncode == (1 if launcher == "torchrun" else 2), result
    refusals = re.findall(r"refused: (.*)", result.stdout)
    assert len(refusals) == 1, result
    assert re.search(message, refusals[0]), result
    assert "Traceback" not in result.stdout
