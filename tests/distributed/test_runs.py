"""Runs on two ranks that stop at a return, are evaluated elsewhere, or are tracked."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from hvdqn.run_directory import read_launches
from tests.distributed.runs import evaluations, summary, train

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("sync", ["gradients", "parameters", "server"])
def test_all_ranks_stop_together_at_a_return(sync: str, tmp_path: Path) -> None:
    """Any evaluation of CartPole has a return of 5 or more, so that the first one ends the run."""
    flags = ("--sync", sync, "--stop-at-return", "5", "--eval-every", "500")
    result = train("mpirun", 2, tmp_path, *flags)
    assert result.returncode == 0, result
    ended = summary(tmp_path)
    assert ended["stopped_by"] == "return"
    assert list(evaluations(tmp_path)) == [ended["env_steps"]]
    assert 500 <= ended["env_steps"] < 1000
    assert "the evaluation reached --stop-at-return" in result.stdout
    if sync == "gradients":  # the run has what it was to reach
        again = train("mpirun", 2, tmp_path, *flags)
        assert again.returncode == 0, again
        assert summary(tmp_path)["env_steps"] == ended["env_steps"]
        assert summary(tmp_path)["launches"] == len(read_launches(tmp_path)) == 2


def test_an_evaluation_elsewhere(tmp_path: Path) -> None:
    """With sutton_barto_reward the return of CartPole is -1 or 0, and that of training is above 5."""
    flags = ("--eval-env-kwargs", '{"sutton_barto_reward": true}', "--eval-every", "1000")
    result = train("mpirun", 2, tmp_path, *flags)
    assert result.returncode == 0, result
    assert all(-1 <= value <= 0 for value in evaluations(tmp_path).values())
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    returns = [line["episode_return_mean"] for line in lines if line.get("episode_return_mean")]
    assert min(returns) > 5


def test_only_rank_0_tracks_and_a_resumed_run_continues(tmp_path: Path) -> None:
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip(
            "mlflow is not installed: --track mlflow is NOT tested; launch/setup.sh --test installs it"
        )
    from mlflow import MlflowClient

    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "MLFLOW_EXPERIMENT_NAME": "mine"}
    # A resumed run has --track from its config.yaml.
    for launcher, np, flags in (("mpirun", 2, ("1000", "--track", "mlflow")), ("python", 1, ("1600",))):
        result = train(launcher, np, tmp_path / "run", "--total-env-steps", *flags, **store)
        assert result.returncode == 0, result
    client = MlflowClient(store["MLFLOW_TRACKING_URI"])
    [run] = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FINISHED"
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == sorted(set(steps))
    assert max(steps) >= 1600 - 200
    assert run.data.params["preset"] == "smoke"
