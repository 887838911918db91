"""What a run leaves behind: lines of metrics, evaluations, checkpoints and the summary."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hvdqn.checkpoint import LEARNER, Checkpoints, Progress, best_evaluation, contents
from hvdqn.comm import Comm
from hvdqn.config import Config
from hvdqn.evaluate import Evaluator
from hvdqn.metrics import Metrics, WaitHint, write_summary
from hvdqn.parts import recording
from hvdqn.rank import Parts
from hvdqn.summary import log_summary, summarize
from hvdqn.sync import Totals

log = logging.getLogger(__name__)


class Recorder:
    """Records a run. Every method is called by all ranks together.

    Args:
        config: of the run.
        comm: the ranks.
        run_dir: where the run is recorded.
        parts: of this rank.
        checkpoints: of the run.

    Attributes:
        totals: what the ranks learned since the last line of metrics.
        progress: what was evaluated and saved so far.
    """

    def __init__(
        self, config: Config, comm: Comm, run_dir: Path, parts: Parts, checkpoints: Checkpoints
    ) -> None:
        self.config, self.comm, self.run_dir = config, comm, run_dir
        self.parts, self.checkpoints = parts, checkpoints
        self.timer = parts.timer
        self.evaluator = Evaluator(config, comm, parts.device, self.timer, parts.threads, recording(config))
        self.metrics = Metrics(run_dir if comm.rank == 0 else None, config.run.total_env_steps, self.timer)
        self.hint = WaitHint(self.timer, comm.name, parts.learner.parameters.numel())
        self.best_eval_return = comm.broadcast_object(best_evaluation(run_dir) if comm.rank == 0 else 0.0)
        self.totals, self.progress = Totals(), Progress()
        self.logged_at_env_steps = self.saved_at_env_steps = -1
        self.seconds_before = self.timer.seconds()

    def resume(self) -> None:
        """Continue the records at the clock's env step: later ones are dropped."""
        self.seconds_before = self.timer.seconds()
        self.metrics.resume(self.parts.clock.env_steps, self.parts.clock.updates)

    def decide_on_replay(self) -> None:
        """Decide, once in a run and alike on every rank, whether checkpoints hold replay."""
        choice, progress = self.config.run.checkpoint_replay, self.progress
        if choice != "auto":
            progress.keeps_replay = choice == "yes"
        if progress.keeps_replay is not None:
            return
        acting = self.parts.acting
        sizes = self.comm.all_gather_object(acting.replay.nbytes if acting else 0)
        needed = 2 * (self.config.run.checkpoint_keep + 1) * sum(sizes)
        fits = self.comm.broadcast_object(shutil.disk_usage(self.run_dir).free > needed)
        progress.keeps_replay = fits
        if not fits:
            log.info(
                f"checkpoints leave replay out: it would take {needed / 2e9:.1f} GB, and as much again is not free. "
                f"A resumed run fills it anew; --checkpoint-replay yes keeps it all the same"
            )

    def log(self) -> None:
        """Write one line of metrics, unless there is one for this env step."""
        clock, learner = self.parts.clock, self.parts.learner
        if self.logged_at_env_steps == clock.env_steps:
            return
        self.logged_at_env_steps = clock.env_steps
        values = {
            **self.totals.pop(),
            "epsilon": self.parts.epsilons.mean(clock.env_steps),
            "lr": learner.lr,
            "grad_norm": learner.grad_norm,
            **self.parts.strategy.metrics(),
        }
        self.metrics.log(clock.env_steps, clock.updates, values)
        if hint := self.hint.due():
            log.info(hint)

    def evaluate(self, stop: Callable[[], bool]) -> bool:
        """Play greedily, every rank its share of the episodes, unless that was done at this env step.

        With `eval_episodes` 0 nothing is played.

        Args:
            stop: whether this rank votes to stop before the end.

        Returns:
            False if a rank voted to stop, so that there is no result.
        """
        clock, progress = self.parts.clock, self.progress
        if progress.evaluated_at_env_steps == clock.env_steps or self.config.run.eval_episodes == 0:
            return True
        evaluation = self.evaluator.run(self.parts.learner.online, stop)
        if evaluation is None:
            return False
        progress.evaluated_at_env_steps = clock.env_steps
        progress.evaluation = {
            "eval_return_mean": evaluation.mean,
            "eval_return_std": evaluation.std,
            "eval_episodes": len(evaluation.returns),
        }
        if evaluation.mean > self.best_eval_return and self.save_best(evaluation.mean):
            self.best_eval_return = evaluation.mean
        self.metrics.log(clock.env_steps, clock.updates, progress.evaluation)
        log.info(f"evaluation at env step {clock.env_steps:,}, {evaluation}")
        return True

    def save(self) -> None:
        """Write a checkpoint, unless there is one of this env step."""
        if self.saved_at_env_steps != self.parts.clock.env_steps:
            self.write_checkpoint(contents(self.parts, self.comm, self.totals, self.progress))
            self.saved_at_env_steps = self.parts.clock.env_steps

    def save_best(self, eval_return: float) -> bool:
        """Keep the weights of the best evaluation so far as `checkpoints/best`; return whether that worked."""
        weights = {"learner": self.parts.learner.state(), "eval_return_mean": eval_return}
        parts = {LEARNER: weights} if self.comm.rank == 0 else {}
        return self.write_checkpoint(parts, best=True)

    def write_checkpoint(self, parts: Mapping[str, Any], best: bool = False) -> bool:
        """Write a checkpoint; return whether that worked. A disk that fails is counted and does not end the run."""
        env_steps = self.parts.clock.env_steps
        with self.timer.during("save"):
            failure = self.checkpoints.save(env_steps, parts, self.config.flat(), best)
        if failure:
            self.progress.failed_checkpoints += 1
            log.warning(
                f"the checkpoint at env step {env_steps:,} could not be written, the one before stands: {failure}"
            )
        return not failure

    def finish(self, stopped: bool, acted_env_steps: int) -> None:
        """Write the summary, and log how the run ended and where everything is."""
        summary = summarize(
            self.config,
            self.comm,
            self.parts,
            self.totals,
            self.progress,
            stopped,
            acted_env_steps,
            self.seconds_before,
        )
        log_summary(self.run_dir, self.parts.clock.env_steps, stopped, summary["rank_env_steps_per_second"])
        if self.comm.rank == 0:
            try:
                write_summary(self.run_dir, summary)
            except OSError as error:
                log.warning(f"summary.json could not be written: {error}")
        self.metrics.close()
