"""README's commands for each launcher, with the smoke preset. All engines end with the same parameters."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launchers import Result, launch_line
from tests.readme import command
from tests.unit.test_train import PHASES, SUMMARY

pytestmark = pytest.mark.distributed

# A command of README and flags to add -> ranks, engine, and the reason for the engine.
LAUNCHES = {
    ("python -m hvdqn.train --preset cartpole", ""): (1, "local", "no launcher started this process"),
    ("horovodrun --gloo -np 2 python -m hvdqn.train --preset cartpole", ""): (
        2,
        "horovod",
        "started by horovodrun",
    ),
    ("horovodrun --mpi -np 2 python -m hvdqn.train --preset cartpole", ""): (
        2,
        "horovod",
        "started by mpirun",
    ),
    ("mpirun -np 2 python -m hvdqn.train --preset cartpole", ""): (2, "horovod", "started by mpirun"),
    ("mpirun -np 2 python -m hvdqn.train --preset cartpole", "--comm mpi"): (2, "mpi", "asked for by --comm"),
    ("torchrun --nproc-per-node 2 -m hvdqn.train --preset cartpole", ""): (2, "torch", "started by torchrun"),
}
TWO_RANKS = [key for key, (np, _, _) in LAUNCHES.items() if np == 2]


@dataclass(frozen=True)
class Run:
    result: Result
    summary: dict[str, Any]
    files: frozenset[str]  # names in the run directory


@functools.cache
def run(line: str, added: str) -> Run:
    line = command(line, {"--preset cartpole": "--preset smoke"})
    with tempfile.TemporaryDirectory() as folder:
        # HOME: horovodrun has a cache there, which two jobs must not write at the same time.
        line = f"{line} {added} --run-dir {folder}/run"
        result = launch_line(line, 2, timeout=180, env={"HOME": folder})
        assert result.returncode == 0, str(result)
        files = frozenset(path.name for path in Path(folder, "run").iterdir())
        return Run(result, json.loads(Path(folder, "run", "summary.json").read_text()), files)


@pytest.mark.parametrize(("line", "added"), LAUNCHES)
def test_command_trains_to_the_end(line: str, added: str) -> None:
    np, engine, why = LAUNCHES[line, added]
    done = run(line, added)
    summary, output = done.summary, done.result.stdout + done.result.stderr
    assert summary.keys() >= SUMMARY
    assert summary["seconds"].keys() >= PHASES
    assert (summary["world_size"], summary["comm"], summary["stopped_by"]) == (np, engine, "finished")
    assert summary["env_steps"] == 2_000
    assert summary["updates"] == (2_000 - 8 * np - 200) * 8 // (32 * np)
    assert summary["eval_episodes"] == 4
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "summary.json"} <= done.files
    # One rank prints it, not all.
    assert output.count(f"{np} rank{'s' * (np > 1)}, comm {engine} ({why}") == 1, str(done.result)
    assert output.count(", comm ") == 1, str(done.result)
    assert output.count("4 episodes: mean") == 1, str(done.result)


@pytest.mark.parametrize(("line", "added"), TWO_RANKS)
def test_all_engines_end_with_the_same_parameters(line: str, added: str) -> None:
    """The sum of two floats does not depend on their order, so with two ranks all engines compute the same bits."""
    assert run(line, added).summary["param_sha256"] == run(*TWO_RANKS[0]).summary["param_sha256"]
