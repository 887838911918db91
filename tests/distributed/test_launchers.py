"""The smoke preset through every launcher that users have, to the end; all engines end with the same parameters."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launchers import Result, launch
from tests.unit.test_train import PHASES, SUMMARY

pytestmark = pytest.mark.distributed

# launcher, ranks, --comm -> engine, and what `auto` says of its choice
LAUNCHES = {
    ("python", 1, "auto"): ("local", "no launcher started this process"),
    ("mpirun", 1, "auto"): ("local", "started by mpirun as a single rank"),
    ("horovodrun-gloo", 2, "auto"): ("horovod", "started by horovodrun"),
    ("horovodrun-mpi", 2, "auto"): ("horovod", "started by mpirun"),
    ("mpirun", 2, "auto"): ("horovod", "started by mpirun"),
    ("mpirun", 2, "mpi"): ("mpi", "asked for by --comm"),
    ("torchrun", 2, "auto"): ("torch", "started by torchrun"),
}
TWO_RANKS = [key for key in LAUNCHES if key[1] == 2]


@dataclass(frozen=True)
class Run:
    result: Result
    summary: dict[str, Any]
    left: frozenset[str]  # what lies in the run directory


@functools.cache
def run(launcher: str, np: int, comm: str) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        argv = ["-m", "hvdqn.train", "--preset", "smoke", "--comm", comm, "--run-dir", folder]
        result = launch(launcher, np, argv, timeout=180)
        assert result.returncode == 0, str(result)
        left = frozenset(path.name for path in Path(folder).iterdir())
        return Run(result, json.loads((Path(folder) / "summary.json").read_text()), left)


@pytest.mark.parametrize(("launcher", "np", "comm"), LAUNCHES)
def test_it_runs_to_the_end(launcher: str, np: int, comm: str) -> None:
    engine, why = LAUNCHES[launcher, np, comm]
    done = run(launcher, np, comm)
    summary, said = done.summary, done.result.stdout + done.result.stderr
    assert summary.keys() >= SUMMARY
    assert summary["seconds"].keys() >= PHASES
    assert (summary["world_size"], summary["comm"], summary["stopped_by"]) == (np, engine, "finished")
    assert summary["env_steps"] == 2_000
    assert summary["updates"] == (2_000 - 8 * np - 200) * 8 // (32 * np)
    assert summary["eval_episodes"] == 4
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "summary.json"} <= done.left
    # Once, not once a rank.
    assert said.count(f"{np} rank{'s' * (np > 1)}, comm {engine} ({why}") == 1, str(done.result)
    assert said.count("comm ") == 1, str(done.result)
    assert said.count("4 episodes: mean") == 1, str(done.result)


@pytest.mark.parametrize(("launcher", "np", "comm"), TWO_RANKS)
def test_all_engines_end_with_the_same_parameters(launcher: str, np: int, comm: str) -> None:
    """One sum of two floats has one result, whoever adds them: runs of two ranks can be compared over engines."""
    assert run(launcher, np, comm).summary["param_sha256"] == run(*TWO_RANKS[0]).summary["param_sha256"]
