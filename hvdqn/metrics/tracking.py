"""Experiment trackers: Weights & Biases and MLflow. Only rank 0 has one.

Both libraries are configured by their own environment variables (`WANDB_MODE`, `WANDB_PROJECT`, `MLFLOW_TRACKING_URI`,
`MLFLOW_EXPERIMENT_NAME`, ...), and only the libraries themselves read keys and passwords. The id of a tracked run is
kept in the run directory, so that a resumed run continues it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdqn.errors import UserError
from hvdqn.metrics.writers import Record, Writer, replace_file, tag_of

TRACKING_FILE = "tracking.json"
PROJECT = "hvdqn"
LONGEST_PARAM = 500  # characters that MLflow keeps of a parameter


def check_tracker(name: str) -> None:
    """Check that the library of a tracker is installed.

    Raises:
        UserError: it is missing.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"--track {name} needs {name}, which is not installed; pip install 'hvdqn[{name}]'")


def open_tracker(name: str, run_dir: Path) -> Writer:
    """Return the tracker `wandb` or `mlflow` of a run, begun anew or continued.

    Raises:
        UserError: it cannot be opened, for example because nobody is logged in.
    """
    tracker = {"wandb": Wandb, "mlflow": Mlflow}[name]
    try:
        return tracker(run_dir)
    except Exception as error:
        raise UserError(f"--track {name}: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    """Return the first line of an error's message, without passwords in URLs."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"//[^/@\s]*@", "//", lines[0])


def read_run_ids(run_dir: Path) -> dict[str, str]:
    """Return the ids under which trackers know the run."""
    try:
        ids: dict[str, str] = json.loads((run_dir / TRACKING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return ids


def write_run_id(run_dir: Path, tracker: str, run_id: str) -> None:
    """Keep the id under which a tracker knows the run.

    Raises:
        OSError: it cannot be written.
    """
    ids = {**read_run_ids(run_dir), tracker: run_id}
    replace_file(run_dir / TRACKING_FILE, json.dumps(ids).encode() + b"\n")


class Wandb(Writer):
    """Sends records to Weights & Biases. Its files are in the run directory, unless `WANDB_DIR` is set.

    Args:
        run_dir: of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        import wandb

        run_id = read_run_ids(run_dir).get("wandb") or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_dir.name),
            id=run_id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(run_dir)),
            reinit="create_new",  # a program of the user may have a run of its own
            # hvdqn records the git commit itself, and its progress bar must not pass through another program.
            settings=wandb.Settings(console="off", disable_git=True, save_code=False, silent=True),
        )
        write_run_id(run_dir, "wandb", run_id)
        # Steps of wandb itself only grow, but a resumed run goes back to its checkpoint.
        self._run.define_metric("env_steps")
        self._run.define_metric("*", step_metric="env_steps")
        self._exit_code = 1

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Record the settings."""
        self._run.config.update(dict(settings), allow_val_change=True)  # type: ignore[no-untyped-call]

    def write(self, record: Record) -> None:
        """Send one record."""
        self._run.log({"env_steps": record.env_steps, **tagged(record)})

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Record the summary; the run counts as finished."""
        self._run.summary.update({f"summary/{name}": value for name, value in summary.items()})
        self._exit_code = 0

    def close(self) -> None:
        """Send what is left."""
        self._run.finish(exit_code=self._exit_code)


class Mlflow(Writer):
    """Sends records to MLflow, in a thread of MLflow's own, so that ranks do not wait for a slow server.

    Args:
        run_dir: of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        self._run_id = read_run_ids(run_dir).get("mlflow", "")
        if self._run_id:
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            run = self._client.create_run(self._experiment_id(), run_name=run_dir.name)
            self._run_id = run.info.run_id
            write_run_id(run_dir, "mlflow", self._run_id)
        self._sent: Any = None  # the batch that was sent last
        self._status = "FAILED"

    def _experiment_id(self) -> str:
        """Return the id of the experiment that MLflow's variables name, made if it is missing."""
        if "MLFLOW_EXPERIMENT_ID" in os.environ:
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:  # it exists; perhaps another run has just made it
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Record the settings as parameters. MLflow cannot change one: a new value in a resumed run becomes a tag."""
        from mlflow.entities import Param, RunTag

        texts = {name: str(value)[:LONGEST_PARAM] for name, value in settings.items()}
        before = self._client.get_run(self._run_id).data.params
        new = [Param(name, text) for name, text in texts.items() if name not in before]
        changed = [RunTag(name, text) for name, text in texts.items() if before.get(name, text) != text]
        attempt(self._client.log_batch, self._run_id, params=new, tags=changed)

    def write(self, record: Record) -> None:
        """Send one record."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(tag, value, now, record.env_steps) for tag, value in tagged(record).items()]
        self._sent = attempt(self._client.log_batch, self._run_id, metrics=metrics, synchronous=False)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Record how the run ended; it counts as finished."""
        for name in ("stopped_by", "param_sha256"):
            attempt(self._client.set_tag, self._run_id, name, summary[name])
        self._status = "FINISHED"

    def close(self) -> None:
        """Wait until everything is sent."""
        if self._sent is not None:
            attempt(self._sent.wait)
        attempt(self._client.set_terminated, self._run_id, self._status)


def tagged(record: Record) -> dict[str, int | float]:
    """Return the values of a record under the tags that TensorBoard shows, with the counters."""
    named = {**record.values, "updates": record.updates, "wall_seconds": record.wall_seconds}
    return {tag_of(name): value for name, value in named.items()}


def attempt(call: Any, *arguments: Any, **named: Any) -> Any:
    """Call a function of a tracker, whose own errors are no OSError.

    Raises:
        OSError: it failed.
    """
    try:
        return call(*arguments, **named)
    except Exception as error:
        raise OSError(reason_of(error)) from None
