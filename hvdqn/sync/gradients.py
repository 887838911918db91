"""Data-parallel DQN: average gradients at every update, then take one identical step everywhere.

Synchronous gradient averaging as in Stooke and Abbeel 2018, "Accelerated Methods for Deep Reinforcement
Learning", section 4.2: N ranks with a batch of B each are one learner with a batch of N x B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from hvdqn.comm import Comm, Handle
from hvdqn.learner import Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.sync.statistics import LOSS, REPORTED, STOP, Outcome, Received, Trailer
from hvdqn.sync.strategy import Strategy, broadcast_target, check_skipped, compare_learners

LARGEST_WEIGHT, FINITE = 0, -1
"""The numbers that every rank puts into the trailer for itself: its minibatch's largest importance weight, and as the
last number one that is finite if its loss and gradient are."""


class Gradients(Strategy):
    """Averages the gradient over all ranks at every update, with one allreduce.

    Its message is the flat gradient, followed by the trailer: a few numbers with statistics and votes to stop.

    Each rank multiplies its gradient by 1 / ranks, so that the sum over ranks is the average. The gradient is computed
    with importance weights that are not normalized, and divided by the largest weight of the whole job afterwards
    (Schaul et al. 2016, section 3.4). If each rank divided by its own largest, its samples would count differently.

    Args:
        learner: computes and applies gradients.
        comm: the collectives over all ranks.
        timer: counts the seconds that this rank waits for the others.
        max_skipped_updates: number of updates skipped in a row that ends the run.
    """

    description = "gradients averaged at every update"
    slots = 2

    def __init__(self, learner: Learner, comm: Comm, timer: PhaseTimer, max_skipped_updates: int) -> None:
        super().__init__(learner, timer)
        self.comm, self.max_skipped_updates = comm, max_skipped_updates
        normalize = learner.online.normalize
        length = Trailer.length(comm.size, self.slots, normalize)
        self.message = learner.allocate_gradient(trailing=length, scale=1.0 / comm.size)
        self.trailer = Trailer(self.message[-length:], comm.rank, comm.size, self.slots, normalize)
        self.handle: Handle | None = None
        self.progress = 0.0

    def launch(
        self, reported: Sequence[float], learned: Tensor | None, largest_weight: float, progress: float
    ) -> None:
        """Launch the allreduce of the gradient and of the statistics behind it; arguments as in `Strategy.launch`."""
        self.progress = progress
        if learned is None:
            self.learner.gradient.zero_()
            self.trailer.pack(reported, absent=True)
        else:
            self.trailer.pack(reported, (largest_weight,), learned)
        self.exchanged_updates += 1
        self.sent_messages += 1
        self.sent_bytes += self.message.nbytes
        if self.comm.size > 1:
            self.handle = self.comm.allreduce_sum_async(self.message, name="gradient")

    def wait(self) -> Outcome:
        """Wait for the average and take the step; skip it on all ranks alike if it is not finite."""
        self._wait_for_sum()
        received = self.trailer.unpack()
        assert received.present > 0, "an update is due, but no rank has anything to learn from"
        applied = all(map(math.isfinite, received.slots[FINITE])) and self.learner.apply_gradient(
            self.progress, max(received.slots[LARGEST_WEIGHT]), self.comm.size / received.present
        )
        return self._outcome(received, applied)

    def exchange_stats(self, reported: Sequence[float]) -> Outcome:
        """Sum statistics and votes over all ranks without a gradient; used while no update is due."""
        self.trailer.pack(reported)
        self.sent_messages += 1
        self.sent_bytes += self.trailer.tensor.nbytes
        with self.timer.during("comm"):
            self.comm.allreduce_sum_async(self.trailer.tensor, name="trailer").wait()
        statistics = self.trailer.unpack().statistics
        return Outcome(statistics, stop=bool(statistics[STOP] > 0))

    def update_target(self) -> list[int]:
        """Copy rank 0's weights to all target networks; return the ranks whose own weights differ."""
        return broadcast_target(self.learner, self.comm, self.timer)

    def differing_ranks(self) -> list[int]:
        """Return the ranks whose networks or optimizer moments differ from those of most ranks."""
        return compare_learners(self.learner, self.comm, self.timer)

    def expected_traffic(self) -> tuple[float, float]:
        """Return how many messages and bytes one rank should send per update."""
        return 1.0, float(self.message.nbytes)

    def _wait_for_sum(self) -> None:
        """Wait until the message holds the sum over all ranks."""
        self.timer.start("comm")
        if self.handle is not None:
            self.handle.wait()
            self.handle = None
        self.timer.start("optimizer")

    def _outcome(self, received: Received, applied: bool) -> Outcome:
        """Return the averaged statistics of this update; end the run if too many in a row were skipped.

        Args:
            received: what the ranks' trailers summed to.
            applied: whether the optimizer step was taken.

        Raises:
            NonFiniteError: `max_skipped_updates` in a row had a gradient that is not finite.
        """
        statistics = received.statistics
        # The sum of losses is divided here by the number of ranks and by the largest importance weight, as the
        # gradient was.
        statistics[len(REPORTED) :] /= received.present
        statistics[LOSS] /= max(received.slots[LARGEST_WEIGHT])
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if not applied:
            statistics[len(REPORTED) :] = 0.0  # may be NaN; metrics average over steps taken
            check_skipped(self.skipped_in_a_row, not_finite(received.slots), self.max_skipped_updates)
        return Outcome(statistics, int(applied), int(not applied), bool(statistics[STOP] > 0))


def not_finite(slots: Sequence[Sequence[float]]) -> list[int]:
    """Return the ranks whose number is not finite in the first of the slots after `LARGEST_WEIGHT` that has such."""
    for numbers in slots[LARGEST_WEIGHT + 1 :]:
        if ranks := [rank for rank, value in enumerate(numbers) if not math.isfinite(value)]:
            return ranks
    return []
