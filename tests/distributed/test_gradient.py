"""N ranks are one learner: their averaged gradient is that of the whole batch, and they stay equal bit for bit.

The checks are in gradient_worker.py, which is launched once for every engine and number of ranks.
"""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path

import pytest

from tests.launchers import Result, launch

pytestmark = pytest.mark.distributed

WORKER = str(Path(__file__).with_name("gradient_worker.py"))
ENGINES = (  # launcher, --comm, the engine that it gives
    ("horovodrun-gloo", "auto", "horovod"),
    ("mpirun", "auto", "horovod"),
    ("mpirun", "mpi", "mpi"),
    ("torchrun", "auto", "torch"),
)

over_all_engines = pytest.mark.parametrize(("launcher", "comm", "engine"), ENGINES)
on_2_and_4_ranks = pytest.mark.parametrize("np", [2, 4])


@functools.cache
def run(launcher: str, comm: str, np: int) -> Result:
    # One update of 32 transitions per rank for every 4 env steps. The updates that the last iteration makes due are not
    # taken.
    flags = {
        "--preset": "smoke",
        "--comm": comm,
        "--learning-starts": 256,
        "--total-env-steps": 256 + 200 * 4 + 8 * np,
        "--replay-ratio": 8 * np,
        "--eval-episodes": np,
    }
    words = [str(word) for flag in flags.items() for word in flag]
    with tempfile.TemporaryDirectory() as run_dir:
        return launch(launcher, np, [WORKER, *words, "--run-dir", run_dir], timeout=180)


@over_all_engines
@on_2_and_4_ranks
def test_averaged_gradient_of_the_shards_is_that_of_the_whole_batch(
    launcher: str, comm: str, engine: str, np: int
) -> None:
    result = run(launcher, comm, np)
    for rank in range(np):
        assert f"rank {rank} of {np}, {engine}, gradients agree" in result.stdout, str(result)


@over_all_engines
@on_2_and_4_ranks
def test_all_ranks_hold_the_same_parameters_after_200_updates(
    launcher: str, comm: str, engine: str, np: int
) -> None:
    result = run(launcher, comm, np)
    assert result.returncode == 0, str(result)
    printed = re.findall(rf"rank (\d) of {np}, {engine}, 200 updates, parameters (\w{{64}})", result.stdout)
    assert sorted(int(rank) for rank, _ in printed) == list(range(np)), str(result)
    assert len({digest for _, digest in printed}) == 1, str(result)
