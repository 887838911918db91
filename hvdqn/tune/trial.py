"""Run one trial: a training under its launcher, watched for evaluations, and ended when it is not promising."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from hvdqn.config import setting
from hvdqn.errors import EXIT_FINISHED, EXIT_REQUEUE
from hvdqn.metrics import METRICS_FILE, SUMMARY_FILE, read_metrics
from hvdqn.tune.space import words_of

if TYPE_CHECKING:
    from optuna import Trial

POLL_SECONDS = 0.5
END_SECONDS = 60.0  # until a training that was asked to end is killed


class TrialFailedError(RuntimeError):
    """A training ended with an error. The message is one line."""


class PrunedError(RuntimeError):
    """A training was ended because others were better at the same env step."""


class InterruptedTrialError(RuntimeError):
    """This process or the training was asked to stop. The training wrote a checkpoint, if there was time."""


class StopFlag:
    """Record that a signal asked this process to stop."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def command_of(launcher: str, flags: Sequence[str], values: Mapping[str, str], run_dir: Path) -> list[str]:
    """Return the command line of a trial: the values that it tries come after the flags of all trials."""
    tried = [word for name, value in values.items() for word in words_of(setting(name), value)]
    train = [sys.executable, "-m", "hvdqn.train", *flags, *tried, "--run-dir", str(run_dir)]
    return [*shlex.split(launcher), *train]


def run_trial(command: Sequence[str], run_dir: Path, trial: Trial, stop: StopFlag) -> float:
    """Train to the end and return the mean return of the last evaluation.

    The output goes to a file beside the run directory.

    Args:
        command: from `command_of`.
        run_dir: of the trial.
        trial: gets the evaluations, and decides whether to go on.
        stop: whether this process was asked to stop.

    Raises:
        PrunedError: others were better.
        InterruptedTrialError: this process or the training was asked to stop.
        TrialFailedError: training failed.
    """
    output = run_dir.with_suffix(".log")
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        watch(process, run_dir, trial, stop)
    finally:
        end(process, signal.SIGTERM)
    if process.returncode == EXIT_REQUEUE:
        raise InterruptedTrialError
    if process.returncode != EXIT_FINISHED:
        raise TrialFailedError(f"training ended with {process.returncode}: {last_line(output)}")
    value = json.loads((run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))["eval_return_mean"]
    if value is None:
        raise TrialFailedError("the run has no finite evaluation return; leave --eval-episodes 0 out")
    return float(value)


def watch(process: subprocess.Popen[bytes], run_dir: Path, trial: Trial, stop: StopFlag) -> None:
    """Wait until the training ends, and report its evaluations.

    Raises:
        PrunedError: others were better.
        InterruptedTrialError: this process was asked to stop.
    """
    reported = -1
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if stop.requested:
            end(process, signal.SIGUSR2)
            raise InterruptedTrialError
        for env_steps, value in evaluations(run_dir):
            if env_steps > reported:
                trial.report(value, env_steps)
                reported = env_steps
                if trial.should_prune():
                    raise PrunedError(f"return {value:.2f} at env step {env_steps:,}")


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    """Return env steps and mean return of each evaluation so far."""
    try:
        records = read_metrics(run_dir / METRICS_FILE)
    except (OSError, ValueError):  # not there yet, or being written
        return []
    found = [(record.get("env_steps"), record.get("eval_return_mean")) for record in records]
    return [(env_steps, value) for env_steps, value in found if env_steps is not None and value is not None]


def end(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the launcher, which ends its ranks; kill what is left after a while."""
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_line(output: Path) -> str:
    """Return the last line of a file that is not empty."""
    lines = output.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
