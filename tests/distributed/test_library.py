"""The Python API on two real ranks: results, callbacks, infos, and the end of a job."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.launchers import Result, launch

pytestmark = pytest.mark.distributed


def run(launcher: str, *argv: str) -> Result:
    return launch(launcher, 2, ["-m", "tests.distributed.library_worker", *argv], timeout=120)


def told(result: Result) -> list[dict[str, Any]]:
    """Return what the ranks printed at their end."""
    assert result.returncode == 0, result
    found = [json.loads(line) for line in re.findall(r"TOLD (.*)", result.stdout)]
    assert len(found) == 2, result
    return found


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_both_ranks_get_the_result_and_the_means_of_both(launcher: str, tmp_path: Path) -> None:
    one, other = told(run(launcher, "train", str(tmp_path), "checkpoint_every=1000"))
    for name in ("stopped_by", "env_steps", "returns", "distance", "success", "checkpoints"):
        assert one[name] == other[name], name
    assert (one["stopped_by"], one["env_steps"]) == ("finished", 2000)
    assert one["episodes"] == other["episodes"] == 2000 // 16 // 10 * 8
    assert set(one["distance"][1:]) == {2.5}  # no episode may have ended before the first line
    assert one["checkpoints"] == ["000000001008", "000000002000"]  # the first multiple of 16 envs
    # From the first checkpoint on, the means are of the episodes of both ranks.
    assert one["success"]
    assert all(0 <= value <= 1 for value in one["success"])
    halves = [ranks["own_success"][len(ranks["own_success"]) * 3 // 5 :] for ranks in (one, other)]
    assert abs(one["success"][-1] - np.mean(halves)) < 0.5


@pytest.mark.parametrize("flags", [(), ("comm=mpi", "sync=server")], ids=["gradients", "server"])
def test_one_rank_stops_all_ranks(flags: tuple[str, ...], tmp_path: Path) -> None:
    one, other = told(run("mpirun", "stop", str(tmp_path), *flags))
    assert one["stopped_by"] == other["stopped_by"] == "callback"
    assert one["env_steps"] == other["env_steps"] < 2000
    assert one["actions"] == 3
    assert json.loads((tmp_path / "summary.json").read_text())["stopped_by"] == "callback"


def test_wrong_input_is_raised_on_every_rank(tmp_path: Path) -> None:
    result = run("mpirun", "train", str(tmp_path / "run"), "batch_per_rank=600", "replay_capacity=1000")
    assert result.returncode == 0, result
    assert result.stdout.count('{"refused": "--batch-per-rank 600 is larger') == 2, result


def test_an_exception_of_one_rank_ends_the_job(tmp_path: Path) -> None:
    result = run("mpirun", "fail", str(tmp_path))
    assert result.returncode == 1, result
    assert "rank 1 of 2 failed" in result.stderr
    assert "a bug in a callback" in result.stderr
