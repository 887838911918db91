"""Asynchronous DQN: workers push gradients to rank 0 and pull fresh weights, and none waits for another.

Gorila's parameter server (Nair et al. 2015, "Massively Parallel Methods for Deep Reinforcement Learning") with one
shard, as in DistBelief's Downpour SGD (Dean et al. 2012). Rank 0 serves and does not act: on a core of its own it
answers at once, where a thread of an acting rank would wait for Python's lock and for that rank's kernels.

A gradient is of the weights that its worker pulled last; others have stepped since. How many updates lie between is
its staleness: beyond `max_staleness` it is dropped, as Gorila does. Expect it at workers - 1 where all are alike.

Evaluations, checkpoints and the end are meetings: in its answers rank 0 tells workers that one is due, each comes when
it hears it, and all go on with the same clock and weights. Between meetings only rank 0's clock is right.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from hvdqn.clock import Clock, ReportedClock
from hvdqn.sync.base import Sync
from hvdqn.trailer import LEARNED, REPORTED

if TYPE_CHECKING:
    from hvdqn.comm.mpi import MpiComm
    from hvdqn.config import ParallelConfig
    from hvdqn.learner import Learner

GRADIENT, REPORT, HERE = range(3)
# How long rank 0 waits for a push before it looks at signals and silent workers.
PATIENCE_SECONDS = 0.1
# Probes without a pause; then rank 0 sleeps between them, which leaves its core to others where there are too few.
EAGER_PROBES = 200
PAUSE_SECONDS = 5e-5


@dataclass
class Push:
    """What a worker says to rank 0, in front of its gradient. All numbers, for they travel as one float64 array."""

    kind: float
    version: float  # of the weights that the gradient is of
    target_version: float
    pull: float  # whether it wants fresh weights
    env_steps: float  # it took since its last push
    done: float  # share of the run, for the learning rate
    largest_weight: float  # of its minibatch's importance weights
    finite: float


@dataclass
class Reply:
    """What rank 0 answers, in front of weights if they were asked for."""

    env_steps: float
    updates: float
    last_tick: float  # env steps that a meeting is about; 0: none is due
    version: float
    target_version: float
    stop: float
    holds_weights: float
    holds_target: float
    skipped_in_a_row: float  # by the rank below, which ends the run
    skipped_by: float


class Message:
    """A buffer of one header, some more numbers, and tensors."""

    def __init__(self, kind: type[Push] | type[Reply], more: int, tensors: int, learner: Learner) -> None:
        numbers, n = len(fields(kind)) + more, learner.parameters.numel()
        dtype = learner.parameters.dtype
        self.head_bytes, self.tensor_bytes = 8 * numbers, n * dtype.itemsize
        self.buffer = np.zeros(self.head_bytes + tensors * self.tensor_bytes, np.uint8)
        self.numbers = self.buffer[: self.head_bytes].view(np.float64)
        self.header, self.more = np.split(self.numbers, [len(fields(kind))])
        body = torch.from_numpy(self.buffer[self.head_bytes :]).view(dtype)
        self.tensors = [body[i * n : (i + 1) * n] for i in range(tensors)]

    def with_tensors(self, count: int) -> np.ndarray:
        """What is sent with so many of the tensors."""
        return self.buffer[: self.head_bytes + count * self.tensor_bytes]


class Star(Sync):
    """What both sides share: the channel, apart from that of collectives, and what it costs."""

    def __init__(self, comm: MpiComm, config: ParallelConfig) -> None:
        super().__init__(ranks_per_update=1)
        self.comm, self.config = comm, config
        self.rank, self.size = comm.rank, comm.size  # whoever leaves
        self.living = list(range(comm.size))  # as the channel numbers them, in the order of `comm`
        self.agreed = False
        self.version = self.target_version = 0

    @property
    def description(self) -> str:
        """How ranks agree, for people."""
        weights = (
            "at every update" if self.config.pull_every == 1 else f"every {self.config.pull_every} updates"
        )
        return f"rank 0 serves {self.size - 1} workers, which push gradients and pull weights {weights}"

    def attach(self, learner: Learner) -> None:
        """Open the channel; a collective call."""
        self.channel = self.comm.duplicate()

    def expected_traffic(self, learner: Learner) -> tuple[float, float]:
        """Messages and bytes between one worker and rank 0, both ways, in an update."""
        tensors = 1 + (1 + (learner.target_tau < 1.0)) / self.config.pull_every
        numbers = len(fields(Push)) + len(REPORTED) + len(LEARNED) + len(fields(Reply)) + self.size
        return 2.0, 8 * numbers + tensors * learner.parameters.numel() * learner.parameters.element_size()

    def _meet(self, learner: Learner, living: Sequence[int]) -> None:
        """All have come: be one job again, of those that live, with rank 0's weights."""
        if len(living) < self.comm.size:
            self.comm.keep([self.living.index(rank) for rank in living])
        self.living = list(living)
        self.comm.broadcast_(learner.parameters)
        if learner.target_tau < 1.0:
            self.comm.broadcast_(learner.target_parameters)
        self.agreed = True


class Worker(Star):
    """Acts, learns, pushes; rank 1 and above."""

    def __init__(self, comm: MpiComm, config: ParallelConfig, clock: ReportedClock) -> None:
        super().__init__(comm, config)
        self.clock = clock
        self.awaited: Any = None
        self.pulling = False
        self.updates_since_pull = 0

    def attach(self, learner: Learner) -> None:
        """Open the channel; a collective call."""
        super().attach(learner)
        self.push = Message(Push, len(REPORTED) + len(LEARNED), 1, learner)
        self.reply = Message(Reply, self.size, 2, learner)

    def begin(self, learner: Learner) -> None:
        """Push the gradient; ask for fresh weights if it is time."""
        self._hear(learner)
        self.updates_since_pull += 1
        self.push.tensors[0].copy_(learner.gradient)  # on a GPU, the CPU waits here
        self._send(learner, GRADIENT, pull=self.updates_since_pull >= self.config.pull_every)
        self.traffic.updates += 1

    def finish(self, learner: Learner) -> None:
        """Wait for fresh weights, if they were asked for."""
        if self.pulling:
            self._hear(learner)

    def exchange(self, learner: Learner) -> None:
        """Tell rank 0 of env steps and episodes."""
        self._hear(learner)
        self._send(learner, REPORT)
        self._hear(learner)

    def agree(self, learner: Learner) -> None:
        """Come to the meeting."""
        if self.agreed:
            return
        self._hear(learner)
        learner.trailer.write((0.0,) * len(REPORTED))
        self._send(learner, HERE)
        self._hear(learner)
        self.clock.met = True
        with learner.timer.during("comm"):
            self._meet(learner, np.flatnonzero(self.reply.more).tolist())
        # Rank 0's weights came with the meeting.
        self.version, self.updates_since_pull = int(Reply(*self.reply.header.tolist()).version), 0

    def sync_target(self, learner: Learner) -> list[int]:
        """Rank 0's target comes with its weights."""
        return []

    def _send(self, learner: Learner, kind: int, pull: bool = False) -> None:
        trailer = learner.trailer
        trailer.read()
        self.push.header[:] = astuple(
            Push(
                kind=kind,
                version=self.version,
                target_version=self.target_version,
                pull=pull,
                env_steps=self.clock.unreported(),
                done=learner.done,
                largest_weight=trailer.largest_weight,
                finite=not trailer.spoilt,
            )
        )
        self.push.more[:] = np.concatenate((trailer.reported(), trailer.learned))
        self.pulling, self.agreed = pull, False
        sent = self.push.with_tensors(kind == GRADIENT)
        self.awaited = (self.channel.Irecv(self.reply.buffer, 0), self.channel.Isend(sent, 0))
        self.traffic.count(sent.nbytes)

    def _hear(self, learner: Learner) -> None:
        """Wait for the answer to the last push, if one is due, and do as it says."""
        if self.awaited is None:
            return
        before = learner.timer.start("comm")
        for request in self.awaited:
            request.Wait()
        self.awaited = None
        learner.timer.start(before)
        reply, living = Reply(*self.reply.header.tolist()), self.reply.more
        if not living[self.rank]:
            self._dismissed()
        self.clock.hear(int(reply.env_steps), int(reply.updates), int(reply.last_tick))
        learner.stop_voted = learner.stop_voted or reply.stop > 0
        learner.give_up_after(int(reply.skipped_in_a_row), [int(reply.skipped_by)])
        tensors = iter(self.reply.tensors)
        if reply.holds_weights:
            learner.parameters.copy_(next(tensors))
            self.version, self.updates_since_pull = int(reply.version), 0
        if reply.holds_target:
            learner.target_parameters.copy_(next(tensors))
            self.target_version = int(reply.target_version)
        self.traffic.count(self.reply.with_tensors(int(reply.holds_weights + reply.holds_target)).nbytes)

    def _dismissed(self) -> NoReturn:
        """The others went on without this rank: nothing that it could say to them is awaited any more."""
        print(
            f"hvdqn: rank {self.rank} was taken for dead and left out; it ends", file=sys.stderr, flush=True
        )
        os._exit(1)


class Server(Star):
    """Owns optimizer, clock and target; rank 0."""

    def __init__(self, comm: MpiComm, config: ParallelConfig, clock: Clock) -> None:
        super().__init__(comm, config)
        self.clock = clock
        self.workers = set(range(1, comm.size))
        self.here: set[int] = set()
        self.meeting_since: int | None = None  # env steps before what it is about came due
        self.heard_at: dict[int, float] = {}
        self.looked_at = 0.0
        self.largest_weights = dict.fromkeys(self.workers, 0.0)
        self.skipped_in_a_row = dict.fromkeys(self.workers, 0)
        self.failed = (0, 0)
        self.dropped_updates = 0
        self.staleness: Counter[int] = Counter()
        self.recent_staleness: list[int] = []

    def attach(self, learner: Learner) -> None:
        """Open the channel; a collective call."""
        super().attach(learner)
        told = len(REPORTED) + len(LEARNED)
        # One for each worker: a message that breaks off when its worker dies must not hold up the others'.
        self.pushes = {worker: Message(Push, told, 1, learner) for worker in self.workers}
        self.replies = {worker: Message(Reply, self.size, 2, learner) for worker in self.workers}
        self.awaited: dict[int, Any] = {}
        self.sent: dict[int, Any] = {}

    def turn(
        self, learner: Learner, iterate: Callable[[], None], report: Callable[[], Sequence[float]]
    ) -> None:
        """Serve one push, or look around where none comes for a while."""
        if self.agreed or not self.heard_at:  # nobody could say anything while all met
            self.heard_at = dict.fromkeys(self.workers, time.monotonic())
        learner.stop_voted = learner.stop_voted or report()[0] > 0
        self.clock.last_tick = 0
        self._serve(learner)

    def begin(self, learner: Learner) -> None:
        """Rank 0 has no gradient of its own."""
        raise AssertionError("rank 0 serves and does not learn from minibatches")

    def finish(self, learner: Learner) -> None:
        """Rank 0 has no gradient of its own."""
        raise AssertionError("rank 0 serves and does not learn from minibatches")

    def exchange(self, learner: Learner) -> None:
        """Hear this rank's own report: workers' come with their pushes."""
        learner.hear(learner.trailer.reported(), learner.trailer.learned, 0)

    def agree(self, learner: Learner) -> None:
        """Call a meeting, serve until all workers have come, and give everyone the same clock and weights."""
        if self.agreed:
            return
        self.meeting_since = self.clock.env_steps - self.clock.last_tick
        if not self.heard_at:
            self.heard_at = dict.fromkeys(self.workers, time.monotonic())
        while self.here != self.workers:
            self._serve(learner)
        self.clock.last_tick = self.clock.env_steps - self.meeting_since
        for worker in sorted(self.workers):
            self._reply(learner, worker)
        self.here.clear()
        self.meeting_since = None
        with learner.timer.during("comm"):
            for request in self.sent.values():
                request.Wait()
            self._meet(learner, [0, *sorted(self.workers)])

    def sync_target(self, learner: Learner) -> list[int]:
        """Take the weights for the target's; workers get it with the next weights that they pull."""
        if learner.config.target_tau == 1.0:
            learner.target_parameters.copy_(learner.parameters)
            self.target_version += 1
        return []

    def counters(self) -> dict[str, Any]:
        """What was counted: kept in a checkpoint."""
        return {
            "dropped_updates": self.dropped_updates,
            "staleness": {str(key): count for key, count in sorted(self.staleness.items())},
        }

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Put back what `counters` gave."""
        self.dropped_updates = counters["dropped_updates"]
        self.staleness = Counter({int(key): count for key, count in counters["staleness"].items()})

    def measures(self) -> dict[str, float]:
        """Since the last line of metrics: how stale gradients were; and how many were dropped so far."""
        recent, self.recent_staleness = self.recent_staleness, []
        measured: dict[str, float] = {"dropped_updates": self.dropped_updates, "workers": len(self.workers)}
        if recent:
            measured |= {"staleness_mean": sum(recent) / len(recent), "staleness_max": max(recent)}
        return measured

    def take(
        self, learner: Learner, worker: int, push: Push, reported: np.ndarray, learned: np.ndarray
    ) -> None:
        """Count what a worker tells, and step along `learner.gradient` if it is its gradient and fit to step along."""
        self.agreed = False
        self.clock.advance(int(push.env_steps))
        norm = float(torch.linalg.vector_norm(learner.gradient)) if push.kind == GRADIENT else 0.0
        fit = push.kind == GRADIENT and self._is_fit(learner, worker, push, math.isfinite(norm))
        if fit:
            # One divisor for all workers, or samples of one would count for more than another's.
            self.largest_weights[worker] = push.largest_weight
            largest = max(self.largest_weights.values())
            learned = learned / (largest, *(1.0 for _ in LEARNED[1:]))
            learner.done = push.done
            learner.descend(norm / largest, largest)
            self.version += 1
            self.clock.updates += 1
        learner.hear(reported, learned, int(fit))

    def _is_fit(self, learner: Learner, worker: int, push: Push, finite: bool) -> bool:
        staleness = self.version - int(push.version)
        self.staleness[staleness] += 1
        self.recent_staleness.append(staleness)
        self.traffic.updates += 1
        if not (push.finite and finite):
            learner.skipped_updates += 1
            self.skipped_in_a_row[worker] += 1
            if self.skipped_in_a_row[worker] >= learner.config.max_skipped_updates:
                self.failed = (self.skipped_in_a_row[worker], worker)
            return False
        self.skipped_in_a_row[worker] = 0
        if staleness > self.config.max_staleness:
            self.dropped_updates += 1
            return False
        return True

    def _serve(self, learner: Learner) -> None:
        """Wait a while for a push, and answer it."""
        learner.timer.start("other")  # not `comm`: a server that has nothing to do keeps nobody waiting
        worker = self._next_worker()
        learner.timer.start("compute")
        self._bury(worker)
        if worker is None:
            return
        message = self.pushes[worker]
        push = Push(*message.header.tolist())
        if push.kind == GRADIENT:
            learner.gradient.copy_(message.tensors[0])
        reported, learned = np.split(message.more, [len(REPORTED)])
        if worker not in self.workers:  # it was taken for dead
            self._reply(learner, worker)
            return
        self.traffic.count(message.with_tensors(push.kind == GRADIENT).nbytes)
        self.take(learner, worker, push, reported, learned)
        if push.kind == HERE:
            self.here.add(worker)
        else:
            self._reply(learner, worker, push)
        if self.failed[0]:
            self._tell_failure(learner, {worker, *self.here})

    def _next_worker(self) -> int | None:
        """The rank of a worker whose push has come; None if none comes for a while."""
        for worker in self.pushes.keys() - self.awaited.keys() - self.here:
            self.awaited[worker] = self.channel.Irecv(self.pushes[worker].buffer, worker)
        awaited, deadline = list(self.awaited), time.monotonic() + PATIENCE_SECONDS
        requests, probes = list(self.awaited.values()), 0
        while (found := self.comm.first_done(requests)) is None:
            probes += 1
            if probes > EAGER_PROBES:
                time.sleep(PAUSE_SECONDS)
                if time.monotonic() > deadline:
                    return None
        del self.awaited[awaited[found]]
        return awaited[found]

    def _reply(self, learner: Learner, worker: int, push: Push | None = None) -> None:
        reply = self.replies[worker]
        if worker in self.sent:
            self.sent[worker].Wait()  # it has come: the worker pushed again
        weights = push is not None and push.pull > 0
        follows = learner.target_tau < 1.0
        target = push is not None and weights and (follows or push.target_version < self.target_version)
        meeting = self.meeting_since is not None
        reply.header[:] = astuple(
            Reply(
                env_steps=self.clock.env_steps,
                updates=self.clock.updates,
                last_tick=self.clock.env_steps - (self.meeting_since or 0) if meeting else 0,
                version=self.version,
                target_version=self.target_version,
                stop=learner.stop_voted,
                holds_weights=weights,
                holds_target=target,
                skipped_in_a_row=self.failed[0],
                skipped_by=self.failed[1],
            )
        )
        reply.more[:] = [rank == 0 or rank in self.workers for rank in range(self.size)]
        tensors = [learner.parameters] * weights + [learner.target_parameters] * target
        for slot, tensor in zip(reply.tensors, tensors, strict=False):
            slot.copy_(tensor)
        sent = reply.with_tensors(len(tensors))
        self.sent[worker] = self.channel.Isend(sent, worker)
        self.traffic.count(sent.nbytes)

    def _tell_failure(self, learner: Learner, told: set[int]) -> None:
        """All must end together: answer every worker's next push with the failure, then raise it here."""
        while not told >= self.workers:
            worker = self._next_worker()
            self._bury(worker)
            if worker is not None:
                self._reply(learner, worker)
                told.add(worker)
        for worker in self.here:
            self._reply(learner, worker)
        for request in self.sent.values():
            request.Wait()
        learner.give_up_after(self.failed[0], [self.failed[1]])

    def _bury(self, heard: int | None) -> None:
        """Look, now and then, for workers of which nothing was heard for long: go on without them, or end the job."""
        limit = self.config.stall_timeout / 2  # sooner than the watchdog of any rank that waits for them
        now = time.monotonic()
        if heard is not None:
            self.heard_at[heard] = now
        if now < self.looked_at + PATIENCE_SECONDS:
            return
        self.looked_at = now
        for worker in sorted(self.workers - self.here):
            silence = now - self.heard_at[worker]
            if limit > 0 and silence > limit:
                self._leave_out(worker, silence)

    def _leave_out(self, worker: int, silence: float) -> None:
        limit = f"--stall-timeout {self.config.stall_timeout:g}"
        said = f"hvdqn: rank {worker} has not been heard of for {silence:.0f} s ({limit})"
        self.workers.discard(worker)
        if not self.config.tolerate_dead_workers or not self.workers:
            print(
                f"{said}. Ending the job; start it again to resume, or give --tolerate-dead-workers",
                file=sys.stderr,
                flush=True,
            )
            self.comm.abort(1)
        self.largest_weights.pop(worker)
        self.sent.pop(worker, None)
        print(f"{said}: the other {len(self.workers)} go on without it", file=sys.stderr, flush=True)
