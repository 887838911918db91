"""Record a run: write lines of metrics, evaluations, checkpoints and the summary."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdqn.callbacks import Callback, Run
from hvdqn.checkpoint import (
    POLICY,
    Checkpoints,
    Progress,
    best_evaluation,
    contents,
    policy_part,
    reset_environments,
)
from hvdqn.comm import Comm
from hvdqn.config import Config
from hvdqn.envs import Episode
from hvdqn.evaluate import Evaluator
from hvdqn.faults import StopSignal, check_replicas, raise_on_all_ranks
from hvdqn.metrics import Metrics, WaitHint, Writer, open_tracker, write_summary
from hvdqn.parts import recording
from hvdqn.provenance import time_now
from hvdqn.rank import Parts
from hvdqn.run_directory import read_launches
from hvdqn.seeds import rank_seeds
from hvdqn.summary import log_summary, summarize
from hvdqn.sync import InfoMeans, Totals

log = logging.getLogger(__name__)


class Recorder:
    """Records a run. All ranks must call its methods together, except those that draw the progress display.

    Args:
        config: the configuration of the run.
        comm: the collectives over all ranks.
        run_dir: the directory that the run is recorded in.
        parts: this rank's parts.
        checkpoints: reads and writes the checkpoints of the run.
        stop: holds whether this rank was asked to stop; callbacks may ask for it.
        callbacks: are called with what is recorded.

    Attributes:
        totals: sums of the ranks' statistics since the last line of metrics.
        progress: the results of the last evaluation, and other facts that a resumed run needs.
        activity: words for the progress display while the ranks do not train, such as "saving a checkpoint".
        returns: of the episodes of the last evaluation, of all ranks.
        summary: the content of summary.json, once the run has ended.
    """

    def __init__(
        self,
        config: Config,
        comm: Comm,
        run_dir: Path,
        parts: Parts,
        checkpoints: Checkpoints,
        stop: StopSignal,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config, self.comm, self.run_dir = config, comm, run_dir
        self.parts, self.checkpoints = parts, checkpoints
        self.callbacks, self.run = callbacks, Run(config, comm, run_dir, parts.clock, stop)
        self.returns: tuple[float, ...] = ()
        self.summary: dict[str, Any] = {}
        # Under `server`, ranks write their lines of metrics at different times, and must not wait for each other then.
        self.logs_infos = config.parallel.sync != "server"
        self.infos = InfoMeans(config.run.log_info if self.logs_infos else ())
        self.timer = parts.timer
        same = config.evaluation_environment() == config.environment
        envs = parts.acting.envs if parts.acting and same else None
        record = recording(config)
        self.evaluator = Evaluator(config, comm, parts.device, self.timer, parts.threads, record, others=envs)
        rank_0_dir = run_dir if comm.rank == 0 else None
        trackers = self.open_trackers()
        self.metrics = Metrics(rank_0_dir, config.run.total_env_steps, self.timer, trackers=trackers)
        self.hint = WaitHint(self.timer, comm.name, parts.learner.online.num_parameters)
        self.best_eval_return = comm.broadcast_object(best_evaluation(run_dir) if comm.rank == 0 else 0.0)
        self.totals, self.progress = Totals(), Progress()
        self.logged_at_env_steps = self.saved_at_env_steps = -1
        self.seconds_before = self.timer.seconds()
        self.activity = ""
        # Long checkpoint reads and writes call it, so that the progress display stays current.
        self.timer.when_alive = self.show_progress
        self.reported_discarded = False

    def open_trackers(self) -> list[Writer]:
        """Return the tracker of `--track` on rank 0, and none elsewhere; a collective call.

        Raises:
            UserError: on all ranks, if it cannot be opened.
        """
        name = self.config.run.track
        if name == "none":
            return []
        return raise_on_all_ranks(
            self.comm, lambda: [open_tracker(name, self.run_dir)] if self.comm.rank == 0 else [], self.timer
        )

    def resume(self) -> None:
        """Continue the metrics from the clock's env step; drop lines that an earlier attempt wrote after it."""
        self.seconds_before = self.timer.seconds()
        launches = read_launches(self.run_dir) if self.comm.rank == 0 else []
        self.metrics.describe({**self.config.flat(), **(launches[-1] if launches else {})})
        self.metrics.resume(self.parts.clock.env_steps, self.parts.clock.updates)

    def decide_on_replay(self) -> None:
        """Decide, once in a run and equally on all ranks, whether checkpoints hold replay and environments."""
        choice, progress = self.config.run.checkpoint_replay, self.progress
        if choice != "auto":
            progress.keeps_replay = choice == "yes"
        if progress.keeps_replay is not None:
            return
        acting = self.parts.acting
        own_bytes = acting.replay.nbytes + acting.envs.saved_bytes() if acting else 0
        sizes = self.comm.all_gather_object(own_bytes)
        needed = 2 * (self.config.run.checkpoint_keep + 1) * sum(sizes)
        fits = self.comm.broadcast_object(shutil.disk_usage(self.run_dir).free > needed)
        progress.keeps_replay = fits
        if not fits:
            log.info(
                f"checkpoints leave replay and the state of environments out: they would take {needed / 2e9:.1f} GB, "
                f"and as much again is not free. A resumed run fills replay anew; --checkpoint-replay yes keeps both "
                f"all the same"
            )

    def show_progress(self) -> None:
        """Redraw the progress display, unless it was redrawn a moment ago."""
        self.metrics.show(self.parts.clock.env_steps, self.parts.clock.updates, self.activity)

    def show_evaluation(self, finished: int) -> None:
        """Redraw the progress display during an evaluation. `finished`: number of episodes that have ended."""
        self.activity = f"evaluation: {finished} of {self.config.run.eval_episodes} episodes"
        self.show_progress()

    def log(self) -> None:
        """Write one line of training metrics, unless one was already written at this env step."""
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
            **self.infos.exchange(self.comm),
        }
        record = self.metrics.log(clock.env_steps, clock.updates, values)
        for callback in self.callbacks:
            callback.on_log(self.run, record.values)
        if hint := self.hint.due():
            log.info(hint)

    def evaluate(self, stop: Callable[[], bool]) -> bool:
        """Evaluate the greedy policy, record the result, and keep the weights if they are the best so far.

        Every rank plays its share of `eval_episodes`. Nothing is done if this is 0, or if an evaluation was already
        made at this env step.

        Args:
            stop: returns whether this rank votes to stop before the end.

        Returns:
            False if a rank voted to stop, so that there is no result.
        """
        clock, progress = self.parts.clock, self.progress
        if progress.evaluated_at_env_steps == clock.env_steps or self.config.run.eval_episodes == 0:
            return True
        evaluation = self.evaluator.run(self.parts.strategy.whole_network(), stop, self.show_evaluation)
        self.activity = ""
        if self.evaluator.borrowed:
            seeds = rank_seeds(self.config.run.seed, self.comm.rank, clock.env_steps)
            reset_environments(self.parts, seeds.environments)
        if evaluation is None:
            return False
        self.exchange_notes()
        progress.evaluated_at_env_steps = clock.env_steps
        self.returns = evaluation.returns
        progress.evaluation = {
            "eval_return_mean": evaluation.mean,
            "eval_return_std": evaluation.std,
            "eval_episodes": len(evaluation.returns),
        }
        if evaluation.mean > self.best_eval_return and self.save_best(evaluation.mean):
            self.best_eval_return = evaluation.mean
        self.metrics.log(clock.env_steps, clock.updates, progress.evaluation)
        log.info(f"evaluation at env step {clock.env_steps:,}, {evaluation}")
        for callback in self.callbacks:
            callback.on_evaluation(self.run, evaluation)
        return True

    def end_episodes(self, episodes: Sequence[Episode]) -> None:
        """Call the callbacks for the episodes of this rank that have ended; not a collective call."""
        for episode in episodes:
            if episode.info:
                self.infos.add(episode.info)
            for callback in self.callbacks:
                callback.on_episode(self.run, episode)

    def return_reached(self) -> bool:
        """Return whether the last evaluation reached the return at which the run stops."""
        goal = self.config.run.stop_at_return
        return goal is not None and self.progress.evaluation.get("eval_return_mean", -math.inf) >= goal

    def exchange_notes(self) -> None:
        """Warn once if the replay of some rank discarded transitions; find out if episodes report `is_success`."""
        acting = self.parts.acting
        with self.timer.during("comm"):
            notes = self.comm.all_gather_object(
                (acting.replay.discarded if acting else 0, self.infos.has_success)
            )
        counts, successes = zip(*notes, strict=True)
        if any(successes) and self.logs_infos:
            self.infos.watch_success()
        if any(counts) and not self.reported_discarded:
            self.reported_discarded = True
            ranks = ", ".join(str(rank) for rank, count in enumerate(counts) if count)
            log.warning(
                f"{sum(counts):,} transitions of rank {ranks} have a reward, an observation or a TD error that is not "
                "finite. Nothing is learned from them: look for NaN or Inf in the environment. summary.json counts them"
            )

    def save(self) -> None:
        """Write a checkpoint, unless one was already written at this env step."""
        env_steps = self.parts.clock.env_steps
        if self.saved_at_env_steps == env_steps:
            return
        self.exchange_notes()
        state = contents(self.parts, self.comm, self.totals, self.progress)
        saved = self.write_checkpoint({**state, **self.policy()})
        self.saved_at_env_steps = env_steps
        for callback in self.callbacks if saved else ():
            callback.on_checkpoint(self.run, self.checkpoints.directory / f"{env_steps:012d}")

    def save_best(self, eval_return: float) -> bool:
        """Save the weights as `checkpoints/best`; return False if that failed.

        `eval_return`: the mean return of their evaluation.
        """
        return self.write_checkpoint(self.policy(eval_return_mean=eval_return), best=True)

    def policy(self, **more: float) -> dict[str, Any]:
        """Return the policy file of a checkpoint, on rank 0, with more numbers in it; a collective call."""
        network = self.parts.strategy.whole_network()
        if self.comm.rank > 0:
            return {}
        env_steps = self.parts.clock.env_steps
        return {POLICY: policy_part(network, self.config, self.parts.spaces, env_steps, **more)}

    def write_checkpoint(self, parts: Mapping[str, Any], best: bool = False) -> bool:
        """Write a checkpoint; return False if that failed, which is counted and logged but does not end the run.

        Args:
            parts: the content of each file that this rank writes, by the file's name without ".safetensors".
            best: whether these are the weights of the best evaluation.

        Raises:
            DriftError: ranks that must be equal differ, so that a resumed run would have wrong weights.
        """
        env_steps = self.parts.clock.env_steps
        check_replicas(self.parts.strategy.differing_ranks(), env_steps)
        self.activity = "saving a checkpoint"
        self.show_progress()
        with self.timer.during("save"):
            failure = self.checkpoints.save(env_steps, parts, self.config.flat(), best)
        self.activity = ""
        if failure:
            self.progress.failed_checkpoints += 1
            log.warning(
                f"the checkpoint at env step {env_steps:,} could not be written, the one before stands: {failure}"
            )
        return not failure

    def finish(self, stopped_by: str, acted_env_steps: int) -> None:
        """Write `summary.json`, and log how the run ended and where its files are.

        Args:
            stopped_by: what ended the run: "finished", "signal", "return" or "callback".
            acted_env_steps: env steps of this rank since this process started.
        """
        self.exchange_notes()
        summary = summarize(
            self.config,
            self.comm,
            self.parts,
            self.totals,
            self.progress,
            stopped_by,
            acted_env_steps,
            self.seconds_before,
        )
        self.metrics.show(self.parts.clock.env_steps, self.parts.clock.updates, last=True)
        log_summary(self.run_dir, summary)
        if self.comm.rank == 0:
            launches = read_launches(self.run_dir)
            if launches:
                began = {"started_at": launches[0]["started_at"], "launches": len(launches)}
                summary = {**summary, **launches[-1], **began, "ended_at": time_now()}
            self.metrics.summarize(summary)
            try:
                write_summary(self.run_dir, summary)
            except OSError as error:
                log.warning(f"summary.json could not be written: {error}")
        self.summary = self.comm.broadcast_object(summary)
        self.metrics.close()
