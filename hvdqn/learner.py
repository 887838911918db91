"""Flat parameters and gradients, the update in two halves, and the target network."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hvdqn.comm import Comm
from hvdqn.config import LearningConfig
from hvdqn.networks import QNetwork
from hvdqn.replay import Batch
from hvdqn.sync import Sync

if TYPE_CHECKING:
    from hvdqn.metrics import PhaseTimer

# What each rank adds to the trailer. Sums over ranks: votes and episodes since the last exchange...
REPORTED = ("stop", "episodes", "return_sum", "length_sum")
# ...and means over ranks: what the update saw.
LEARNED = ("loss", "td_error", "q_mean")


def flatten_parameters(network: nn.Module, device: torch.device) -> Tensor:
    """Move all parameters of a network into one contiguous tensor, of which they become views.

    Averaging, clipping, stepping, copying and hashing then each act on one tensor.
    """
    parameters = list(network.parameters())
    flat = torch.cat([p.detach().reshape(-1).to(device) for p in parameters])
    for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
        parameter.data = view
    return flat


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    ends = np.cumsum([tensor.numel() for tensor in like])
    return [
        flat[end - tensor.numel() : end].view(tensor.shape) for end, tensor in zip(ends, like, strict=True)
    ]


def learning_rate(config: LearningConfig, global_batch: int, batch_per_rank: int, done: float) -> float:
    """The learning rate after a share `done` of the run.

    lr x k, lr x min(sqrt(k), 3) or lr, with k = global batch / reference batch; a scaled one is approached
    linearly from `lr` over the first `lr_warmup` of the run (Goyal et al. 2017, section 2.2). On top of that the
    rate falls linearly to its share `lr_final` at the end.
    """
    k = global_batch / (config.lr_reference_batch or batch_per_rank)
    factor = {"none": 1.0, "sqrt": min(math.sqrt(k), 3.0), "linear": k}[config.lr_scaling]
    warm = min(done / config.lr_warmup, 1.0) if config.lr_warmup > 0 else 1.0
    decayed = 1.0 + (config.lr_final - 1.0) * done
    return config.lr * (1.0 + (factor - 1.0) * warm) * decayed


def make_optimizer(config: LearningConfig, flat: nn.Parameter) -> torch.optim.Optimizer:
    """Adam, or RMSProp centred as in Mnih et al. 2015, over the one flat tensor."""
    if config.optimizer == "adam":
        return torch.optim.Adam([flat], lr=config.lr, eps=config.optimizer_eps, fused=True)
    return torch.optim.RMSprop([flat], lr=config.lr, alpha=0.95, eps=config.optimizer_eps, centered=True)


class NonFiniteError(RuntimeError):
    """The averaged gradient was not finite for too many updates in a row."""


class Learner:
    """Turns minibatches into steps that are the same on every rank.

    Args:
        network: the online network; its parameters become views of one flat tensor.
        config: losses, optimizer and target.
        comm: the ranks.
        sync: how they agree.
        batch_per_rank: transitions of one rank's minibatch.
        timer: told when waiting for others begins and ends.
        device: where the networks live.
        autocast: bf16 forward passes.
    """

    def __init__(
        self,
        network: QNetwork,
        config: LearningConfig,
        comm: Comm,
        sync: Sync,
        batch_per_rank: int,
        timer: PhaseTimer,
        device: torch.device,
        autocast: bool = False,
    ) -> None:
        self.online, self.config, self.comm, self.sync = network, config, comm, sync
        self.batch_per_rank = batch_per_rank
        self.timer, self.device, self.autocast = timer, device, autocast
        self.target = copy.deepcopy(network).requires_grad_(False)
        self.parameters = nn.Parameter(flatten_parameters(network, device))
        self.target_parameters = flatten_parameters(self.target, device)
        # The gradient and its trailer are one tensor, so they travel as one message.
        n, trailer = self.parameters.numel(), len(REPORTED) + len(LEARNED) + comm.size
        self.message = torch.zeros(n + trailer, dtype=self.parameters.dtype, device=device)
        self.gradient, self.trailer = self.message[:n], self.message[n:]
        self.parameters.grad = self.gradient
        for parameter, view in zip(
            network.parameters(), _views(self.message, list(network.parameters())), strict=True
        ):
            parameter.grad = view
        self.optimizer = make_optimizer(config, self.parameters)
        self.totals = torch.zeros(len(REPORTED) + len(LEARNED), dtype=torch.float64)
        self.done = 0.0
        self.updates_summed = 0
        self.skipped_updates = 0
        self.skipped_in_a_row = 0
        self.grad_norm = 0.0
        self.stop_voted = False
        comm.broadcast_(self.parameters.data)
        self.target_parameters.copy_(self.parameters.data)

    def begin_update(self, batch: Batch | None, report: Sequence[float], done: float = 1.0) -> None:
        """Compute this rank's gradient and launch the exchange.

        Args:
            batch: this rank's minibatch; None: it has none yet, and the average is that of the other ranks.
            report: this rank's `REPORTED`, as in its order.
            done: share of the run that lies behind, for the warm-up of the learning rate.
        """
        self.done = done
        if batch is None:
            self._abstain(report)
            return
        loss, td_error, q_mean = self.backward(batch)
        trailer = self.trailer
        trailer.zero_()
        trailer[: len(REPORTED)] = torch.as_tensor(report)
        for slot, value in enumerate((loss, td_error, q_mean), start=len(REPORTED)):
            trailer[slot] = value
        # Each rank has a slot of its own to own up to a gradient that would spoil everyone's. An infinite reward
        # shows in the loss alone: Huber's gradient is clipped.
        finite = torch.isfinite(self.gradient.sum()) & torch.isfinite(loss)
        trailer[len(REPORTED) + len(LEARNED) + self.comm.rank] = ~finite
        self.sync.begin(self)

    def finish_update(self) -> None:
        """Wait for the exchange and take the step.

        Raises:
            NonFiniteError: too many updates in a row had to be skipped.
        """
        self.sync.finish(self)

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Leave the gradient of the batch in `gradient`; return loss, mean absolute TD error and mean q."""
        observation, next_observation = self._tensor(batch.observation), self._tensor(batch.next_observation)
        action, reward = self._tensor(batch.action), self._tensor(batch.reward).to(self.gradient.dtype)
        discount, weight = (self._tensor(x).to(self.gradient.dtype) for x in (batch.discount, batch.weight))
        head = self.online.head
        with torch.no_grad(), self._cast():
            next_output = self.target(next_observation)
            chooser = self.online(next_observation) if self.config.double else next_output
            next_action = head.q_values(chooser).argmax(dim=1)
            goal = head.backup(next_output, next_action, reward, discount)
        with self._cast():
            output = self.online(observation)
        losses, td_errors = head.loss(output, action, goal)
        loss = (weight * losses).mean()
        self.gradient.zero_()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), td_errors.mean(), head.q_values(output.detach()).mean()

    def step(self) -> None:
        """Clip the averaged gradient and step, or skip the update if it is not finite: the same on every rank."""
        spoilt = self.spoilt.cpu()  # on a GPU, the CPU waits here
        if bool((spoilt < 0).any()):
            self._leave_out(int((spoilt < 0).sum()))
        norm = float(torch.linalg.vector_norm(self.gradient))
        finite = math.isfinite(norm) and not bool((spoilt > 0).any())
        self._read_trailer(learned=finite)
        if not finite:
            self._skip()
            return
        self.skipped_in_a_row = 0
        self.grad_norm = norm
        limit = self.config.max_grad_norm
        if limit and norm > limit:
            self.gradient.mul_(limit / norm)
        self.optimizer.param_groups[0]["lr"] = self.lr
        self.optimizer.step()
        if self.config.target_tau < 1.0:
            self.target_parameters.lerp_(self.parameters.data, self.config.target_tau)

    def exchange(self, report: Sequence[float]) -> None:
        """Send only the trailer: reports and votes must not wait for learning to start."""
        trailer = self.trailer
        trailer.zero_()
        trailer[: len(REPORTED)] = torch.as_tensor(report)
        with self.timer.during("comm"):
            self.comm.allreduce_mean_async(trailer, name="trailer").wait()
        self._read_trailer(learned=False)

    def sync_target(self) -> list[int]:
        """Make rank 0's weights everyone's target network; return the ranks whose own weights differ.

        The comparison is bit for bit, NaNs included, and comes at no cost but the broadcast's. Where most ranks
        agree, those that differ from them are returned, rank 0 or not.
        """
        mine = self.parameters.data
        incoming = mine.clone()
        with self.timer.during("comm"):
            self.comm.broadcast_(incoming)
            same = torch.equal(incoming.view(torch.uint8), mine.view(torch.uint8))
            agreed = all(self.comm.all_gather_object(same))
        if self.config.target_tau == 1.0:
            self.target_parameters.copy_(incoming)
        if agreed:
            return []
        digests = self.comm.all_gather_object(self.sha256())
        common = Counter(digests).most_common(1)[0][0]
        return [rank for rank, digest in enumerate(digests) if digest != common]

    @property
    def lr(self) -> float:
        """Learning rate of the last update begun."""
        return learning_rate(
            self.config, self.comm.size * self.batch_per_rank, self.batch_per_rank, self.done
        )

    def drain(self) -> dict[str, float]:
        """Reports summed and learning averaged over all ranks since the last call."""
        values = dict(zip(REPORTED + LEARNED, self.totals.tolist(), strict=True))
        for name in LEARNED:
            values[name] = values[name] / self.updates_summed if self.updates_summed else math.nan
        self.totals.zero_()
        self.updates_summed = 0
        return values

    def sha256(self) -> str:
        """Digest of the online parameters' bytes."""
        return hashlib.sha256(self.parameters.data.cpu().numpy().tobytes()).hexdigest()

    @property
    def spoilt(self) -> Tensor:
        """Above 0 for each rank whose part of the last update was not finite, below 0 where it had none. [size]."""
        return self.trailer[len(REPORTED) + len(LEARNED) :]

    def counters(self) -> dict[str, Any]:
        """What was counted: kept in a checkpoint, so that a resumed run goes on counting."""
        return {
            "totals": self.totals,
            "updates_summed": self.updates_summed,
            "skipped_updates": self.skipped_updates,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Put back what `counters` gave."""
        self.totals.copy_(torch.tensor(counters["totals"]))
        self.updates_summed = counters["updates_summed"]
        self.skipped_updates = counters["skipped_updates"]
        self.skipped_in_a_row = counters["skipped_in_a_row"]

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint keeps: both networks and the optimizer's moments."""
        moments = self.optimizer.state.get(self.parameters, {})
        return {
            "online": self.parameters.data,
            "target": self.target_parameters,
            **{f"optimizer.{name}": value for name, value in moments.items()},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        self.parameters.data.copy_(state["online"])
        self.target_parameters.copy_(state["target"])
        moments = {name[10:]: value for name, value in state.items() if name.startswith("optimizer.")}
        if moments:
            # `step` of Adam lives where its moments live when fused.
            self.optimizer.state[self.parameters] = {k: v.to(self.device) for k, v in moments.items()}

    def _abstain(self, report: Sequence[float]) -> None:
        """Take part in the exchange without a gradient."""
        self.message.zero_()
        self.trailer[: len(REPORTED)] = torch.as_tensor(report)
        self.trailer[len(REPORTED) + len(LEARNED) + self.comm.rank] = -1.0
        self.sync.begin(self)

    def _leave_out(self, absent: int) -> None:
        """Make the mean over all ranks the mean over those that had a minibatch."""
        assert absent < self.comm.size, "an update is due, but no rank has anything to learn from"
        share = self.comm.size / (self.comm.size - absent)
        self.gradient.mul_(share)
        self.trailer[len(REPORTED) :][: len(LEARNED)].mul_(share)

    def _read_trailer(self, learned: bool) -> None:
        reported, seen = self.trailer[: len(REPORTED)], self.trailer[len(REPORTED) :][: len(LEARNED)]
        self.totals[: len(REPORTED)] += reported.double().cpu() * self.comm.size
        if learned:
            self.totals[len(REPORTED) :] += seen.double().cpu()
            self.updates_summed += 1
        self.stop_voted = self.stop_voted or bool(reported[0] > 0)

    def _skip(self) -> None:
        self.skipped_updates += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.config.max_skipped_updates:
            ranks = (
                ", ".join(map(str, np.flatnonzero(self.spoilt.cpu().numpy() > 0)))
                or "none alone: only the average is not finite"
            )
            raise NonFiniteError(
                f"{self.skipped_in_a_row} updates in a row had a gradient that is not finite; it began on rank "
                f"{ranks}. Look for NaN or Inf in that rank's rewards and observations, or lower --lr"
            )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _cast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)
