"""`hvdqn tune`: several processes on one study, also when one is interrupted."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from hvdqn.config import parse
from tests.distributed.runs import summary
from tests.launchers import Job, clean_environment

pytestmark = pytest.mark.distributed

SHORT = "--preset smoke --total-env-steps 600 --eval-every 300 --eval-episodes 2"


@pytest.fixture(autouse=True)
def _optuna() -> None:
    """Skip without Optuna."""
    if importlib.util.find_spec("optuna") is None:
        pytest.skip("optuna is not installed: hvdqn tune is NOT tested; launch/setup.sh installs it")


def tune(study: Path, words: str, flags: str) -> Job:
    """Start `hvdqn tune`."""
    command = [
        sys.executable,
        "-m",
        "hvdqn",
        "tune",
        str(study),
        *shlex.split(words),
        "--",
        *shlex.split(flags),
    ]
    return Job(command, 1, 150, clean_environment(), None)


def test_two_processes_share_the_trials_of_a_study(tmp_path: Path) -> None:
    study = tmp_path / "study"
    words = "--search lr=1e-4:1e-2:log --search double=true,false --trials 4"
    with tune(study, words, SHORT) as one, tune(study, words, SHORT) as other:
        results = [one.wait(), other.wait()]
    assert [result.returncode for result in results] == [0, 0], results
    begun = [line for result in results for line in result.stdout.splitlines() if ": lr " in line]
    assert sorted(line.split(":")[0] for line in begun) == [f"trial {n}" for n in range(4)]
    assert all(": lr " in result.stdout for result in results)  # both have worked
    folders = sorted(path.name for path in (study / "trials").iterdir() if path.is_dir())
    assert folders == ["0000", "0001", "0002", "0003"]
    summaries = [summary(path.parent) for path in study.glob("trials/*/summary.json")]
    returns = [ended["eval_return_mean"] for ended in summaries if ended["stopped_by"] == "finished"]
    best = yaml.safe_load((study / "best.yaml").read_text())
    assert return_with(study, best["lr"]) == max(returns)
    assert parse(["--config", str(study / "best.yaml")]).run.total_env_steps == 600


def return_with(study: Path, lr: float) -> float:
    """Return the mean return of the trial with this learning rate."""
    for path in (study / "trials").iterdir():
        if (path / "config.yaml").exists() and yaml.safe_load((path / "config.yaml").read_text())["lr"] == lr:
            return float(summary(path)["eval_return_mean"])
    raise AssertionError(lr)


def test_an_interrupted_trial_is_continued(tmp_path: Path) -> None:
    """On two ranks, under the launcher prefix: they write a checkpoint, and the next process goes on from there."""
    study = tmp_path / "study"
    words = "--search lr=1e-4,1e-3 --trials 1 --launcher 'mpirun -np 2'"
    flags = "--preset smoke --comm mpi --eval-episodes 2 --total-env-steps 100000 --learning-starts 1000"
    with tune(study, words, flags) as job:
        job.wait_until(lambda: (study / "trials/0000/checkpoints/latest").exists(), "a checkpoint")
        job.launcher.terminate()
        result = job.wait()
    assert result.returncode == 75, result
    assert "trial 0 was interrupted" in result.stdout
    stopped = summary(study / "trials/0000")
    assert stopped["stopped_by"] == "signal"
    with tune(study, words, flags) as job:
        job.wait_until(lambda: "resumed from" in (study / "trials/0000.log").read_text(), "the trial went on")
        job.launcher.terminate()
        assert job.wait().returncode == 75
    with tune(study, words, "--preset smoke") as job:  # with other flags it would be another study
        refused = job.wait()
    assert refused.returncode == 2
    assert "was begun with flags" in refused.stderr
