"""Data-parallel DQN: average gradients at every update, then one identical step everywhere.

Synchronous gradient averaging as in Stooke and Abbeel 2018, "Accelerated Methods for Deep Reinforcement
Learning", section 4.2: N ranks with a batch of B each are one learner with a batch of N x B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdqn.comm import Comm, Handle
from hvdqn.sync.base import Sync

if TYPE_CHECKING:
    from hvdqn.learner import Learner


class Gradients(Sync):
    """One named allreduce per update carries the flat gradient and its trailer."""

    description = "gradients averaged at every update"

    def __init__(self, comm: Comm) -> None:
        super().__init__(comm.size)
        self.gradient_share = 1.0 / comm.size
        self.comm = comm
        self.handle: Handle | None = None

    def begin(self, learner: Learner) -> None:
        """Send this rank's gradient on its way."""
        self.handle = self.comm.allreduce_sum_async(learner.message, name="gradient")
        self.traffic.updates += 1
        self.traffic.count(learner.message.nbytes)

    def finish(self, learner: Learner) -> None:
        """Wait for the average, clip it, step."""
        assert self.handle is not None, "finish without begin"
        learner.timer.start("comm")
        self.handle.wait()
        self.handle = None
        learner.timer.start("optimizer")
        learner.step()

    def exchange(self, learner: Learner) -> None:
        """Send the trailer alone."""
        self.traffic.count(learner.trailer.tensor.nbytes)
        with learner.timer.during("comm"):
            self.comm.allreduce_sum_async(learner.trailer.tensor, name="trailer").wait()
        learner.trailer.read()
        learner.hear(learner.trailer.reported(), learner.trailer.learned, 0)

    def sync_target(self, learner: Learner) -> list[int]:
        """Take rank 0's weights for the target's; the ranks whose weights differ from the others'."""
        return learner.broadcast_target()

    def expected_traffic(self, learner: Learner) -> tuple[float, float]:
        """Messages and bytes that one rank gives to the network in an update."""
        return 1.0, float(learner.message.numel() * learner.message.element_size())
