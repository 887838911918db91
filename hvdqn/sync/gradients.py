"""Data-parallel DQN: average gradients at every update, then one identical step everywhere.

Synchronous gradient averaging as in Stooke and Abbeel 2018, "Accelerated Methods for Deep Reinforcement
Learning", section 4.2: N ranks with a batch of B each are one learner with a batch of N x B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdqn.comm import Comm, Handle

if TYPE_CHECKING:
    from hvdqn.learner import Learner


class Gradients:
    """One named allreduce per update carries the flat gradient and its trailer."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm
        self.handle: Handle | None = None

    def begin(self, learner: Learner) -> None:
        """Send this rank's gradient on its way."""
        self.handle = self.comm.allreduce_mean_async(learner.message, name="gradient")

    def finish(self, learner: Learner) -> None:
        """Wait for the average, clip it, step."""
        assert self.handle is not None, "finish without begin"
        learner.timer.start("comm")
        self.handle.wait()
        self.handle = None
        learner.timer.start("optimizer")
        learner.step()
