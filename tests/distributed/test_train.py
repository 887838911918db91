"""Runs on two ranks that must repeat themselves, and Pong."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.launchers import launch

pytestmark = pytest.mark.distributed

SMALL = ("--preset", "smoke", "--total-env-steps", "1000", "--eval-episodes", "2")


def train(run_dir: Path, launcher: str, *flags: str, timeout: float = 180) -> dict[str, Any]:
    """Train on two ranks; return the summary."""
    argv = ["-m", "hvdqn.train", "--run-dir", str(run_dir), *flags]
    result = launch(launcher, 2, argv, timeout=timeout)
    assert result.returncode == 0, str(result)
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    assert summary["world_size"] == 2
    return {**summary, "said": result.stdout}


@pytest.mark.parametrize(
    "flags", [("--overlap",), ("--no-overlap", "--comm", "mpi")], ids=["overlap", "no overlap"]
)
def test_the_same_seed_ends_with_the_same_parameters(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Every engine is held to it by test_launchers.py: they all end with the same bits."""
    runs = [train(tmp_path / name, "mpirun", *SMALL, *flags) for name in ("first", "second")]
    assert runs[0]["updates"] > 90
    assert runs[0]["param_sha256"] == runs[1]["param_sha256"]
    assert runs[0]["eval_return_mean"] == runs[1]["eval_return_mean"]


@pytest.mark.timeout(620)
def test_pong(tmp_path: Path) -> None:
    """As a user starts it, with a sixteenth of the updates and a fifth of the evaluation, for the time's sake."""
    if find_spec("ale_py") is None:
        pytest.skip("ale_py is not installed: Pong is NOT tested")
    pong = "--preset atari --env ALE/Pong-v5 --total-env-steps 8000 --replay-capacity 8000 --learning-starts 1000"
    fewer = "--replay-ratio 0.5 --eval-episodes 2"
    summary = train(tmp_path, "horovodrun-gloo", *pong.split(), *fewer.split(), timeout=600)
    assert summary["env_steps"] == 8_000
    assert summary["updates"] == (8_000 - 16 - 1_000) // 2 // 64
    assert -21 <= summary["eval_return_mean"] <= 21
    megabytes = float(re.search(r"replay ([\d.]+) MB when full", summary["said"])[1])  # type: ignore[index]
    assert megabytes * 1e6 / 4_000 <= 7_500  # each rank holds half
