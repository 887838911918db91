"""Flat parameters and gradients, the update in two halves, and the target network."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvdqn.comm import Comm
from hvdqn.config import LearningConfig
from hvdqn.errors import NonFiniteError
from hvdqn.graphs import Record, Replayed, Tensors
from hvdqn.losses import expect, munchausen_bonus, select, soft_policy
from hvdqn.networks import QNetwork
from hvdqn.optimizers import SGD, Adam, Optimizer, RMSProp
from hvdqn.replay import Batch
from hvdqn.sync import Sync
from hvdqn.trailer import LEARNED, REPORTED, Trailer

if TYPE_CHECKING:
    from hvdqn.metrics import PhaseTimer

T = TypeVar("T")
# What replay is told of a minibatch: its rows, and how wrong each was, both [batch].
Learned: TypeAlias = tuple[NDArray[np.int64], NDArray[np.floating[Any]]]


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


def batch_factor(config: LearningConfig, global_batch: int, batch_per_rank: int) -> float:
    """How much larger the global batch is than that which the numbers were tuned for: k."""
    return global_batch / (config.lr_reference_batch or batch_per_rank)


def learning_rate(config: LearningConfig, global_batch: int, batch_per_rank: int, done: float) -> float:
    """The learning rate after a share `done` of the run.

    lr x k, lr x min(sqrt(k), 3) or lr, with k = global batch / reference batch; a scaled one is approached
    linearly from `lr` over the first `lr_warmup` of the run (Goyal et al. 2017, section 2.2). On top of that the
    rate falls linearly to its share `lr_final` at the end.
    """
    k = batch_factor(config, global_batch, batch_per_rank)
    factor = {"none": 1.0, "sqrt": min(math.sqrt(k), 3.0), "linear": k}[config.lr_scaling]
    warm = min(done / config.lr_warmup, 1.0) if config.lr_warmup > 0 else 1.0
    decayed = 1.0 + (config.lr_final - 1.0) * min(done, 1.0)  # a rank that steps by itself may go beyond
    return config.lr * (1.0 + (factor - 1.0) * warm) * decayed


def make_optimizer(config: LearningConfig, parameters: Tensor, gradient: Tensor, k: float) -> Optimizer:
    """The optimizer of the configuration.

    Adam's epsilon of distributional losses is 0.01 / batch (Bellemare et al. 2017), also of a global batch (Stooke and
    Abbeel 2018): hence its scaling by 1 / k, with k the `batch_factor`.
    """
    eps = config.optimizer_eps / k if config.optimizer_eps_scaling == "inverse" else config.optimizer_eps
    if config.optimizer == "adam":
        return Adam(parameters, gradient, eps)
    if config.optimizer == "rmsprop":
        return RMSProp(parameters, gradient, eps)
    return SGD(parameters, gradient)


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
        record: how forward and backward passes are recorded and replayed; None: they are not.
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
        record: Record | None = None,
    ) -> None:
        self.online, self.config, self.comm, self.sync = network, config, comm, sync
        self.batch_per_rank = batch_per_rank
        self.timer, self.device, self.autocast = timer, device, autocast
        network.to(device)
        self.target = network.target_copy()
        self.parameters = flatten_parameters(network, device)
        self.dtype = self.parameters.dtype
        self.target_parameters = flatten_parameters(self.target, device)
        # The gradient and its trailer are one tensor, so they travel as one message.
        n = self.parameters.numel()
        self.message = torch.zeros(n + Trailer.length(comm.size), dtype=self.dtype, device=device)
        self.gradient, self.trailer = self.message[:n], Trailer(self.message[n:], comm.rank, comm.size)
        for parameter, view in zip(
            network.parameters(), _views(self.message, list(network.parameters())), strict=True
        ):
            parameter.grad = view
        # Autocast casts weights to and fro, which the derivative by hand leaves out.
        by_hand = network.dense is not None and not autocast and device.type == "cpu"
        self.differentiable = network.by_hand if by_hand else network.by_autograd
        # It makes every operation a little shorter, but autograd takes nothing that was made in it.
        self.no_grad: type[torch.inference_mode | torch.no_grad] = (
            torch.inference_mode if by_hand else torch.no_grad
        )
        self.differentiate: Callable[..., tuple[Tensor, ...]] = (
            Replayed(self._differentiate, record, device) if record else self._differentiate
        )
        self.step_recorded = (
            Replayed(self._step_on_device, record, device, lambda: [self.gradient, *self.state().values()])
            if record
            else None
        )
        self.global_batch = sync.ranks_per_update * batch_per_rank
        k = batch_factor(config, self.global_batch, batch_per_rank)
        self.optimizer = make_optimizer(config, self.parameters, self.gradient, k)
        # k times fewer updates must not make the target k times slower in env steps.
        self.target_tau = 1.0 - (1.0 - config.target_tau) ** k
        self.totals = np.zeros(len(REPORTED) + len(LEARNED))
        self.done = 0.0
        self.updates_summed = 0
        self.skipped_updates = 0
        self.skipped_in_a_row = 0
        self.grad_norm = 0.0
        self.stop_voted = False
        comm.broadcast_(self.parameters)
        self.target_parameters.copy_(self.parameters)
        sync.attach(self)

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
        self.rows = batch.row_ids
        self.trailer.write(report, float(batch.weight.max()))
        self.backward(batch)
        self.sync.begin(self)

    def finish_update(self) -> Learned:
        """Wait for the exchange and take the step.

        Returns:
            What replay is told of this rank's minibatch: its rows, and how wrong each was. `[batch]`, `[batch]`.

        Raises:
            NonFiniteError: too many updates in a row had to be skipped.
        """
        with self.no_grad():
            self.sync.finish(self)
        return self.rows, self.td_errors.cpu().numpy()

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Leave the gradient of the batch in `gradient`; return loss, mean absolute TD error and mean q.

        It is multiplied by `Sync.gradient_share`: 1 / ranks where it is to be summed over them. Importance weights
        enter as they are; `step` divides by the largest of all ranks.
        """
        loss, td_error, q_mean, self.td_errors = self.differentiate(*self._tensors(batch))
        return loss, td_error, q_mean

    def _differentiate(
        self,
        observation: Tensor,
        action: Tensor,
        reward: Tensor,
        next_observation: Tensor,
        discount: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, ...]:
        """As `backward`, and the TD errors `[batch]`; tells the trailer. Nothing in it asks what a tensor holds."""
        with self.no_grad():
            head = self.online.head
            goal = self._goal(observation, action, reward, next_observation, discount)
            output, pull_back = self._cast(self.differentiable, observation)
            loss, td_errors, slope = head.slope(output, action, goal, weight)
            # Not the sum over ranks but the slope is divided by their number: it is shorter by far.
            pull_back(slope if self.sync.gradient_share == 1.0 else slope * self.sync.gradient_share)
            learned = loss, td_errors.mean(), head.q_values(output).mean()
            # An infinite reward shows in the loss alone: Huber's gradient is clipped.
            self.trailer.write_learned(*learned, self.gradient.sum() + loss)
            return *learned, td_errors

    def _goal(
        self, observation: Tensor, action: Tensor, reward: Tensor, next_observation: Tensor, discount: Tensor
    ) -> Tensor:
        """What should have been predicted of the actions that were taken, as the head puts it."""
        head, next_output = self.target.head, self._cast(self.target, next_observation)
        if not self.config.munchausen:
            if not self.config.double:
                return head.goal(head.best(next_output), reward, discount)
            q = self._cast(self.online.q_values, next_observation)
            return head.goal(select(next_output, q.argmax(dim=1)), reward, discount)
        # Vieillard et al. 2020, eq. 1. Of n steps the first action's log-policy counts: the others' are not known.
        alpha, temperature = self.config.munchausen_alpha, self.config.munchausen_temperature
        q = self._cast(self.target.q_values, observation)
        bonus = munchausen_bonus(q, action, alpha, temperature, self.config.munchausen_clip)
        policy, entropy = soft_policy(head.q_values(next_output), temperature)
        return head.goal(expect(next_output, policy), reward + bonus + discount * entropy, discount)

    def step(self) -> None:
        """Clip the averaged gradient and step, or skip the update if it is not finite: the same on every rank.

        The gradient arrives as the mean of weight x gradient over the job, and is divided by the largest weight of
        the job (Schaul et al. 2016, section 3.4): a rank that divided by its own would count its samples differently.
        """
        stepped = (
            self.step_recorded(torch.full((), self.lr, device=self.device)) if self.step_recorded else None
        )
        self.trailer.read()  # on a GPU, the CPU waits here
        share, largest = self._share_of_present(), self.trailer.largest_weight
        norm = float(stepped[0]) if stepped else self._norm(share, largest)
        finite = math.isfinite(norm) and not self.trailer.spoilt
        self.trailer.learned *= self.sync.gradient_share * share
        self.trailer.learned[0] /= largest  # the loss
        self.hear(self.trailer.reported(), self.trailer.learned, int(finite))
        if not finite:
            self._skip()
            return
        self.skipped_in_a_row = 0
        if stepped:
            self.grad_norm = norm
        else:
            self.descend(norm, largest)

    def _step_on_device(self, lr: Tensor) -> Tensors:
        """As `step`, but that the device decides: the host learns of it later. Returns the gradient's norm `[]`."""
        absent, weights, probes = self.trailer.on_device()
        with torch.no_grad():
            largest = weights.max().double()
            if self.comm.size > 1:
                self.gradient.mul_(self.comm.size / (self.comm.size - absent.double()))
            norm = torch.linalg.vector_norm(self.gradient).double() / largest
            finite = torch.isfinite(norm) & torch.isfinite(probes).all()
            limit = self.config.max_grad_norm or math.inf
            self._move(torch.where(norm > limit, limit / norm, 1.0) / largest, lr, skip=(~finite).float())
            return (norm,)

    def descend(self, norm: float, largest: float) -> None:
        """Clip `gradient`, of this norm once divided by `largest`, and step; a target that follows does so."""
        self.grad_norm = norm
        limit = self.config.max_grad_norm
        self._move((limit / norm if limit and norm > limit else 1.0) / largest, self.lr)

    def _move(self, factor: float | Tensor, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """Step along `factor` x `gradient`; a target that follows does so. Where `skip` is 1, neither does."""
        if isinstance(factor, Tensor) or factor != 1.0:
            self.gradient.mul_(factor)
        self.optimizer.step(lr, skip)
        if self.target_tau < 1.0:
            followed = self.target_tau if skip is None else (self.target_tau * (1.0 - skip)).to(self.dtype)
            self.target_parameters.lerp_(self.parameters, followed)

    def exchange(self, report: Sequence[float]) -> None:
        """Send only the trailer: reports and votes must not wait for learning to start."""
        self.trailer.write(report)
        self.sync.exchange(self)

    def agree(self) -> None:
        """Make all replicas the same now, where the strategy lets them differ for a while."""
        self.sync.agree(self)

    def sync_target(self) -> list[int] | None:
        """Renew the target network; return the ranks whose weights differ, or None if it has to wait."""
        return self.sync.sync_target(self)

    def broadcast_target(self) -> list[int]:
        """Make rank 0's weights everyone's target network; return the ranks whose own weights differ.

        The comparison is bit for bit, NaNs included, and comes at no cost but the broadcast's. Where most ranks
        agree, those that differ from them are returned, rank 0 or not.
        """
        mine = self.parameters
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
        return learning_rate(self.config, self.global_batch, self.batch_per_rank, self.done)

    def drain(self) -> dict[str, float]:
        """Reports summed and learning averaged over all ranks since the last call."""
        values = dict(zip(REPORTED + LEARNED, self.totals.tolist(), strict=True))
        for name in LEARNED:
            values[name] = values[name] / self.updates_summed if self.updates_summed else math.nan
        self.totals[:] = 0.0
        self.updates_summed = 0
        return values

    def sha256(self) -> str:
        """Digest of the online parameters' bytes."""
        return hashlib.sha256(self.parameters.cpu().numpy().tobytes()).hexdigest()

    def counters(self) -> dict[str, Any]:
        """What was counted: kept in a checkpoint, so that a resumed run goes on counting."""
        return {
            "totals": self.totals,
            "updates_summed": self.updates_summed,
            "skipped_updates": self.skipped_updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "sync": self.sync.counters(),
        }

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Put back what `counters` gave."""
        self.totals[:] = counters["totals"]
        self.updates_summed = counters["updates_summed"]
        self.skipped_updates = counters["skipped_updates"]
        self.skipped_in_a_row = counters["skipped_in_a_row"]
        self.sync.load_counters(counters["sync"])

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint keeps: both networks, the optimizer's moments, what the strategy carries."""
        return {
            "online": self.parameters,
            "target": self.target_parameters,
            **{f"optimizer.{name}": value for name, value in self.optimizer.moments().items()},
            **{f"sync.{name}": value for name, value in self.sync.state().items()},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def _abstain(self, report: Sequence[float]) -> None:
        """Take part in the exchange without a gradient."""
        self.message.zero_()
        self.trailer.write(report, absent=True)
        self.rows, self.td_errors = np.empty(0, np.int64), torch.empty(0)
        self.sync.begin(self)

    def _share_of_present(self) -> float:
        """What makes the mean over all ranks the mean over those that had a minibatch."""
        absent = self.trailer.absent
        assert absent < self.comm.size, "an update is due, but no rank has anything to learn from"
        return self.comm.size / (self.comm.size - absent)

    def _norm(self, share: float, largest: float) -> float:
        """Make `gradient` the mean over those that had a minibatch; its norm once divided by the largest weight."""
        if share != 1.0:
            self.gradient.mul_(share)
        return float(torch.linalg.vector_norm(self.gradient)) / largest

    def hear(self, reported: np.ndarray, learned: np.ndarray, updates: int) -> None:
        """Add up what the ranks told each other.

        Args:
            reported: `REPORTED`, summed over all ranks.
            learned: `LEARNED`, summed over updates.
            updates: how many; none, and `learned` says nothing.
        """
        self.totals[: len(REPORTED)] += reported
        if updates:
            self.totals[len(REPORTED) :] += learned
            self.updates_summed += updates
        self.stop_voted = self.stop_voted or bool(reported[0] > 0)

    def give_up_after(self, skipped_in_a_row: int, ranks: Sequence[int]) -> None:
        """End the run if these ranks had so many updates without a finite gradient that it is no accident.

        Raises:
            NonFiniteError: `max_skipped_updates` or more.
        """
        if skipped_in_a_row >= self.config.max_skipped_updates:
            began = ", ".join(map(str, ranks)) or "none alone: only the average is not finite"
            raise NonFiniteError(
                f"{skipped_in_a_row} updates in a row had a gradient that is not finite; it began on rank "
                f"{began}. Look for NaN or Inf in that rank's rewards and observations, or lower --lr"
            )

    def _skip(self) -> None:
        self.skipped_updates += 1
        self.skipped_in_a_row += 1
        self.give_up_after(self.skipped_in_a_row, self.trailer.spoilt)

    def _tensors(self, batch: Batch) -> list[Tensor]:
        """On the device, and numbers in the type of the parameters. In order of `_goal`, and the weights.

        Not to be made in inference mode: some heads ask autograd about them.
        """
        arrays = (
            batch.observation,
            batch.action,
            batch.reward,
            batch.next_observation,
            batch.discount,
            batch.weight,
        )
        tensors = [array if isinstance(array, Tensor) else torch.from_numpy(array) for array in arrays]
        if self.device.type != "cpu" and not self.step_recorded:
            # Recorded passes copy them to a place of their own.
            tensors = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        if self.dtype != torch.float32:
            for index in (2, 4, 5):
                tensors[index] = tensors[index].to(self.dtype)
        return tensors

    def _cast(self, network: Callable[[Tensor], T], observation: Tensor) -> T:
        """A forward pass, in bf16 if asked. What is worked out from it is not: hence no autocast around the rest."""
        if not self.autocast:
            return network(observation)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return network(observation)
