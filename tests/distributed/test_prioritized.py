"""Prioritized replay with the real learner: each transition of the job counts once, on whichever rank it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributed.runs import summary, train
from tests.launchers import launch

pytestmark = pytest.mark.distributed

WORKER = str(Path(__file__).with_name("prioritized_worker.py"))


@pytest.mark.parametrize(("launcher", "np"), [("python", 1), ("mpirun", 2), ("mpirun", 4)])
def test_weighted_updates_are_unbiased(launcher: str, np: int) -> None:
    result = launch(launcher, np, [WORKER, "mpi" if np > 1 else "local"], timeout=240)
    assert result.returncode == 0, str(result)
    ranks = re.findall(r"rank (\d) of \d: .* standard errors", result.stdout)
    assert sorted(ranks) == [str(rank) for rank in range(np)]


@pytest.mark.parametrize("preset", ["rainbow", "m-iqn"])
def test_replicas_stay_equal_with_different_noise_on_each_rank(preset: str, tmp_path: Path) -> None:
    """Priorities, noise and quantile fractions differ between ranks. Weights are compared every 200 env steps."""
    small = (
        "--total-env-steps",
        "800",
        "--iqn-samples",
        "8",
        "--iqn-target-samples",
        "8",
        "--eval-episodes",
        "2",
    )
    result = train("mpirun", 2, tmp_path, f"--preset=smoke,{preset}", *small)
    assert result.returncode == 0, str(result)
    assert summary(tmp_path)["updates"] > 50
    assert summary(tmp_path)["skipped_updates"] == 0
