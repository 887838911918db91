"""Periodic averaging: ranks take their own steps, and average weights and moments every K updates.

Distributed DQN with independent agents that share weights now and then: local SGD (Stich 2019, "Local SGD Converges
Fast and Communicates Little", algorithm 1). The averaged change may be taken as the gradient of an outer optimizer
(DiLoCo, Douillard et al. 2023, algorithm 1).

With K = 1 and SGD this is `gradients`, but for clipping, which acts on each rank's own gradient here. Otherwise ranks
drift apart between averages, the further the larger K, the learning rate and the difference between their replays are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hvdqn.comm import Comm, Handle
from hvdqn.sync.base import Sync
from hvdqn.trailer import LEARNED, REPORTED

if TYPE_CHECKING:
    from hvdqn.learner import Learner

# A signal must be answered within half a minute: where averages are rarer, votes and reports travel alone in between.
UPDATES_BETWEEN_VOTES = 16
TOLD = len(REPORTED) + len(LEARNED)


class Nesterov:
    """The outer step of DiLoCo: descend along the averaged change as if it were a gradient.

    With g = theta - mean: v = momentum v + g; theta = theta - lr (g + momentum v). Rate 1 without momentum is the mean.

    Args:
        parameters: where the first step begins.
        lr: of the outer step.
        momentum: of the outer step, as in `torch.optim.SGD(nesterov=True)`.
    """

    def __init__(self, parameters: Tensor, lr: float, momentum: float) -> None:
        self.lr, self.momentum = lr, momentum
        self.anchor = parameters.clone()
        self.velocity = torch.zeros_like(parameters)

    def step(self, mean: Tensor) -> Tensor:
        """Where to go from the last anchor, now that the ranks' mean is `mean` [parameters]; the next anchor."""
        change = self.anchor - mean
        self.velocity.mul_(self.momentum).add_(change)
        self.anchor.sub_(change.add_(self.velocity, alpha=self.momentum), alpha=self.lr)
        return self.anchor

    def state(self) -> dict[str, Tensor]:
        """The tensors that it carries from step to step: not copies."""
        return {"anchor": self.anchor, "velocity": self.velocity}


class Parameters(Sync):
    """One named allreduce every `every` updates carries weights, moments, a target that follows, and a trailer.

    Args:
        comm: the ranks.
        every: updates between averages.
        outer_lr: of the outer step.
        outer_momentum: of the outer step; with 0 and an `outer_lr` of 1 the average is taken as it is.
    """

    def __init__(self, comm: Comm, every: int, outer_lr: float = 1.0, outer_momentum: float = 0.0) -> None:
        super().__init__(comm.size)
        self.comm, self.every = comm, every
        self.outer_lr, self.outer_momentum = outer_lr, outer_momentum
        self.outer: Nesterov | None = None
        self.handle: Handle | None = None
        self.alone = 0  # updates since the last average
        self.unsaid = 0  # of these, since the last trailer
        # Since the last trailer, of this rank.
        self.told = np.zeros(TOLD)
        self.largest_of_mine = 0.0
        self.skipped = 0
        self.skipped_in_a_row = 0

    @property
    def description(self) -> str:
        """How ranks agree, for people."""
        outer = f", outer lr {self.outer_lr:g}, momentum {self.outer_momentum:g}" if self.outer else ""
        return f"weights and moments averaged every {self.every} updates{outer}"

    @property
    def agreed(self) -> bool:
        """Whether all ranks hold the same weights now."""
        return self.alone == 0

    def attach(self, learner: Learner) -> None:
        """Take hold of what is averaged."""
        self.averaged = [learner.parameters, *learner.optimizer.moments().values()]
        if learner.target_tau < 1.0:
            self.averaged.append(learner.target_parameters)
        sizes = [*(tensor.numel() for tensor in self.averaged), TOLD + 3 * self.comm.size]
        self.message = torch.zeros(sum(sizes), dtype=learner.parameters.dtype, device=learner.device)
        *self.parts, self.trailer = torch.split(self.message, sizes)
        # All ranks divide by the same importance weight, or samples of one would count for more than another's. The
        # largest of this moment is not known without asking: that of the updates before the last trailer stands in.
        self.largest_weight = torch.zeros(1, dtype=torch.float64)
        if self.outer_lr != 1.0 or self.outer_momentum != 0.0:
            self.outer = Nesterov(learner.parameters, self.outer_lr, self.outer_momentum)

    def begin(self, learner: Learner) -> None:
        """Take this rank's own step; if it is time, send its weights on their way."""
        self._step_alone(learner)
        self.traffic.updates += 1
        self.alone += 1
        self.unsaid += 1
        if self.alone >= self.every:
            self._launch_average()
        elif self.unsaid >= UPDATES_BETWEEN_VOTES:
            self._launch_trailer()

    def finish(self, learner: Learner) -> None:
        """Wait for what travels, if anything does."""
        if self.handle is not None:
            learner.timer.start("compute")
            self._await(learner, average=self.alone >= self.every)

    def agree(self, learner: Learner) -> None:
        """Average now what was not averaged since."""
        if not self.agreed:
            self._launch_average()
            self._await(learner, average=True)

    def exchange(self, learner: Learner) -> None:
        """Send reports and votes alone."""
        self.told[: len(REPORTED)] += learner.trailer.reported()
        self._launch_trailer()
        self._await(learner, average=False)

    def sync_target(self, learner: Learner) -> list[int] | None:
        """Take the averaged weights for the target's; None between averages: the next one is soon enough."""
        return learner.broadcast_target() if self.agreed else None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides the learner's tensors."""
        return {"largest_weight": self.largest_weight, **(self.outer.state() if self.outer else {})}

    def expected_traffic(self, learner: Learner) -> tuple[float, float]:
        """Messages and bytes that one rank gives to the network in an update."""
        trailers = (self.every - 1) // UPDATES_BETWEEN_VOTES
        numbers = self.message.numel() + trailers * self.trailer.numel()
        return (1 + trailers) / self.every, numbers * self.message.element_size() / self.every

    def _step_alone(self, learner: Learner) -> None:
        trailer = learner.trailer
        trailer.read()  # on a GPU, the CPU waits here
        self.largest_of_mine = max(self.largest_of_mine, trailer.largest_weight)
        largest = float(self.largest_weight) or trailer.largest_weight
        norm = float(torch.linalg.vector_norm(learner.gradient)) / largest
        self.told[: len(REPORTED)] += trailer.reported()
        if trailer.spoilt or not math.isfinite(norm):
            self.skipped += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        trailer.learned[0] /= largest  # the loss
        self.told[len(REPORTED) :] += trailer.learned
        learner.descend(norm, largest)

    def _launch_average(self) -> None:
        for part, tensor in zip(self.parts, self.averaged, strict=True):
            part.copy_(tensor.reshape(-1))
        self._write_trailer()
        self.handle = self.comm.allreduce_sum_async(self.message, name="parameters")
        self.traffic.count(self.message.nbytes)

    def _launch_trailer(self) -> None:
        self._write_trailer()
        self.handle = self.comm.allreduce_sum_async(self.trailer, name="trailer")
        self.traffic.count(self.trailer.nbytes)

    def _write_trailer(self) -> None:
        """What this rank tells since it last did; each rank has slots of its own at the end."""
        slots = np.zeros((3, self.comm.size))
        slots[:, self.comm.rank] = self.largest_of_mine, self.skipped, self.skipped_in_a_row
        self.trailer.copy_(torch.from_numpy(np.concatenate((self.told, slots.reshape(-1)))))
        self.told[:] = 0.0
        self.largest_of_mine, self.skipped = 0.0, 0

    def _await(self, learner: Learner, average: bool) -> None:
        assert self.handle is not None, "nothing was launched"
        with learner.timer.during("comm"):
            self.handle.wait()
        self.handle = None
        if average:
            self._install(learner)
        self._hear(learner)

    def _install(self, learner: Learner) -> None:
        """Take the average for this rank's own."""
        torch._foreach_mul_(self.parts, 1.0 / self.comm.size)
        if self.outer is not None:
            self.parts[0].copy_(self.outer.step(self.parts[0]))
        for part, tensor in zip(self.parts, self.averaged, strict=True):
            tensor.copy_(part.view(tensor.shape))
        self.alone = 0

    def _hear(self, learner: Learner) -> None:
        """Read the trailer that has come."""
        size = self.comm.size
        heard = self.trailer.double().cpu().numpy()
        largest_weights, skipped, in_a_row = heard[TOLD:].reshape(3, size)
        taken = size * self.unsaid - round(skipped.sum())
        learner.hear(heard[: len(REPORTED)], heard[len(REPORTED) : TOLD], taken)
        self.unsaid = 0
        if largest_weights.max() > 0:
            self.largest_weight.fill_(float(largest_weights.max()))
        learner.skipped_updates += round(skipped.sum())
        longest = round(in_a_row.max())
        learner.give_up_after(longest, np.flatnonzero(in_a_row.round() == longest).tolist())
