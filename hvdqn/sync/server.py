"""Train asynchronously: workers push gradients to rank 0 and pull fresh weights, and none waits for another.

This is Gorila's parameter server (Nair et al. 2015, "Massively Parallel Methods for Deep Reinforcement Learning") on a
single process, as in DistBelief's Downpour SGD (Dean et al. 2012). Rank 0 only serves. A process of its own answers at
once, where a thread of an acting rank would wait for Python's global lock and for that rank's computations.

A worker computes a gradient with the weights that it pulled last. The number of updates that the server has applied
since then is the gradient's staleness. The server drops a gradient whose staleness exceeds `max_staleness`, as Gorila
does. With W equally fast workers the staleness is W - 1.

Before evaluations, checkpoints and the end all ranks synchronize: the server's replies say that a synchronization is
due, each worker then stops and waits, and all continue with the same clock and weights. Between synchronizations only
rank 0 knows the exact number of env steps.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hvdqn.clock import Clock
from hvdqn.comm.mpi import MpiComm
from hvdqn.config import ParallelConfig
from hvdqn.learner import Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.sync.messages import GRADIENT, WAITING, Message, Push, Reply, describe, expected_traffic
from hvdqn.sync.statistics import LEARNED, LOSS, REPORTED, STOP, Outcome
from hvdqn.sync.strategy import Strategy, check_skipped

log = logging.getLogger(__name__)

# How long rank 0 waits for a worker's message before it checks for stop signals and silent workers.
PATIENCE_SECONDS = 0.1
# How often rank 0 looks for a message without a pause. After that it sleeps between looks, which leaves its core to
# other ranks where cores are few.
EAGER_PROBES = 200
PAUSE_SECONDS = 5e-5


def rejoin(comm: MpiComm, learner: Learner, living: Sequence[int], remaining: Sequence[int]) -> list[int]:
    """Shrink the job to the remaining ranks, which must all call it, and give them rank 0's weights and buffers.

    Args:
        comm: the collectives over the ranks that took part until now; it numbers them in the order of `living`.
        learner: this rank's learner.
        living: the ranks that took part until now, by their numbers at the start of the job.
        remaining: the ranks that still take part, by the same numbers.

    Returns:
        `remaining`, as a list.
    """
    if len(remaining) < comm.size:
        comm.keep([living.index(rank) for rank in remaining])
    comm.broadcast_(learner.parameters)
    if learner.target_tau < 1.0:
        comm.broadcast_(learner.target_parameters)
    for buffer in learner.buffers.values():
        comm.broadcast_(buffer)
    return list(remaining)


class Server(Strategy):
    """Runs on rank 0: applies the workers' gradients, and owns the optimizer, the clock and the target network.

    Args:
        learner: applies gradients.
        comm: the collectives over all ranks.
        timer: counts the seconds that rank 0 waits for all workers.
        config: the settings `pull_every`, `max_staleness`, `stall_timeout` and `tolerate_dead_workers`.
        clock: counts the env steps and updates of the whole job.
        max_skipped_updates: number of updates of one worker skipped in a row that ends the run.
    """

    def __init__(
        self,
        learner: Learner,
        comm: MpiComm,
        timer: PhaseTimer,
        config: ParallelConfig,
        clock: Clock,
        max_skipped_updates: int,
    ) -> None:
        super().__init__(learner, timer)
        self.comm, self.config, self.clock = comm, config, clock
        self.max_skipped_updates = max_skipped_updates
        self.size = comm.size  # the ranks at the start; `comm.size` shrinks when ranks leave the job
        self.channel = comm.duplicate()
        self.living = list(range(comm.size))
        self.workers = set(range(1, comm.size))
        # Each worker has a buffer of its own, so that a worker that dies while it sends does not block the others.
        self.pushes = {worker: Message.push(learner) for worker in self.workers}
        self.replies = {worker: Message.reply(learner, comm.size) for worker in self.workers}
        self.receiving: dict[int, Any] = {}
        self.sending: dict[int, Any] = {}
        self.synchronized = self.stop = False
        self.waiting: set[int] = set()  # workers that wait for the synchronization
        self.due_since: int | None = None  # env steps before the step that made a synchronization due
        self.last_push_at: dict[int, float] = {}
        self.checked_at = 0.0
        self.largest_weights = dict.fromkeys(self.workers, 0.0)
        self.skipped_of = dict.fromkeys(self.workers, 0)
        self.failed = (0, 0)  # (updates skipped in a row, the worker) once they are enough to end the run
        self.version = self.target_version = 0
        self.dropped_updates = 0
        self.staleness: Counter[int] = Counter()
        self.recent_staleness: list[int] = []

    @property
    def description(self) -> str:
        """One line for the log: how often workers push gradients and pull weights."""
        return describe(self.size - 1, self.config.pull_every)

    def serve(self, stop: bool) -> Outcome:
        """Wait up to `PATIENCE_SECONDS` for a worker's message, and answer it; also look for silent workers.

        Args:
            stop: whether rank 0 votes to stop.

        Returns:
            The statistics and votes of the message, and whether its gradient was applied.
        """
        if self.synchronized or not self.last_push_at:  # nobody could push while all ranks synchronized
            self.last_push_at = dict.fromkeys(self.workers, time.monotonic())
        self.stop = self.stop or stop
        self.clock.last_tick = 0
        outcome = self._serve_one()
        outcome.stop = self.stop
        return outcome

    def launch(
        self, reported: Sequence[float], learned: Tensor | None, largest_weight: float, progress: float
    ) -> None:
        """Raise AssertionError: rank 0 has no gradient of its own."""
        raise AssertionError("rank 0 serves and does not learn from minibatches")

    def wait(self) -> Outcome:
        """Raise AssertionError: rank 0 has no gradient of its own."""
        raise AssertionError("rank 0 serves and does not learn from minibatches")

    def exchange_stats(self, reported: Sequence[float]) -> Outcome:
        """Return rank 0's own statistics, without communication; workers send theirs with each of their messages."""
        self.stop = self.stop or reported[STOP] > 0
        return Outcome(np.array([*reported, *[0.0] * len(LEARNED)]), stop=self.stop)

    def synchronize(self) -> Outcome:
        """Answer messages until all workers wait, then give all ranks the same clock and weights."""
        outcome = Outcome()
        if self.synchronized:
            return outcome
        self.due_since = self.clock.env_steps - self.clock.last_tick
        if not self.last_push_at:
            self.last_push_at = dict.fromkeys(self.workers, time.monotonic())
        while self.waiting != self.workers:
            outcome.add(self._serve_one())
        self.clock.last_tick = self.clock.env_steps - self.due_since
        for worker in sorted(self.workers):
            self._reply(worker)
        self.waiting.clear()
        self.due_since = None
        with self.timer.during("comm"):
            for request in self.sending.values():
                request.Wait()
            self.living = rejoin(self.comm, self.learner, self.living, [0, *sorted(self.workers)])
        self.synchronized = True
        outcome.stop = self.stop
        return outcome

    def update_target(self) -> list[int]:
        """Copy the weights to rank 0's target network; each worker gets it with the next weights that it pulls."""
        if self.learner.target_tau == 1.0:
            self.learner.update_target()
            self.target_version += 1
        return []

    def expected_traffic(self) -> tuple[float, float]:
        """Return how many messages and bytes one worker and rank 0 exchange per update, both directions together."""
        return expected_traffic(self.learner, self.size, self.config.pull_every)

    def counters(self) -> dict[str, Any]:
        """Return what a checkpoint and the summary keep: dropped updates, and a histogram of gradients' staleness."""
        return {
            "dropped_updates": self.dropped_updates,
            "staleness": {str(key): count for key, count in sorted(self.staleness.items())},
        }

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Restore the counts that `counters` returned."""
        self.dropped_updates = counters["dropped_updates"]
        self.staleness = Counter({int(key): count for key, count in counters["staleness"].items()})

    def metrics(self) -> dict[str, float]:
        """Return what rank 0 adds to a line of metrics: dropped updates, workers, and staleness since the last line."""
        recent, self.recent_staleness = self.recent_staleness, []
        values: dict[str, float] = {"dropped_updates": self.dropped_updates, "workers": len(self.workers)}
        if recent:
            values |= {"staleness_mean": sum(recent) / len(recent), "staleness_max": max(recent)}
        return values

    def apply_push(self, worker: int, push: Push, statistics: np.ndarray) -> Outcome:
        """Count a worker's env steps and statistics, and apply its gradient if the message has one.

        The gradient must already be in `learner.gradient`.

        Args:
            worker: the worker's rank.
            push: the header of its message.
            statistics: its values of `STATISTICS` `[9]`.

        Returns:
            The statistics, and whether an update was applied or skipped.
        """
        self.synchronized = False
        self.clock.advance(int(push.env_steps))
        self.stop = self.stop or statistics[STOP] > 0
        outcome = Outcome(statistics.copy(), stop=self.stop)
        if push.kind == GRADIENT:
            self._apply_gradient(worker, push, outcome)
        if outcome.updates == 0:
            outcome.statistics[len(REPORTED) :] = 0.0
        return outcome

    def _apply_gradient(self, worker: int, push: Push, outcome: Outcome) -> None:
        """Apply a worker's gradient, unless it is not finite (counted as skipped) or too stale (counted as dropped).

        Adds the update, or the skipped update, to `outcome`.
        """
        staleness = self.version - int(push.version)
        self.staleness[staleness] += 1
        self.recent_staleness.append(staleness)
        self.exchanged_updates += 1
        stale = staleness > self.config.max_staleness
        # The largest importance weight of all workers divides every gradient, or samples of one worker would count
        # more than another's.
        others = max((w for rank, w in self.largest_weights.items() if rank != worker), default=0.0)
        largest = max(others, push.largest_weight)
        finite = bool(push.finite)
        if finite and not stale:
            finite = self.learner.apply_gradient(push.progress, largest)
        if not finite:
            outcome.skipped = 1
            self.skipped_of[worker] += 1
            if self.skipped_of[worker] >= self.max_skipped_updates:
                self.failed = (self.skipped_of[worker], worker)
            return
        self.skipped_of[worker] = 0
        if stale:
            self.dropped_updates += 1
            return
        self.largest_weights[worker] = push.largest_weight
        outcome.updates = 1
        outcome.statistics[LOSS] /= largest
        self.version += 1
        self.clock.updates += 1

    def _serve_one(self) -> Outcome:
        """Wait up to `PATIENCE_SECONDS` for a worker's message, apply it and answer it."""
        self.timer.start("other")  # not "comm": while the server has no work, it keeps no rank waiting
        worker = self._next_worker()
        self.timer.start("compute")
        self._check_silent_workers(worker)
        if worker is None:
            return Outcome()
        message = self.pushes[worker]
        push = Push(*message.header.tolist())
        if worker not in self.workers:  # it was dropped
            self._reply(worker)
            return Outcome()
        has_gradient = push.kind == GRADIENT
        if has_gradient:
            self.learner.gradient.copy_(message.tensors[0])
        self.sent_messages += 1
        self.sent_bytes += message.with_tensors(has_gradient).nbytes
        outcome = self.apply_push(worker, push, message.numbers)
        if push.kind == WAITING:
            self.waiting.add(worker)
        else:
            self._reply(worker, push)
        if self.failed[0]:
            self._send_failure({worker, *self.waiting})
        return outcome

    def _next_worker(self) -> int | None:
        """Return the rank of a worker whose message has arrived; None if none arrives in `PATIENCE_SECONDS`."""
        for worker in self.pushes.keys() - self.receiving.keys() - self.waiting:
            self.receiving[worker] = self.channel.Irecv(self.pushes[worker].buffer, worker)
        workers, requests = list(self.receiving), list(self.receiving.values())
        deadline, probes = time.monotonic() + PATIENCE_SECONDS, 0
        while (found := self.comm.first_done(requests)) is None:
            probes += 1
            if probes > EAGER_PROBES:
                time.sleep(PAUSE_SECONDS)
                if time.monotonic() > deadline:
                    return None
        del self.receiving[workers[found]]
        return workers[found]

    def _reply(self, worker: int, push: Push | None = None) -> None:
        """Start to send the answer to a worker: with weights if `push` asks for them, else without.

        The target network comes with the weights if the server's is newer than the worker's.
        """
        message = self.replies[worker]
        if worker in self.sending:
            self.sending[worker].Wait()  # returns at once: a worker that pushes again has the last reply
        weights = push is not None and push.pull > 0
        follows = self.learner.target_tau < 1.0
        target = push is not None and weights and (follows or push.target_version < self.target_version)
        due = self.due_since is not None
        header = Reply(
            env_steps=self.clock.env_steps,
            updates=self.clock.updates,
            last_tick=self.clock.env_steps - (self.due_since or 0) if due else 0,
            version=self.version,
            target_version=self.target_version,
            stop=self.stop,
            holds_weights=weights,
            holds_target=target,
            skipped_in_a_row=self.failed[0],
            skipped_by=self.failed[1],
        )
        message.write(header, [rank == 0 or rank in self.workers for rank in range(self.size)])
        tensors = [self.learner.parameters] * weights + [self.learner.target_parameters] * target
        for slot, tensor in zip(message.tensors, tensors, strict=False):
            slot.copy_(tensor)
        sent = message.with_tensors(len(tensors))
        self.sending[worker] = self.channel.Isend(sent, worker)
        self.sent_messages += 1
        self.sent_bytes += sent.nbytes

    def _send_failure(self, answered: set[int]) -> None:
        """Answer every worker that too many updates were skipped, so that all ranks end together; then raise.

        Workers in `answered` get no second answer. Raises NonFiniteError, always.
        """
        while not answered >= self.workers:
            worker = self._next_worker()
            self._check_silent_workers(worker)
            if worker is not None:
                self._reply(worker)
                answered.add(worker)
        for worker in self.waiting:
            self._reply(worker)
        for request in self.sending.values():
            request.Wait()
        check_skipped(self.failed[0], [self.failed[1]], self.max_skipped_updates)

    def _check_silent_workers(self, sender: int | None) -> None:
        """Drop workers that have sent nothing for half of `--stall-timeout`, or end the job.

        Args:
            sender: the worker whose message has just arrived, if any.
        """
        # Half, so that this acts before the watchdogs of other ranks that wait for the silent one end the job.
        limit = self.config.stall_timeout / 2
        now = time.monotonic()
        if sender is not None:
            self.last_push_at[sender] = now
        if now < self.checked_at + PATIENCE_SECONDS:
            return
        self.checked_at = now
        for worker in sorted(self.workers - self.waiting):
            silence = now - self.last_push_at[worker]
            if limit > 0 and silence > limit:
                self._drop_worker(worker, silence)

    def _drop_worker(self, worker: int, silence: float) -> None:
        limit = f"--stall-timeout {self.config.stall_timeout:g}"
        message = f"rank {worker} has been silent for {silence:.0f} s ({limit})"
        self.workers.discard(worker)
        if not self.config.tolerate_dead_workers or not self.workers:
            log.error(
                "%s. Ending the job; start it again to resume, or give --tolerate-dead-workers", message
            )
            self.comm.abort(1)
        self.largest_weights.pop(worker)
        self.sending.pop(worker, None)
        log.error("%s: the other %d go on without it", message, len(self.workers))
