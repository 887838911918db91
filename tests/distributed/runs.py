"""Small runs of hvdqn.train through a launcher, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.launchers import Job, Result, launch, start

# Also where the machine is busy with other work.
TIMEOUT_SECONDS = 120.0
# What the launchers make of the ranks' exit code 75: Horovod's Gloo launcher and torchrun know only 1.
STOPPED = {"python": 75, "mpirun": 75, "horovodrun-mpi": 75, "horovodrun-gloo": 1, "torchrun": 1}


def arguments(launcher: str, run_dir: Path, *flags: str) -> list[str]:
    """The smoke preset with other flags. Under mpirun it uses plain MPI: Horovod has launchers of its own."""
    engine = ("--comm", "mpi") if launcher == "mpirun" else ()
    preset = [] if any(flag.startswith("--preset") for flag in flags) else ["--preset", "smoke"]
    return ["-m", "hvdqn.train", *preset, "--run-dir", str(run_dir), *engine, *flags]


def train(launcher: str, np: int, run_dir: Path, *flags: str, **variables: str) -> Result:
    """A run to its end."""
    return launch(launcher, np, arguments(launcher, run_dir, *flags), TIMEOUT_SECONDS, env=variables)


def begin(launcher: str, np: int, run_dir: Path, *flags: str, **variables: str) -> Job:
    """A run under way."""
    return start(launcher, np, arguments(launcher, run_dir, *flags), TIMEOUT_SECONDS, env=variables)


def saved(run_dir: Path) -> list[int]:
    """Env steps of the checkpoints there are."""
    folder = run_dir / "checkpoints"
    return sorted(int(entry.name) for entry in folder.glob("*") if entry.name.isdigit())


def summary(run_dir: Path) -> dict[str, Any]:
    """What summary.json says."""
    read: dict[str, Any] = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return read


def evaluations(run_dir: Path) -> dict[int, float]:
    """Mean greedy return after so many env steps, of every evaluation in metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "eval_return_mean" in row]
    return {row["env_steps"]: row["eval_return_mean"] for row in rows}


def wait_for_checkpoint(job: Job, run_dir: Path, env_steps: int) -> None:
    """Until a checkpoint of `env_steps` or more is there."""
    job.wait_until(lambda: max(saved(run_dir), default=-1) >= env_steps, f"a checkpoint at {env_steps}")
