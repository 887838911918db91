"""From a minibatch to a flat gradient, from a flat gradient to a step, and the target network.

The learner knows nothing of ranks. A strategy (see `sync`) sends its gradient away between `compute_gradient` and
`apply_gradient`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from hvdqn.config import LearningConfig
from hvdqn.losses import expectation, mask_q, munchausen_bonus, select, soft_policy
from hvdqn.networks import QNetwork, make_passes
from hvdqn.optimizers import SGD, Adam, Optimizer, RMSProp
from hvdqn.replay import Batch


def flatten_parameters(network: nn.Module, device: torch.device) -> Tensor:
    """Move all parameters of a network into one contiguous tensor, of which they become views.

    Averaging, clipping, stepping, copying and hashing then each act on one tensor.

    Returns:
        `[parameters]`, on `device`.
    """
    parameters = list(network.parameters())
    flat = torch.cat([p.detach().reshape(-1).to(device) for p in parameters])
    for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
        parameter.data = view
    return flat


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return consecutive views of a flat tensor, shaped like the given tensors."""
    ends = np.cumsum([tensor.numel() for tensor in like])
    return [
        flat[end - tensor.numel() : end].view(tensor.shape) for end, tensor in zip(ends, like, strict=True)
    ]


def learning_rate(config: LearningConfig, batch_factor: float, progress: float) -> float:
    """Return the learning rate after a share `progress` of the run.

    It is lr x k, lr x min(sqrt(k), 3) or lr, where k is the batch factor: the global batch over the reference batch. A
    scaled rate is approached linearly from `lr` over the first `lr_warmup` of the run (Goyal et al. 2017, section 2.2).
    On top of that the rate falls linearly to its share `lr_final` at the end.
    """
    k = batch_factor
    factor = {"none": 1.0, "sqrt": min(math.sqrt(k), 3.0), "linear": k}[config.lr_scaling]
    warm = min(progress / config.lr_warmup, 1.0) if config.lr_warmup > 0 else 1.0
    # A worker of `--sync server` may count beyond the end of the run.
    decayed = 1.0 + (config.lr_final - 1.0) * min(progress, 1.0)
    return config.lr * (1.0 + (factor - 1.0) * warm) * decayed


def make_optimizer(config: LearningConfig, parameters: Tensor, batch_factor: float) -> Optimizer:
    """Make the optimizer of the configuration over a flat parameter tensor.

    For distributional losses Adam's epsilon is 0.01 / batch (Bellemare et al. 2017), with the global batch where there
    are several ranks (Stooke and Abbeel 2018): hence the division by the batch factor.
    """
    inverse = config.optimizer_eps_scaling == "inverse"
    eps = config.optimizer_eps / batch_factor if inverse else config.optimizer_eps
    if config.optimizer == "adam":
        return Adam(parameters, eps)
    if config.optimizer == "rmsprop":
        return RMSProp(parameters, eps)
    return SGD(parameters)


class Learner:
    """Computes gradients of minibatches and applies gradients to the online network.

    Args:
        network: the online network; its parameters become views of one flat tensor.
        config: loss, optimizer and target network.
        device: where the networks live.
        batch_factor: the global batch over the batch that the learning rate was tuned for (k).
        autocast: compute forward passes in bf16.

    Attributes:
        parameters, target_parameters: flat `[parameters]`, of the online and the target network.
        gradient: flat `[parameters]`; written by `compute_gradient`, read by `apply_gradient`.
        td_errors: what prioritized replay takes as the TD errors of the last minibatch `[batch]`: see `Head.loss`.
        lr: the learning rate of the last step.
        grad_norm: the gradient's norm at the last step, before clipping.
        target_tau: share by which the target follows the online network at every update; 1: it is copied now and then.
    """

    def __init__(
        self,
        network: QNetwork,
        config: LearningConfig,
        device: torch.device,
        batch_factor: float,
        autocast: bool = False,
    ) -> None:
        self.online, self.config, self.device = network, config, device
        self.batch_factor, self.autocast = batch_factor, autocast
        network.to(device)
        self.target = network.target_copy()
        self.parameters = flatten_parameters(network, device)
        self.target_parameters = flatten_parameters(self.target, device)
        self.dtype = self.parameters.dtype
        self.optimizer = make_optimizer(config, self.parameters, batch_factor)
        # With k times fewer updates the target must still follow as fast per env step.
        self.target_tau = 1.0 - (1.0 - config.target_tau) ** batch_factor
        self.move = partial(Tensor.to, device=device, non_blocking=True)
        self.td_errors = torch.empty(0)
        self.lr = learning_rate(config, batch_factor, 0.0)
        self.grad_norm = 0.0
        self.allocate_gradient()

    def allocate_gradient(self, trailing: int = 0, scale: float = 1.0) -> Tensor:
        """Allocate the gradient in one tensor with `trailing` numbers behind it, to travel as one message.

        Args:
            trailing: numbers behind the gradient.
            scale: factor of every gradient from now on: 1 / ranks where the gradients of ranks are summed.

        Returns:
            `[parameters + trailing]`; its first `parameters` numbers are `self.gradient`.
        """
        n = self.parameters.numel()
        message = torch.zeros(n + trailing, dtype=self.dtype, device=self.device)
        self.gradient, self.gradient_scale = message[:n], scale
        online = list(self.online.parameters())
        for parameter, view in zip(online, _views(message, online), strict=True):
            parameter.grad = view
        self.passes = make_passes(self.online, self.autocast)
        self.target_passes = make_passes(self.target, self.autocast)
        return message

    def compute_gradient(self, batch: Batch) -> Tensor:
        """Write the gradient of a minibatch into `gradient`, and its priorities into `td_errors`.

        Importance weights enter as they are; `apply_gradient` divides by the largest of the job.

        Returns:
            The loss, the mean of `td_errors`, the mean Q-value, and a number that is finite only if loss and gradient
            are: `[4]`, on the device.
        """
        arrays = [
            batch.observation,
            batch.action,
            batch.reward,
            batch.next_observation,
            batch.discount,
            batch.weight,
        ]
        if batch.action_mask is not None and batch.next_action_mask is not None:
            arrays += [batch.action_mask, batch.next_action_mask]
        # Not made in inference mode, because some heads use autograd.
        tensors = list(map(torch.as_tensor, arrays))
        if self.dtype != torch.float32:
            for index in (2, 4, 5):
                tensors[index] = tensors[index].to(self.dtype)
        statistics, self.td_errors = self.differentiate(*tensors)
        return statistics

    def differentiate(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Write the gradient; return the statistics `[4]` and the priorities `[batch]`: see `compute_gradient`.

        Nothing here reads a tensor's content on the host, so that `graphs` can record it.

        Args:
            tensors: observation, action, reward, next observation, discount, weight, and if the environments give
                masks, those of the observation and of the next one; on any device.
        """
        with self.passes.no_grad():
            moved = map(self.move, tensors)
            observation, action, reward, next_observation, discount, weight, *masks = moved
            target = self.td_target(observation, action, reward, next_observation, discount, *masks)
            output, tape = self.passes.forward(observation)
            head = self.online.head
            loss, td_errors, slope = head.loss_and_gradient(output, action, target, weight)
            # Scaling the small slope is cheaper than scaling the gradient.
            self.passes.backward(tape, slope if self.gradient_scale == 1.0 else slope * self.gradient_scale)
            # Huber's gradient is clipped, so that an infinite reward shows in the loss alone.
            finite = self.gradient.sum() + loss
            statistics = torch.stack((loss, td_errors.mean(), head.q_values(output).mean(), finite))
        return statistics, td_errors

    def td_target(
        self,
        observation: Tensor,
        action: Tensor,
        reward: Tensor,
        next_observation: Tensor,
        discount: Tensor,
        mask: Tensor | None = None,
        next_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the target of the head's output for the actions taken, `[batch, ...]`.

        DQN (Mnih et al. 2015), Double DQN (van Hasselt et al. 2016) or Munchausen (Vieillard et al. 2020, eq. 1). Only
        legal actions enter, where `mask` and `next_mask` `[batch, *action_shape, actions]` give them.
        """
        config, head = self.config, self.target.head
        next_output = self.target_passes.output(next_observation)
        if not config.munchausen:
            if not config.double:
                return head.target(head.greedy(next_output, next_mask), reward, discount)
            next_q = self.passes.q_values(next_observation)
            next_action = mask_q(next_q, next_mask).argmax(dim=-1)
            return head.target(select(next_output, next_action), reward, discount)
        # With n steps only the first action's log-policy enters: the others' observations are not at hand.
        q = mask_q(self.target_passes.q_values(observation), mask)
        temperature = config.munchausen_temperature * head.dimensions
        bonus = munchausen_bonus(q, action, config.munchausen_alpha, temperature, config.munchausen_clip)
        policy, entropy = soft_policy(mask_q(head.q_values(next_output), next_mask), temperature)
        return head.target(expectation(next_output, policy), reward + bonus + discount * entropy, discount)

    def apply_gradient(self, progress: float, largest_weight: float = 1.0, scale: float = 1.0) -> bool:
        """Clip `gradient` and take an optimizer step, unless the gradient is not finite.

        Args:
            progress: share of the run that has passed, for the learning rate.
            largest_weight: importance weights are divided by it (Schaul et al. 2016, section 3.4).
            scale: factor of the gradient before clipping.

        Returns:
            Whether the step was taken.
        """
        with self.passes.no_grad():
            if scale != 1.0:
                self.gradient.mul_(scale)
            norm = float(torch.linalg.vector_norm(self.gradient)) / largest_weight
            if not math.isfinite(norm):
                return False
            self.grad_norm = norm
            self.lr = learning_rate(self.config, self.batch_factor, progress)
            limit = self.config.max_grad_norm
            factor = (limit / norm if limit and norm > limit else 1.0) / largest_weight
            if factor != 1.0:
                self.gradient.mul_(factor)
            self.optimizer.step(self.gradient, self.lr)
            if self.target_tau < 1.0:
                self.target_parameters.lerp_(self.parameters, self.target_tau)
        return True

    def apply_gradient_on_device(
        self, lr: Tensor, largest_weight: Tensor, scale: Tensor, finite: Tensor
    ) -> Tensor:
        """Do the same as `apply_gradient` without the host, so that `graphs` can record it.

        Args:
            lr: learning rate `[]`.
            largest_weight: `[]`, float64.
            scale: factor of the gradient before clipping `[]`.
            finite: whether all ranks' losses and gradients are finite `[]`; the step is skipped otherwise.

        Returns:
            The gradient's norm `[]`; the step was skipped if it is not finite.
        """
        with torch.no_grad():
            self.gradient.mul_(scale)
            norm: Tensor = torch.linalg.vector_norm(self.gradient).double() / largest_weight
            skip = (~(torch.isfinite(norm) & finite)).float()
            limit = self.config.max_grad_norm or math.inf
            self.gradient.mul_(torch.where(norm > limit, limit / norm, 1.0) / largest_weight)
            self.optimizer.step(self.gradient, lr, skip)
            if self.target_tau < 1.0:
                followed = (self.target_tau * (1.0 - skip)).to(self.dtype)
                self.target_parameters.lerp_(self.parameters, followed)
        return norm

    def log_step(self, lr: float, grad_norm: float) -> None:
        """Keep the learning rate and the gradient's norm of a step that the device took."""
        self.lr, self.grad_norm = lr, grad_norm

    def update_target(self, parameters: Tensor | None = None) -> None:
        """Copy parameters `[parameters]`, by default the online network's, to the target network."""
        self.target_parameters.copy_(self.parameters if parameters is None else parameters)

    def sha256(self) -> str:
        """Return the digest of the online parameters' bytes."""
        return hashlib.sha256(self.parameters.cpu().numpy().tobytes()).hexdigest()

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint: both networks and the optimizer's moments. They are not copies."""
        moments = {f"optimizer.{name}": value for name, value in self.optimizer.moments().items()}
        return {"online": self.parameters, "target": self.target_parameters, **moments}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned."""
        load_tensors(self.state(), state)


def load_tensors(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into those of the same names.

    Raises:
        KeyError: one is missing.
        ValueError: one has another shape, which `copy_` would broadcast.
    """
    for name, tensor in tensors.items():
        if saved[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {list(saved[name].shape)}, not {list(tensor.shape)}")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
