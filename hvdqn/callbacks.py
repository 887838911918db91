"""Callbacks: code of the user that a run calls. `hvdqn.train(callbacks=[...])` or `--callback module:attribute`.

class StopWhenSolved(hvdqn.Callback):
    def on_evaluation(self, run, evaluation):
        if evaluation.mean >= 475:
            run.stop()
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hvdqn.clock import Clock
from hvdqn.comm import Comm
from hvdqn.config import Config, import_attribute
from hvdqn.envs import Episode
from hvdqn.errors import UserError
from hvdqn.evaluate import Evaluation
from hvdqn.faults import StopSignal


class Run:
    """A run as callbacks see it.

    Attributes:
        config: its settings.
        run_dir: its directory.
        rank: this rank; to do something once in a job, do it on rank 0.
        size: number of ranks.
    """

    def __init__(self, config: Config, comm: Comm, run_dir: Path, clock: Clock, stop: StopSignal) -> None:
        self.config, self.run_dir, self.rank, self.size = config, run_dir, comm.rank, comm.size
        self._clock, self._stop = clock, stop

    @property
    def env_steps(self) -> int:
        """Env steps of all ranks so far."""
        return self._clock.env_steps

    @property
    def updates(self) -> int:
        """Updates so far."""
        return self._clock.updates

    def stop(self) -> None:
        """Ask for the end of the run. All ranks stop together after a few more env steps; one that asks is enough.

        The run ends with a checkpoint and a summary, without another evaluation.
        """
        self._stop.ask()


class Callback:
    """Override what you need. Every method is called on every rank, at the same env step, unless it says otherwise.

    An exception ends the run on all ranks.
    """

    def on_log(self, run: Run, values: Mapping[str, float]) -> None:
        """Receive a line of metrics.jsonl: the mean return of training episodes, loss, speed, and so on."""

    def on_evaluation(self, run: Run, evaluation: Evaluation) -> None:
        """Receive the greedy returns of an evaluation, of the episodes of all ranks."""

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """Receive the path of a checkpoint that is complete on disk."""

    def on_episode(self, run: Run, episode: Episode) -> None:
        """Receive a training episode that has ended in an environment of this rank: its return, length and info.

        `episode.info` holds the numbers, text and arrays of numbers in the info of the last step.
        """


def load_callbacks(config: Config) -> list[Callback]:
    """Return the callbacks that `--callback module:attribute` names; a class is called without arguments.

    Raises:
        UserError: it cannot be imported, or is no `hvdqn.Callback`.
    """
    callbacks = []
    for path in config.run.callback:
        found = import_attribute(path, "--callback")
        try:
            callback = found if isinstance(found, Callback) or not callable(found) else found()
        except TypeError as error:
            raise UserError(f"--callback '{path}' cannot be called without arguments ({error})") from error
        check_callback(callback, f"--callback '{path}'")
        callbacks.append(callback)
    return callbacks


def check_callback(callback: object, name: str) -> None:
    """Refuse what is no callback.

    Raises:
        UserError: it is not.
    """
    if not isinstance(callback, Callback):
        raise UserError(f"{name} is a {type(callback).__name__}; derive it from hvdqn.Callback")
