"""The benchmarks on real ranks: they run and report what they should. Their speed is not tested."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hvdqn.bench.jobs import available_engines
from tests.launchers import Result, launch, launch_line
from tests.readme import command

pytestmark = pytest.mark.distributed

TIMEOUT_SECONDS = 180.0


def run(folder: Path, text: str, replaced: Mapping[str, str], file: str) -> tuple[Result, dict[str, Any]]:
    """Run a command of README.md, made shorter; return its result and the JSON that it wrote."""
    line = command(text, {"hvdqn bench": "python -m hvdqn bench", **replaced})  # hvdqn may not be installed
    result = launch_line(line, 1, TIMEOUT_SECONDS, cwd=folder)
    assert result.returncode == 0, result
    return result, json.loads((folder / file).read_text())


def check_costs(found: Mapping[str, Any], engines: list[str]) -> None:
    assert [one["engine"] for one in found["allreduce"]] == engines
    network = str(found["allreduce"][0]["network_floats"])
    assert int(network) > found["loop"]["parameters"]
    assert all(one["world_size"] == 2 and one["seconds"][network] > 0 for one in found["allreduce"])


def test_costs_of_every_engine(tmp_path: Path) -> None:
    replaced = {"cartpole": "smoke --seconds 0.5 --allreduce-seconds 0.01"}
    result, found = run(tmp_path, "hvdqn bench --preset cartpole", replaced, "bench.json")
    assert found["loop"]["world_size"] == 1
    engines = available_engines()
    assert "mpi" in engines
    check_costs(found, ["mpi", "raw mpi", *engines[1:]])
    assert "Averaging a gradient" in result.stdout
    assert "left out" not in result.stderr


def test_costs_of_the_engine_of_a_launcher(tmp_path: Path) -> None:
    flags = ("--preset", "smoke", "--comm", "mpi", "--seconds", "0.5", "--allreduce-seconds", "0.01")
    args = ["-m", "hvdqn", "bench", *flags, "--json", str(tmp_path / "bench.json")]
    result = launch("mpirun", 2, args, TIMEOUT_SECONDS)
    assert result.returncode == 0, result
    found = json.loads((tmp_path / "bench.json").read_text())
    assert (found["loop"]["world_size"], found["loop"]["comm"]) == (2, "mpi")
    assert found["loop"]["seconds_per_iteration"]["comm_exposed"] > 0
    check_costs(found, ["mpi", "raw mpi"])
    assert result.stdout.count("Averaging a gradient") == 1


def test_scaling_is_measured_and_projected(tmp_path: Path) -> None:
    text, replaced = (
        "hvdqn bench scaling --np 1,2,4 --preset atari",
        {"1,2,4": "1,2", "atari": "smoke --seconds 0.3"},
    )
    result, found = run(tmp_path, text, replaced, "bench-scaling.json")
    assert [one["world_size"] for one in found["weak"]] == [1, 2]
    assert [(one["world_size"], one["envs_per_rank"]) for one in found["strong"]] == [(1, 8), (2, 4)]
    assert [one["ranks"] for one in found["projected"]] == [2, 8, 64, 512] * 2
    assert all(0 < one["efficiency"] <= 1 for one in found["projected"])
    assert (tmp_path / "bench-scaling.png").stat().st_size > 0
    assert "Assumed" in result.stdout


def test_startup_is_compared_with_importing_torch(tmp_path: Path) -> None:
    text, replaced = "hvdqn bench peers --peer-python PYTHON", {"--peer-python PYTHON": "startup --rounds 1"}
    _, found = run(tmp_path, text, replaced, "bench-peers.json")
    assert [row["what"] for row in found["rows"]] == ["first env step, beyond 1.25 x import torch"]


def test_gpu_on_the_cpu(tmp_path: Path) -> None:
    """The same code as on a GPU. Two CPU runs have equal losses and gradients."""
    small = "--env CartPole-v1 --frame-stack 1 --no-episodic-life --batch-per-rank 8 --updates 3"
    _, found = run(tmp_path, "hvdqn bench gpu", {"gpu": f"gpu --device cpu {small}"}, "bench-gpu.json")
    rows = {row["what"]: row["median"] for row in found["rows"]}
    assert rows["loss, relative error against the CPU"] == 0.0
    assert rows["gradient, relative error against the CPU"] == 0.0
    assert rows["samples/s learned, batch 8, fp32"] > 0
