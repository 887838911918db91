"""Asynchronous DQN: workers push gradients to rank 0 and pull fresh weights, and none waits for another.

Gorila's parameter server (Nair et al. 2015, "Massively Parallel Methods for Deep Reinforcement Learning") with one
shard, as in DistBelief's Downpour SGD (Dean et al. 2012). Rank 0 serves and does not act: on a core of its own it
answers at once, where a thread of an acting rank would wait for Python's lock and for that rank's kernels.

A gradient is computed with the weights that its worker pulled last; other workers' gradients have been applied since.
The number of updates in between is its staleness. Beyond `max_staleness` it is dropped, as in Gorila. With W equal
workers the staleness is W - 1.

Before evaluations, checkpoints and the end all ranks synchronize: the server's replies say that a synchronization is
due, each worker waits as soon as it reads that, and all go on with the same clock and weights. In between only rank 0's
clock is exact.
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

# How long rank 0 waits for a push before it looks at signals and silent workers.
PATIENCE_SECONDS = 0.1
# Probes without a pause. After that rank 0 sleeps between probes, which leaves its core to others where cores are few.
EAGER_PROBES = 200
PAUSE_SECONDS = 5e-5


def rejoin(comm: MpiComm, learner: Learner, living: Sequence[int], remaining: Sequence[int]) -> list[int]:
    """Continue as one job of the remaining ranks, all with rank 0's weights; a collective call.

    Args:
        comm: the ranks that took part until now, numbered in the order of `living`.
        learner: of this rank.
        living: the ranks that took part until now, by their first numbers.
        remaining: those that still do.

    Returns:
        `remaining`, as a list.
    """
    if len(remaining) < comm.size:
        comm.keep([living.index(rank) for rank in remaining])
    comm.broadcast_(learner.parameters)
    if learner.target_tau < 1.0:
        comm.broadcast_(learner.target_parameters)
    return list(remaining)


class Server(Strategy):
    """Owns optimizer, clock and target network, and applies the workers' gradients; rank 0.

    Args:
        learner: applies gradients.
        comm: the ranks.
        timer: counts the seconds that rank 0 waits for all workers.
        config: `pull_every`, `max_staleness`, `stall_timeout`, `tolerate_dead_workers`.
        clock: of the job.
        max_skipped_updates: updates of one worker skipped in a row before the run ends.
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
        self.size = comm.size  # it stays as it is when ranks leave the job
        self.channel = comm.duplicate()
        self.living = list(range(comm.size))
        self.workers = set(range(1, comm.size))
        # One buffer per worker: a message that breaks off when its worker dies must not block the others'.
        self.pushes = {worker: Message.push(learner) for worker in self.workers}
        self.replies = {worker: Message.reply(learner, comm.size) for worker in self.workers}
        self.receiving: dict[int, Any] = {}
        self.sending: dict[int, Any] = {}
        self.synchronized = self.stop = False
        self.waiting: set[int] = set()  # workers that wait for the synchronization
        self.due_since: int | None = None  # env steps before the synchronization came due
        self.last_push_at: dict[int, float] = {}
        self.checked_at = 0.0
        self.largest_weights = dict.fromkeys(self.workers, 0.0)
        self.skipped_of = dict.fromkeys(self.workers, 0)
        self.failed = (0, 0)  # updates skipped in a row, by this worker
        self.version = self.target_version = 0
        self.dropped_updates = 0
        self.staleness: Counter[int] = Counter()
        self.recent_staleness: list[int] = []

    @property
    def description(self) -> str:
        """How ranks agree, for the header of a run."""
        return describe(self.size - 1, self.config.pull_every)

    def serve(self, stop: bool) -> Outcome:
        """Serve one push, or check on the workers where none comes for a while.

        Args:
            stop: whether rank 0 votes to stop.

        Returns:
            What the push brought.
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
        """Raise: rank 0 has no gradient of its own."""
        raise AssertionError("rank 0 serves and does not learn from minibatches")

    def wait(self) -> Outcome:
        """Raise: rank 0 has no gradient of its own."""
        raise AssertionError("rank 0 serves and does not learn from minibatches")

    def exchange_stats(self, reported: Sequence[float]) -> Outcome:
        """Return rank 0's own statistics; the workers' come with their pushes."""
        self.stop = self.stop or reported[STOP] > 0
        return Outcome(np.array([*reported, *[0.0] * len(LEARNED)]), stop=self.stop)

    def synchronize(self) -> Outcome:
        """Serve until all workers wait, then give everyone the same clock and weights."""
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
        """Copy the weights to the target network; workers get it with the next weights that they pull."""
        if self.learner.target_tau == 1.0:
            self.learner.update_target()
            self.target_version += 1
        return []

    def expected_traffic(self) -> tuple[float, float]:
        """Return the messages and bytes between one worker and rank 0, both ways, per update."""
        return expected_traffic(self.learner, self.size, self.config.pull_every)

    def counters(self) -> dict[str, Any]:
        """Return the numbers that a checkpoint and the summary keep."""
        return {
            "dropped_updates": self.dropped_updates,
            "staleness": {str(key): count for key, count in sorted(self.staleness.items())},
        }

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Load what `counters` returned."""
        self.dropped_updates = counters["dropped_updates"]
        self.staleness = Counter({int(key): count for key, count in counters["staleness"].items()})

    def metrics(self) -> dict[str, float]:
        """Return the staleness since the last line of metrics, and the dropped updates so far."""
        recent, self.recent_staleness = self.recent_staleness, []
        values: dict[str, float] = {"dropped_updates": self.dropped_updates, "workers": len(self.workers)}
        if recent:
            values |= {"staleness_mean": sum(recent) / len(recent), "staleness_max": max(recent)}
        return values

    def apply_push(self, worker: int, push: Push, statistics: np.ndarray) -> Outcome:
        """Count what a worker reports, and apply `learner.gradient` if the push holds a valid gradient.

        Args:
            worker: its rank.
            push: the header of its message.
            statistics: its `STATISTICS` `[9]`.
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
        """Apply a worker's gradient, or count why not: skipped if it is not finite, dropped if it is too stale."""
        staleness = self.version - int(push.version)
        self.staleness[staleness] += 1
        self.recent_staleness.append(staleness)
        self.exchanged_updates += 1
        stale = staleness > self.config.max_staleness
        # One divisor for all workers, or samples of one would count for more than another's.
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
        """Wait a while for a push, and answer it."""
        self.timer.start("other")  # not `comm`: a server without work keeps nobody waiting
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
        """Return the rank of a worker whose push has come; None if none comes for a while."""
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
        """Answer a push; with weights, and a newer target network, if it asks for them."""
        message = self.replies[worker]
        if worker in self.sending:
            self.sending[worker].Wait()  # the last reply has arrived: the worker pushed again
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
        """Answer every worker's next push with the failure, so that all ranks end together; then raise it here."""
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
        """Look, every `PATIENCE_SECONDS`, for workers that have been silent for long: drop them, or end the job.

        Args:
            sender: the worker whose push has just come, if any.
        """
        limit = self.config.stall_timeout / 2  # sooner than the watchdog of any rank that waits for them
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
