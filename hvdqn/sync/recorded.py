"""Average gradients at every update with CUDA graphs: one computes the gradient, a second one takes the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvdqn.comm import Comm
from hvdqn.graphs import Record, Recorded
from hvdqn.learner import Learner, learning_rate
from hvdqn.metrics import PhaseTimer
from hvdqn.sync.gradients import FINITE, LARGEST_WEIGHT, Gradients
from hvdqn.sync.statistics import Outcome


class RecordedGradients(Gradients):
    """Averages gradients as `Gradients` does, but takes the step by a CUDA graph.

    The GPU decides whether to take or to skip the step, and the host reads the decision afterwards.

    Args:
        learner: computes gradients; its `differentiate` must be recorded too.
        comm: the collectives over all ranks.
        timer: counts the seconds that this rank waits for the others.
        max_skipped_updates: number of updates skipped in a row that ends the run.
        record: records a function as a CUDA graph.
    """

    def __init__(
        self, learner: Learner, comm: Comm, timer: PhaseTimer, max_skipped_updates: int, record: Record
    ) -> None:
        super().__init__(learner, comm, timer, max_skipped_updates)
        self.step = Recorded(self._step, record, learner.device, self._changed)

    def wait(self) -> Outcome:
        """Wait for the average and take the step; skip it on all ranks alike if it is not finite."""
        self._wait_for_sum()
        learner = self.learner
        lr = learning_rate(learner.config, learner.batch_factor, self.progress)
        (norm,) = self.step(torch.full((), lr, device=learner.device))
        received = self.trailer.unpack()  # the host waits for the device here
        applied = math.isfinite(float(norm)) and all(map(math.isfinite, received.slots[FINITE]))
        if applied:
            learner.log_step(lr, float(norm))
        return self._outcome(received, applied)

    def _changed(self) -> list[Tensor]:
        learner = self.learner
        return [learner.gradient, *learner.state().values(), *learner.buffers.values()]

    def _step(self, lr: Tensor) -> tuple[Tensor]:
        absent, slots = self.trailer.on_device()
        largest = slots[LARGEST_WEIGHT].max().double()
        scale = self.comm.size / (self.comm.size - absent.double())
        finite = torch.isfinite(slots[FINITE]).all()
        return (self.learner.apply_gradient_on_device(lr, largest, scale, finite),)
