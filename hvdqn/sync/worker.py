"""Push gradients to rank 0 and pull weights from it, on every other rank, under `--sync server`: see `sync.server`."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from torch import Tensor

from hvdqn.clock import WorkerClock
from hvdqn.comm import kill_descendants
from hvdqn.comm.mpi import MpiComm
from hvdqn.config import ParallelConfig
from hvdqn.learner import Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.sync.messages import GRADIENT, REPORT, WAITING, Message, Push, Reply, describe, expected_traffic
from hvdqn.sync.server import rejoin
from hvdqn.sync.statistics import REPORTED, STATISTICS, Outcome
from hvdqn.sync.strategy import Strategy, check_skipped

log = logging.getLogger(__name__)


class Worker(Strategy):
    """Runs on every rank but rank 0: pushes gradients to rank 0, the server, and pulls weights from it.

    Args:
        learner: computes gradients; pulled weights overwrite its own.
        comm: the collectives over all ranks.
        timer: counts the seconds that this rank waits for rank 0.
        config: the settings of the strategy; this class reads `pull_every`.
        clock: this rank's clock; the server's replies set the env steps and updates of the job.
        max_skipped_updates: number of updates of one worker skipped in a row that ends the run.
    """

    def __init__(
        self,
        learner: Learner,
        comm: MpiComm,
        timer: PhaseTimer,
        config: ParallelConfig,
        clock: WorkerClock,
        max_skipped_updates: int,
    ) -> None:
        super().__init__(learner, timer)
        self.comm, self.config, self.clock = comm, config, clock
        self.max_skipped_updates = max_skipped_updates
        self.rank, self.size = comm.rank, comm.size  # at the start: `comm` renumbers when ranks leave
        self.channel = comm.duplicate()
        self.living = list(range(comm.size))
        self.push, self.reply = Message.push(learner), Message.reply(learner, comm.size)
        self.requests: Sequence[Any] = ()  # of MPI, for the last push and its reply
        self.outcome = Outcome()
        self.synchronized = False
        self.pulling = False
        self.version = self.target_version = self.updates_since_pull = 0
        self.progress = 0.0

    @property
    def description(self) -> str:
        """One line for the log: how often workers push gradients and pull weights."""
        return describe(self.size - 1, self.config.pull_every)

    def launch(
        self, reported: Sequence[float], learned: Tensor | None, largest_weight: float, progress: float
    ) -> None:
        """Start to send the gradient to rank 0, and ask for fresh weights every `pull_every` updates."""
        assert learned is not None, "a worker pushes only gradients of its own"
        self._receive()
        self.updates_since_pull += 1
        self.progress = progress
        self.push.tensors[0].copy_(self.learner.gradient)  # the host waits here if it is on a GPU
        *statistics, finite = learned.tolist()
        pull = self.updates_since_pull >= self.config.pull_every
        self._send(GRADIENT, [*reported, *statistics], pull, largest_weight, math.isfinite(finite))
        self.exchanged_updates += 1

    def wait(self) -> Outcome:
        """Wait for the weights and load them, if `launch` asked for them; return the votes of the last replies."""
        if self.pulling:
            self._receive()
        return self._pop_outcome()

    def exchange_stats(self, reported: Sequence[float]) -> Outcome:
        """Send env steps and statistics to rank 0 without a gradient, and wait for its reply."""
        self._receive()
        self._send(REPORT, reported)
        self._receive()
        return self._pop_outcome()

    def synchronize(self) -> Outcome:
        """Wait until all workers call this, then load rank 0's clock and weights."""
        if self.synchronized:
            return Outcome()
        self._receive()
        self._send(WAITING, (0.0,) * len(REPORTED))
        self._receive()
        self.clock.synchronized = True
        with self.timer.during("comm"):
            self.living = rejoin(
                self.comm, self.learner, self.living, np.flatnonzero(self.reply.numbers).tolist()
            )
        self.synchronized = True
        self.version, self.updates_since_pull = int(Reply(*self.reply.header.tolist()).version), 0
        return self._pop_outcome()

    def update_target(self) -> list[int]:
        """Return no differing ranks, and copy nothing: a worker gets rank 0's target network with its weights."""
        return []

    def expected_traffic(self) -> tuple[float, float]:
        """Return how many messages and bytes one worker and rank 0 exchange per update, both directions together."""
        return expected_traffic(self.learner, self.size, self.config.pull_every)

    def _send(
        self,
        kind: int,
        statistics: Sequence[float],
        pull: bool = False,
        largest_weight: float = 0.0,
        finite: bool = True,
    ) -> None:
        header = Push(
            kind=kind,
            version=self.version,
            target_version=self.target_version,
            pull=pull,
            env_steps=self.clock.pop_unreported(),
            progress=self.progress,
            largest_weight=largest_weight,
            finite=finite,
        )
        self.push.write(header, [*statistics, *[0.0] * (len(STATISTICS) - len(statistics))])
        self.pulling, self.synchronized = pull, False
        sent = self.push.with_tensors(kind == GRADIENT)
        self.requests = (self.channel.Irecv(self.reply.buffer, 0), self.channel.Isend(sent, 0))
        self.sent_messages += 1
        self.sent_bytes += sent.nbytes

    def _receive(self) -> None:
        """Wait for rank 0's reply to the last message, if it is still to come, and load its clock and weights."""
        if not self.requests:
            return
        before = self.timer.start("comm")
        for request in self.requests:
            request.Wait()
        self.requests = ()
        self.timer.start(before)
        reply = Reply(*self.reply.header.tolist())
        if not self.reply.numbers[self.rank]:
            self._leave()
        self.clock.set_job(int(reply.env_steps), int(reply.updates), int(reply.last_tick))
        self.outcome.stop = self.outcome.stop or reply.stop > 0
        check_skipped(int(reply.skipped_in_a_row), [int(reply.skipped_by)], self.max_skipped_updates)
        tensors = iter(self.reply.tensors)
        if reply.holds_weights:
            self.learner.parameters.copy_(next(tensors))
            self.version, self.updates_since_pull = int(reply.version), 0
        if reply.holds_target:
            self.learner.update_target(next(tensors))
            self.target_version = int(reply.target_version)
        for layer in self.learner.spectral if reply.holds_weights else ():
            layer.power_iteration()
        self.sent_messages += 1
        self.sent_bytes += self.reply.with_tensors(int(reply.holds_weights + reply.holds_target)).nbytes

    def _pop_outcome(self) -> Outcome:
        outcome, self.outcome = self.outcome, Outcome()
        return outcome

    def _leave(self) -> NoReturn:
        """End this process without saying goodbye: the other ranks have dropped it and continue without it."""
        log.error("rank %d was silent for too long and was dropped; it ends", self.rank)
        kill_descendants()
        os._exit(1)
