"""The benchmarks on real ranks: that they run and say what was asked; how fast is not for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launchers import Result, launch

pytestmark = pytest.mark.distributed

TIMEOUT_SECONDS = 120.0


def bench(launcher: str, np: int, file: Path, *words: str) -> tuple[Result, dict[str, Any]]:
    """What a benchmark printed and wrote."""
    args = ["-m", "hvdqn", "bench", *words, "--json", str(file)]
    result = launch(launcher, np, args, TIMEOUT_SECONDS)
    assert result.returncode == 0, result
    return result, json.loads(file.read_text())


def test_costs_of_the_ranks_of_a_launcher(tmp_path: Path) -> None:
    flags = ("--preset", "smoke", "--comm", "mpi", "--seconds", "0.5", "--allreduce-seconds", "0.01")
    result, found = bench("mpirun", 2, tmp_path / "bench.json", *flags)
    assert (found["loop"]["world_size"], found["loop"]["comm"]) == (2, "mpi")
    assert found["loop"]["seconds_per_iteration"]["comm_exposed"] > 0
    assert [one["engine"] for one in found["allreduce"]] == ["mpi", "raw mpi"]
    network = str(found["allreduce"][0]["network_floats"])
    assert int(network) > found["loop"]["parameters"]
    assert all(one["seconds"][network] > 0 for one in found["allreduce"])
    assert result.stdout.count("Averaging a gradient") == 1


def test_pinned_ranks_of_horovod(tmp_path: Path) -> None:
    flags = ("loop", "--pin", "--preset", "smoke", "--seconds", "0.5")
    _, found = bench("horovodrun-gloo", 2, tmp_path / "loop.json", *flags)
    assert (found["world_size"], found["comm"], found["machine"]["cores"]) == (2, "horovod", 1)


def test_scaling_is_measured_and_projected(tmp_path: Path) -> None:
    flags = ("scaling", "--np", "1,2", "--engine", "mpi", "--preset", "smoke", "--seconds", "0.3")
    result, found = bench("python", 1, tmp_path / "scaling.json", *flags)
    assert [one["world_size"] for one in found["weak"]] == [1, 2]
    assert [(one["world_size"], one["envs_per_rank"]) for one in found["strong"]] == [(1, 8), (2, 4)]
    assert [one["ranks"] for one in found["projected"]] == [2, 8, 64, 512] * 2
    assert all(0 < one["efficiency"] <= 1 for one in found["projected"])
    assert (tmp_path / "scaling.png").stat().st_size > 0
    assert "Assumed" in result.stdout


def test_start_up_is_timed_beside_torch(tmp_path: Path) -> None:
    _, found = bench("python", 1, tmp_path / "startup.json", "startup", "--rounds", "1", "--preset", "smoke")
    assert len(found["torch_seconds"]) == len(found["first_env_step_seconds"]) == 1
