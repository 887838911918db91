"""Weights & Biases and MLflow, without a network: the real libraries, and what they keep on the disk."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from hvdqn.errors import UserError
from hvdqn.metrics import Record, check_tracker, open_tracker
from hvdqn.metrics.tracking import reason_of

SECRET = "0123456789abcdef0123456789abcdef01234567"
SETTINGS = {"env": "CartPole-v1", "lr": 0.001, "hidden": [120, 84], "stop_at_return": None}


def need(module: str) -> None:
    """Skip the test without this library."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(
            f"{module} is not installed: --track {module} is NOT tested; launch/setup.sh --test installs it"
        )


def track(name: str, run_dir: Path, env_steps: int, loss: float, finished: bool = True) -> None:
    """Track one record of a run, as one launch of it."""
    tracker = open_tracker(name, run_dir)
    tracker.describe({**SETTINGS, "total_env_steps": env_steps})
    tracker.resume(0)
    tracker.write(Record(env_steps, env_steps // 2, 1.5, {"loss": loss, "eval_return_mean": 9.0}))
    if finished:
        tracker.summarize({"stopped_by": "finished", "param_sha256": "abc", "env_steps": env_steps})
    tracker.close()


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tracker("none")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--track wandb needs wandb, .*pip install 'hvdqn\[wandb\]'"):
        check_tracker("wandb")


def test_errors_do_not_show_passwords() -> None:
    error = OSError("cannot reach https://me:secret@host/x\nmore")
    assert reason_of(error) == "cannot reach https://host/x"


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let MLflow write to a database of this test."""
    need("mlflow")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return store


def test_mlflow_keeps_settings_and_metrics_and_continues_a_resumed_run(
    tmp_path: Path, mlflow_store: str
) -> None:
    from mlflow import MlflowClient

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    track("mlflow", run_dir, 100, 0.5, finished=False)
    client = MlflowClient(mlflow_store)
    run_id = json.loads((run_dir / "tracking.json").read_text())["mlflow"]
    assert client.get_run(run_id).info.status == "FAILED"
    track("mlflow", run_dir, 200, 0.25)
    experiment = client.get_experiment_by_name("hvdqn")
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "run", "FINISHED")
    assert run.data.params["hidden"] == "[120, 84]"
    assert run.data.params["total_env_steps"] == "100"  # MLflow changes no parameter
    assert run.data.tags["total_env_steps"] == "200"
    assert run.data.tags["stopped_by"] == "finished"
    losses = [(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss")]
    assert losses == [(100, 0.5), (200, 0.25)]
    assert run.data.metrics["eval/return_mean"] == 9.0


def test_a_tracker_that_cannot_be_opened_is_wrong_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://me:secret@host")
    with pytest.raises(UserError, match="--track mlflow: ") as raised:
        open_tracker("mlflow", tmp_path)
    assert "secret" not in str(raised.value)


def test_wandb_offline_keeps_one_run_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    track("wandb", run_dir, 100, 0.5, finished=False)
    track("wandb", run_dir, 200, 0.25)
    run_id = json.loads((run_dir / "tracking.json").read_text())["wandb"]
    files = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * len(files)
    assert len(files) == 2
    records = files[1].read_bytes()
    for word in (b"train/loss", b"eval/return_mean", b"CartPole-v1", b"param_sha256"):
        assert word in records
    assert b"train/loss" in files[0].read_bytes()
    everything = [file for file in run_dir.rglob("*") if file.is_file()]
    assert not [file for file in everything if SECRET.encode() in file.read_bytes()]
