"""Average parameters periodically: ranks take steps of their own, and average weights and moments every K updates.

This is local SGD (Stich 2019, "Local SGD Converges Fast and Communicates Little", algorithm 1) for DQN. The averaged
change of the weights can also serve as the gradient of a second, outer optimizer (DiLoCo, Douillard et al. 2023,
algorithm 1).

With K = 1 and SGD this equals `--sync gradients`, except that each rank clips its own gradient. Otherwise the ranks'
weights drift apart between averages. They drift further the larger K, the learning rate and the difference between the
ranks' replays are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hvdqn.comm import Comm, Handle
from hvdqn.config import ParallelConfig
from hvdqn.learner import Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.sync.statistics import REPORTED, STATISTICS, STOP, Outcome, Trailer
from hvdqn.sync.strategy import Strategy, broadcast_target, check_skipped

# Every so many updates at least, ranks exchange statistics and votes, without weights if no average is due: a run must
# stop within half a minute of a signal.
UPDATES_BETWEEN_VOTES = 16
SLOTS = (
    3  # numbers for each rank in the trailer: largest importance weight, skipped updates, and those in a row
)


class Nesterov:
    """The outer optimizer of DiLoCo: SGD with Nesterov momentum on the change between two averages.

    The anchor is the weights with which all ranks began after the last outer step. With g = anchor - mean:

        v = momentum v + g,   anchor = anchor - lr (g + momentum v)

    With lr 1 and momentum 0 the new anchor is the mean itself.

    Args:
        parameters: the weights at the start, which become the first anchor `[parameters]`.
        lr: learning rate of the outer step.
        momentum: momentum of the outer step, as in `torch.optim.SGD(nesterov=True)`.
    """

    def __init__(self, parameters: Tensor, lr: float, momentum: float) -> None:
        self.lr, self.momentum = lr, momentum
        self.anchor = parameters.clone()
        self.velocity = torch.zeros_like(parameters)

    def step(self, mean: Tensor) -> Tensor:
        """Take an outer step from the anchor toward `mean`, the ranks' average parameters; return the new anchor.

        Both are `[parameters]`.
        """
        change = self.anchor - mean
        self.velocity.mul_(self.momentum).add_(change)
        self.anchor.sub_(change.add_(self.velocity, alpha=self.momentum), alpha=self.lr)
        return self.anchor

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the next step depends on, for a checkpoint: the object's own, not copies."""
        return {"anchor": self.anchor, "velocity": self.velocity}


class Parameters(Strategy):
    """Averages weights and optimizer moments over all ranks every `sync_every` updates, with one allreduce.

    Its message ends with the trailer: a few numbers with statistics and votes to stop. A target network that follows
    the online network (`target_tau` below 1) is averaged too, and so is u of layers with spectral normalization: after
    the power iteration that follows, their u and v are equal on all ranks.

    Args:
        learner: holds the parameters and moments to average.
        comm: the collectives over all ranks.
        timer: counts the seconds that this rank waits for the others.
        config: the settings `sync_every`, `outer_lr` and `outer_momentum`.
        max_skipped_updates: number of updates skipped in a row by one rank that ends the run.
    """

    def __init__(
        self,
        learner: Learner,
        comm: Comm,
        timer: PhaseTimer,
        config: ParallelConfig,
        max_skipped_updates: int,
    ) -> None:
        super().__init__(learner, timer)
        self.comm, self.every, self.max_skipped_updates = comm, config.sync_every, max_skipped_updates
        self.averaged = [learner.parameters, *learner.optimizer.moments().values()]
        if learner.target_tau < 1.0:
            self.averaged.append(learner.target_parameters)
        self.averaged += [layer.u for layer in learner.spectral]
        normalize = learner.online.normalize
        sizes = [*(tensor.numel() for tensor in self.averaged), Trailer.length(comm.size, SLOTS, normalize)]
        self.message = torch.zeros(sum(sizes), dtype=learner.dtype, device=learner.device)
        *self.parts, trailer = torch.split(self.message, sizes)
        self.trailer = Trailer(trailer, comm.rank, comm.size, SLOTS, normalize)
        # All ranks must divide by the same largest importance weight, or samples of one rank would count more than
        # another's. Ranks learn each other's largest only with a trailer, so they divide by that of the last trailer.
        self.largest_weight = torch.zeros(1, dtype=torch.float64)
        self.outer: Nesterov | None = None
        if config.outer_lr != 1.0 or config.outer_momentum != 0.0:
            self.outer = Nesterov(learner.parameters, config.outer_lr, config.outer_momentum)
        self.handle: Handle | None = None
        self.updates_since_average = 0
        self.updates_since_trailer = 0
        # What this rank will report in its next trailer.
        self.statistics = np.zeros(len(STATISTICS))
        self.own_largest_weight = 0.0
        self.own_skipped = 0
        self.own_skipped_in_a_row = 0

    @property
    def description(self) -> str:
        """One line for the log: what the ranks average and how often."""
        outer = f", outer lr {self.outer.lr:g}, momentum {self.outer.momentum:g}" if self.outer else ""
        return f"weights and moments averaged every {self.every} updates{outer}"

    def launch(
        self, reported: Sequence[float], learned: Tensor | None, largest_weight: float, progress: float
    ) -> None:
        """Take this rank's own optimizer step; launch an allreduce of weights, or of statistics alone, if due."""
        assert learned is not None, "every rank takes its own steps"
        self._step(reported, learned, largest_weight, progress)
        self.exchanged_updates += 1
        self.updates_since_average += 1
        self.updates_since_trailer += 1
        if self.updates_since_average >= self.every:
            self._launch_average()
        elif self.updates_since_trailer >= UPDATES_BETWEEN_VOTES:
            self._launch_trailer()

    def wait(self) -> Outcome:
        """Wait for the allreduce that `launch` launched, if any, and load the averages that it brought."""
        if self.handle is None:
            return Outcome()
        self.timer.start("compute")
        return self._finish(average=self.updates_since_average >= self.every)

    def exchange_stats(self, reported: Sequence[float]) -> Outcome:
        """Sum statistics and votes over all ranks without averaging weights; used while no update is due."""
        self.statistics[: len(REPORTED)] += reported
        self._launch_trailer()
        return self._finish(average=False)

    def synchronize(self) -> Outcome:
        """Average the weights now, unless no rank has taken a step since the last average."""
        if self.updates_since_average == 0:
            return Outcome()
        self._launch_average()
        return self._finish(average=True)

    def update_target(self) -> list[int] | None:
        """Copy the averaged weights to all target networks; return the ranks whose own weights differ.

        Returns None, and copies nothing, between two averages; call it again after the next one.
        """
        if self.updates_since_average:
            return None
        return broadcast_target(self.learner, self.comm, self.timer)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps besides the learner's: the object's own, not copies."""
        return {"largest_weight": self.largest_weight, **(self.outer.state() if self.outer else {})}

    def expected_traffic(self) -> tuple[float, float]:
        """Return how many messages and bytes one rank should send per update."""
        trailers = (self.every - 1) // UPDATES_BETWEEN_VOTES
        sent_bytes = self.message.nbytes + trailers * self.trailer.tensor.nbytes
        return (1 + trailers) / self.every, sent_bytes / self.every

    def _step(
        self, reported: Sequence[float], learned: Tensor, largest_weight: float, progress: float
    ) -> None:
        self.own_largest_weight = max(self.own_largest_weight, largest_weight)
        largest = float(self.largest_weight) or largest_weight
        loss, td_error, q_mean, finite = learned.tolist()  # on a GPU the host waits here
        self.statistics[: len(REPORTED)] += reported
        if math.isfinite(finite) and self.learner.apply_gradient(progress, largest):
            self.own_skipped_in_a_row = 0
            self.statistics[len(REPORTED) :] += loss / largest, td_error, q_mean
        else:
            self.own_skipped += 1
            self.own_skipped_in_a_row += 1

    def _launch_average(self) -> None:
        for part, tensor in zip(self.parts, self.averaged, strict=True):
            part.copy_(tensor.reshape(-1))
        self._pack_trailer()
        self.handle = self.comm.allreduce_sum_async(self.message, name="parameters")
        self.sent_messages += 1
        self.sent_bytes += self.message.nbytes

    def _launch_trailer(self) -> None:
        self._pack_trailer()
        self.handle = self.comm.allreduce_sum_async(self.trailer.tensor, name="trailer")
        self.sent_messages += 1
        self.sent_bytes += self.trailer.tensor.nbytes

    def _pack_trailer(self) -> None:
        slots = (self.own_largest_weight, self.own_skipped, self.own_skipped_in_a_row)
        self.trailer.pack(self.statistics.tolist(), slots)
        self.statistics[:] = 0.0
        self.own_largest_weight, self.own_skipped = 0.0, 0

    def _finish(self, average: bool) -> Outcome:
        """Wait for the allreduce in progress, load its averages if it has any, and return the statistics in it."""
        assert self.handle is not None, "nothing was launched"
        with self.timer.during("comm"):
            self.handle.wait()
        self.handle = None
        if average:
            self._load_average()
        return self._outcome()

    def _load_average(self) -> None:
        torch._foreach_mul_(self.parts, 1.0 / self.comm.size)
        if self.outer is not None:
            self.parts[0].copy_(self.outer.step(self.parts[0]))
        for part, tensor in zip(self.parts, self.averaged, strict=True):
            tensor.copy_(part.view(tensor.shape))
        for layer in self.learner.spectral:
            layer.power_iteration()
        self.updates_since_average = 0

    def _outcome(self) -> Outcome:
        received = self.trailer.unpack()
        largest_weights, skipped, in_a_row = np.array(received.slots)
        if largest_weights.max() > 0:
            self.largest_weight.fill_(float(largest_weights.max()))
        all_skipped, longest = round(skipped.sum()), round(in_a_row.max())
        ranks = np.flatnonzero(in_a_row.round() == longest).tolist()
        check_skipped(longest, ranks, self.max_skipped_updates)
        taken = self.comm.size * self.updates_since_trailer - all_skipped
        self.updates_since_trailer = 0
        if taken == 0:
            received.statistics[len(REPORTED) :] = 0.0
        return Outcome(received.statistics, taken, all_skipped, bool(received.statistics[STOP] > 0))
