"""Run the training loop. Start reading at `Trainer.train`.

The clock decides when the ranks update, copy the target network, evaluate, save and end together: by integer arithmetic
on global env steps, which gives the same on every rank. The strategy (see `sync`) exchanges gradients or parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvdqn.comm import Comm
from hvdqn.config import Config
from hvdqn.faults import StopSignal, check_replicas, reinstall_handlers
from hvdqn.parts import importance_at
from hvdqn.rank import Acting, Parts
from hvdqn.recorder import Recorder
from hvdqn.replay import Batch
from hvdqn.sync import Outcome
from hvdqn.sync.statistics import REPORTED

# While no updates are due, which would carry statistics and votes to stop, ranks exchange these every so many
# iterations. They are few, so that a run stops within half a minute of a signal even if an iteration takes seconds.
POLL_ITERATIONS = 8
NO_EPISODES = (0.0,) * (len(REPORTED) - 1)


class Trainer:
    """Trains on one rank. All ranks must call its methods together.

    Args:
        config: the checked configuration, the same on every rank.
        comm: the collectives over all ranks.
        stop: holds whether this rank received a signal to stop.
        parts: this rank's parts.
        recorder: writes metrics, evaluations and checkpoints.
    """

    acting: Acting

    def __init__(
        self, config: Config, comm: Comm, stop: StopSignal, parts: Parts, recorder: Recorder
    ) -> None:
        self.config, self.comm, self.stop, self.parts, self.recorder = config, comm, stop, parts, recorder
        self.clock, self.learner, self.strategy = parts.clock, parts.learner, parts.strategy
        self.timer, self.overlap = parts.timer, parts.overlap
        if parts.acting is not None:
            self.acting = parts.acting
        self.acted_env_steps = 0  # env steps of this rank since this process started
        self.stopped_by = ""  # what ends the run early: "signal", "return" or "callback"
        self.target_due = False
        self.updating = False
        self.batch: Batch | None = None  # the minibatch of the update in progress
        self.prefetched: Batch | None = None  # the minibatch of the next update

    def complete(self) -> None:
        """Train to the end of the run or to a vote to stop, then save, evaluate and write the summary."""
        self.recorder.show_progress()
        self.train()
        self.accumulate(self.strategy.synchronize())
        self.update_target_if_due()
        self.stop.all_ranks_agreed = True
        self.recorder.save()
        self.evaluate()
        if self.stopped_by == "signal":
            with self.timer.during("comm"):
                signaled = any(self.comm.all_gather_object(bool(self.stop.name)))
            self.stopped_by = "signal" if signaled else "callback"
        self.recorder.finish(self.stopped_by or "finished", self.acted_env_steps)
        self.close()
        with self.timer.during("comm"):
            self.comm.barrier()

    def train(self, until_env_steps: int | None = None) -> None:
        """Train until this many global env steps, by default those of the run, or until it stops early."""
        total = self.config.run.total_env_steps if until_env_steps is None else until_env_steps
        self.exchange_stats()  # a rank may have been asked to stop before the start
        while self.clock.env_steps < total and not self.stopped_by:
            self.iterate()
            self.timer.start("other")
            self.run_due_events()

    def iterate(self) -> None:
        """Take the updates that are due, and one step in every environment; the last update runs during the step."""
        due = self.clock.updates_due()
        overlapped = due > 0 and self.overlap != "none"
        for remaining in reversed(range(int(overlapped), due)):
            self.update(prefetch=remaining > 0)
        if overlapped and self.overlap == "exchange":
            self.begin_update()
        self.timer.start("act")
        actions = self.acting.actor.choose(self.parts.epsilons.at(self.clock.env_steps))
        self.timer.start("env")
        self.acting.actor.send(actions)
        if overlapped and self.overlap == "update":  # a GPU learns while the environments step
            self.begin_update()
            self.finish_update()
            self.timer.start("env")
        step = self.acting.actor.receive()
        self.timer.start("add")
        self.acting.replay.add(actions, step)
        self.clock.tick()
        self.acted_env_steps += len(actions)
        if overlapped:
            if self.overlap == "exchange":
                self.finish_update()
            if self.acting.replay.uses_td_errors:
                self.update_priorities()
        elif due == 0 and self.clock.poll_due(POLL_ITERATIONS):
            self.exchange_stats()

    def update(self, prefetch: bool = False) -> None:
        """Take one update: sample, compute the gradient, exchange it, step.

        With `prefetch`, sample the minibatch of the next update during the exchange, unless TD errors change it.
        """
        self.begin_update()
        if prefetch and not self.acting.replay.uses_td_errors:
            self.prefetched = self.sample()
        self.finish_update()
        if self.acting.replay.uses_td_errors:
            self.update_priorities()

    def begin_update(self) -> None:
        """Compute the gradient of a minibatch, and let the strategy start to exchange it."""
        self.batch, self.prefetched = self.prefetched or self.sample(), None
        report, progress = self.pop_report(), self.clock.env_steps / self.config.run.total_env_steps
        self.clock.count_update()
        self.updating = True
        self.timer.start("compute")
        if self.batch is None:
            self.strategy.launch(report, None, 0.0, progress)
        else:
            learned = self.learner.compute_gradient(self.batch)
            self.strategy.launch(report, learned, float(self.batch.weight.max()), progress)

    def finish_update(self) -> None:
        """Wait until the strategy has finished the exchange and taken the optimizer step."""
        self.accumulate(self.strategy.wait())
        self.updating = False

    def update_priorities(self) -> None:
        """Give the TD errors of the last minibatch to prioritized replay."""
        if self.batch is not None:
            self.timer.start("sample")
            self.acting.replay.update_priorities(self.batch.row_ids, self.learner.td_errors.cpu().numpy())

    def sample(self) -> Batch | None:
        """Return this rank's next minibatch, with importance weights if replay is prioritized."""
        self.timer.start("sample")
        replay, batch_size = self.acting.replay, self.config.replay.batch_per_rank
        if not replay.uses_td_errors:
            return replay.sample(batch_size)
        return replay.sample(batch_size, importance_at(self.config, self.parts.role, self.clock.env_steps))

    def pop_report(self) -> Sequence[float]:
        """Return this rank's values of `REPORTED`: its vote to stop, and sums over episodes since the last call."""
        episodes = self.acting.envs.pop_episodes()
        if not episodes:
            return (float(self.stop.requested), *NO_EPISODES)
        self.recorder.end_episodes(episodes)
        returns, lengths, envs = map(np.array, list(zip(*episodes, strict=True))[:3])
        greediest = self.parts.epsilons.greediest[envs]
        return (
            float(self.stop.requested),
            float(len(episodes)),
            float(returns.sum()),
            float(lengths.sum()),
            float(greediest.sum()),
            float(returns[greediest].sum()),
        )

    def exchange_stats(self) -> None:
        """Exchange statistics and votes to stop with the other ranks, without a gradient."""
        self.accumulate(self.strategy.exchange_stats(self.pop_report()))

    def accumulate(self, outcome: Outcome) -> None:
        """Add up the statistics of an exchange; a rank's vote to stop sets `stopped_by`, which ends `train`."""
        self.recorder.totals.add(outcome)
        if outcome.stop:
            self.stopped_by = "signal"

    def run_due_events(self) -> None:
        """Copy the target network, log, evaluate and save a checkpoint, each if the last env steps made it due."""
        run, due = self.config.run, self.clock.due
        over = self.clock.env_steps >= run.total_env_steps or self.stopped_by != ""
        if over or due(run.eval_every) or due(run.checkpoint_every):
            self.accumulate(self.strategy.synchronize())
        self.target_due |= due(self.config.learning.target_every)
        self.update_target_if_due()
        if due(run.log_every):
            self.recorder.log()
            reinstall_handlers()  # an environment may have replaced the signal handlers in any step
        if due(run.eval_every):
            self.evaluate()
        if due(run.checkpoint_every):
            self.recorder.save()
        if self.timer.since >= self.recorder.metrics.draw_at:
            self.recorder.show_progress()

    def update_target_if_due(self) -> None:
        """Copy the online network to the target network as soon as the strategy can, and compare the ranks' weights."""
        differing_ranks = self.strategy.update_target() if self.target_due else None
        if differing_ranks is not None:
            check_replicas(differing_ranks, self.clock.env_steps)
            self.target_due = False

    def evaluate(self) -> None:
        """Evaluate the greedy policy, unless the run is ending; a vote to stop, or the return, may end it."""
        if self.stopped_by:
            return
        if not self.recorder.evaluate(lambda: self.stop.requested):
            self.stopped_by = "signal"
        self.stop_if_return_reached()

    def stop_if_return_reached(self) -> None:
        """End training if the last evaluation, which is the same on all ranks, reached `stop_at_return`."""
        if not self.stopped_by and self.recorder.return_reached():
            self.stopped_by = "return"

    def close(self) -> None:
        """Close the environments, and what the strategy has connected."""
        self.acting.envs.close()
        self.strategy.close()


class ServingTrainer(Trainer):
    """Rank 0 under `--sync server`: it applies the workers' gradients in place of acting and learning."""

    def iterate(self) -> None:
        """Wait briefly for a worker's message, apply its gradient and answer it."""
        self.accumulate(self.strategy.serve(self.stop.requested))

    def pop_report(self) -> Sequence[float]:
        """Return this rank's values of `REPORTED`: its vote to stop, and no episodes."""
        return (float(self.stop.requested), *NO_EPISODES)

    def close(self) -> None:
        """Do nothing: this rank has no environments to close."""
