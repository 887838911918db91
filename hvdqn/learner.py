"""Compute the gradient of a minibatch, take the optimizer step for a gradient, and keep the target network.

Parameters and gradients are flat: one tensor each, which holds those of all layers. The learner knows nothing of ranks.
Between `compute_gradient` and `apply_gradient`, a strategy (see `sync`) averages its gradient over the ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from hvdqn.config import LearningConfig
from hvdqn.dense_update import DenseUpdate
from hvdqn.losses import expectation, mask_q, munchausen_bonus, select, soft_policy
from hvdqn.networks import QNetwork, autograd_passes, spectral_layers, split_first
from hvdqn.optimizers import SGD, Adam, Optimizer, RAdam, RMSProp
from hvdqn.replay import Batch


def flatten_parameters(network: nn.Module, device: torch.device) -> Tensor:
    """Move all parameters of a network into one contiguous tensor, and make them views of it.

    Averaging, clipping, stepping, copying and hashing then each need one operation. Of a network that is split over
    ranks the tensor holds this rank's parts, in the order of `networks.Layout`.

    Returns:
        The flat tensor `[parameters]`, on `device`.
    """
    parameters = split_first(network)
    flat = torch.cat([p.detach().reshape(-1).to(device) for p in parameters])
    for parameter, view in zip(parameters, _views(flat, parameters), strict=True):
        parameter.data = view
    return flat


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return consecutive views of the numbers in a flat tensor, shaped like the tensors in `like`."""
    ends = np.cumsum([tensor.numel() for tensor in like])
    return [
        flat[end - tensor.numel() : end].view(tensor.shape) for end, tensor in zip(ends, like, strict=True)
    ]


def learning_rate(config: LearningConfig, batch_factor: float, progress: float) -> float:
    """Return the learning rate after a share `progress` of the run (0 at the start, 1 at the end).

    With `lr_scaling` it is lr x k ("linear") or lr x min(sqrt(k), 3) ("sqrt"), else lr. k is the batch factor: the
    global batch divided by the batch that `lr` was tuned for. During the first share `lr_warmup` of the run, the rate
    changes linearly from `lr` to the scaled one (Goyal et al. 2017, section 2.2). Over the whole run it is multiplied
    by a factor that falls linearly from 1 to `lr_final`.
    """
    k = batch_factor
    factor = {"none": 1.0, "sqrt": min(math.sqrt(k), 3.0), "linear": k}[config.lr_scaling]
    warm = min(progress / config.lr_warmup, 1.0) if config.lr_warmup > 0 else 1.0
    # A worker of `--sync server` may count beyond the end of the run.
    decayed = 1.0 + (config.lr_final - 1.0) * min(progress, 1.0)
    return config.lr * (1.0 + (factor - 1.0) * warm) * decayed


def make_optimizer(config: LearningConfig, parameters: Tensor, batch_factor: float) -> Optimizer:
    """Create the optimizer that `--optimizer` names, for a flat parameter tensor `[parameters]`.

    With `optimizer_eps_scaling` "inverse", epsilon is divided by the batch factor. This is for distributional losses,
    whose papers set Adam's epsilon to 0.01 / batch (Bellemare et al. 2017), where the batch is the one over all ranks
    (Stooke and Abbeel 2018).
    """
    inverse = config.optimizer_eps_scaling == "inverse"
    eps = config.optimizer_eps / batch_factor if inverse else config.optimizer_eps
    if config.optimizer == "adam":
        return Adam(parameters, eps)
    if config.optimizer == "radam":
        return RAdam(parameters, eps)
    if config.optimizer == "rmsprop":
        return RMSProp(parameters, eps)
    return SGD(parameters)


class Learner:
    """Computes gradients of minibatches and applies gradients to the online network.

    Args:
        network: the online network; its parameters become views of one flat tensor.
        config: the settings of loss, optimizer and target network.
        device: the device of both networks.
        batch_factor: the global batch divided by the batch that the learning rate was tuned for (k).
        autocast: whether to compute forward passes under bf16 autocast.
        norm: returns the norm of a flat gradient `[]`; for a network that is split over ranks, that of all its parts.

    Attributes:
        parameters, target_parameters: all parameters of the online and of the target network, flat `[parameters]`.
        buffers: the persistent buffers of both networks as "online.NAME" and "target.NAME"; those that the networks
            share appear once. They change in place only.
        gradient: flat `[parameters]`; `compute_gradient` writes it, `apply_gradient` reads it.
        td_errors: the errors of the last minibatch that prioritized replay ranks transitions by `[batch]`: the second
            result of `Head.loss`.
        lr: the learning rate of the last step.
        grad_norm: the gradient's norm at the last step, before clipping.
        target_tau: the share by which the target network moves toward the online one at every update; 1: it does not
            move, and `update_target` copies it.
        spectral: the layers with spectral normalization in the networks whose weights change at every update. They
            take a power iteration whenever the weights have changed.
    """

    def __init__(
        self,
        network: QNetwork,
        config: LearningConfig,
        device: torch.device,
        batch_factor: float,
        autocast: bool = False,
        norm: Callable[[Tensor], Tensor] = torch.linalg.vector_norm,
    ) -> None:
        self.norm = norm
        self.online, self.config, self.device = network, config, device
        self.batch_factor, self.autocast = batch_factor, autocast
        network.to(device)
        self.target = network.target_copy()
        self.parameters = flatten_parameters(network, device)
        self.target_parameters = flatten_parameters(self.target, device)
        online, target = network.state_buffers(), self.target.state_buffers()
        self.copied_buffers = [name for name in online if target[name] is not online[name]]
        self.buffers = {f"online.{name}": buffer for name, buffer in online.items()}
        self.buffers |= {f"target.{name}": target[name] for name in self.copied_buffers}
        self.dtype = self.parameters.dtype
        self.optimizer = make_optimizer(config, self.parameters, batch_factor)
        # A k times larger batch means k times fewer updates. The target must still follow as fast per env step.
        self.target_tau = 1.0 - (1.0 - config.target_tau) ** batch_factor
        changing = (network,) if self.target_tau == 1.0 else (network, self.target)
        self.spectral = [layer for each in changing for layer in spectral_layers(each)]
        self.passes, self.target_passes = (autograd_passes(each, autocast) for each in (network, self.target))
        self.move = partial(Tensor.to, device=device, non_blocking=True)
        self.td_errors = torch.empty(0)
        self.lr = learning_rate(config, batch_factor, 0.0)
        self.grad_norm = 0.0
        self.allocate_gradient()

    def allocate_gradient(self, trailing: int = 0, scale: float = 1.0) -> Tensor:
        """Allocate the gradient and `trailing` further numbers in one tensor, so that one allreduce can sum both.

        Args:
            trailing: how many numbers follow the gradient.
            scale: factor for every gradient from now on, such as 1 / ranks if ranks sum their gradients.

        Returns:
            The tensor `[parameters + trailing]`; its first `parameters` numbers are `self.gradient`.
        """
        n = self.parameters.numel()
        message = torch.zeros(n + trailing, dtype=self.dtype, device=self.device)
        self.gradient, self.gradient_scale = message[:n], scale
        online = split_first(self.online)
        for parameter, view in zip(online, _views(message, online), strict=True):
            parameter.grad = view
        # Under autocast, layers compute with weights in bf16, which `DenseUpdate` does not.
        networks = self.online, self.target
        self.dense = None if self.autocast else DenseUpdate.of(*networks, self.config, self.gradient, scale)
        return message

    def compute_gradient(self, batch: Batch) -> Tensor:
        """Write the gradient of a minibatch into `gradient`, and its priorities into `td_errors`.

        Importance weights are not normalized here; `apply_gradient` divides by the largest of all ranks.

        Returns:
            Four numbers on the device `[4]`: the loss, the mean of `td_errors`, the mean Q-value, and a number that is
            finite only if loss and gradient are.
        """
        if self.dense is not None and batch.action_mask is None:
            statistics, self.td_errors = self.dense.differentiate(batch)
            return statistics
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
        tensors = list(map(torch.as_tensor, arrays))
        if self.dtype != torch.float32:
            for index in (2, 4, 5):
                tensors[index] = tensors[index].to(self.dtype)
        statistics, self.td_errors = self.differentiate(*tensors)
        return statistics

    def differentiate(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Write the gradient; return the statistics `[4]` and the priorities `[batch]`: see `compute_gradient`.

        Nothing here reads a tensor's content on the host, so that it can be recorded as a CUDA graph.

        Args:
            tensors: the fields of `Batch` as tensors, on any device: observation, action, reward, next observation,
                discount, weight, and if there are masks, those of the observation and of the next one.
        """
        with torch.no_grad():
            moved = map(self.move, tensors)
            observation, action, reward, next_observation, discount, weight, *masks = moved
            head, bootstraps = self.online.head, len(next_observation) > 0
            if bootstraps:
                target = self.td_target(observation, action, reward, next_observation, discount, *masks)
            output, tape = self.passes.forward(observation)
            if not bootstraps:
                # Rewards are whole returns: with discounts of 0, any value can stand beside them.
                target = head.target(select(head.next_values(output), action), reward, discount)
            loss, td_errors, slope = head.loss_and_gradient(output, action, target, weight)
            # Scaling `slope`, the small gradient with respect to the output, is cheaper than scaling the gradient.
            self.passes.backward(tape, slope if self.gradient_scale == 1.0 else slope * self.gradient_scale)
            # The loss is added, because Huber's loss clips the gradient: an infinite reward leaves it finite.
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
        """Return the targets that the head's outputs for the actions taken are trained toward, `[batch, ...]`.

        It is that of DQN (Mnih et al. 2015), Double DQN (van Hasselt et al. 2016) or Munchausen DQN (Vieillard et al.
        2020, eq. 1), as configured. Only legal actions enter, where `mask` and `next_mask` `[batch, *action_shape,
        actions]` give them.
        """
        config, head = self.config, self.target.head
        next_output = self.target_passes.output(next_observation)
        if not config.munchausen:
            if not config.double:
                return head.target(head.greedy(next_output, next_mask), reward, discount)
            next_q = self.passes.q_values(next_observation)
            if next_mask is not None:
                next_q = mask_q(next_q, next_mask)
            next_action = next_q.argmax(dim=-1)
            return head.target(select(head.next_values(next_output), next_action), reward, discount)
        # With n-step returns, Munchausen's bonus covers only the first action: a minibatch does not hold the
        # observations of the others.
        q = mask_q(self.target_passes.q_values(observation), mask)
        temperature = config.munchausen_temperature * head.dimensions
        bonus = munchausen_bonus(q, action, config.munchausen_alpha, temperature, config.munchausen_clip)
        policy, entropy = soft_policy(mask_q(head.q_values(next_output), next_mask), temperature)
        next_value = expectation(head.next_values(next_output), policy)
        return head.target(next_value, reward + bonus + discount * entropy, discount)

    def apply_gradient(self, progress: float, largest_weight: float = 1.0, scale: float = 1.0) -> bool:
        """Clip `gradient` and take an optimizer step, unless the gradient is not finite.

        Args:
            progress: share of the run that has passed, for the learning rate.
            largest_weight: the largest importance weight, which the gradient is divided by (Schaul et al. 2016,
                section 3.4).
            scale: factor for the gradient before clipping.

        Returns:
            True if the step was taken, False if the gradient was not finite.
        """
        with torch.no_grad():
            if scale != 1.0:
                self.gradient.mul_(scale)
            norm = float(self.norm(self.gradient)) / largest_weight
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
            for layer in self.spectral:
                layer.power_iteration()
        return True

    def apply_gradient_on_device(
        self, lr: Tensor, largest_weight: Tensor, scale: Tensor, finite: Tensor
    ) -> Tensor:
        """Do the same as `apply_gradient`, but never read a tensor on the host, so that a CUDA graph can record it.

        Args:
            lr: learning rate `[]`.
            largest_weight: the largest importance weight `[]`, float64.
            scale: factor for the gradient before clipping `[]`.
            finite: True if all ranks' losses and gradients are finite `[]`; otherwise the step is skipped.

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
            for layer in self.spectral:
                layer.power_iteration((1.0 - skip).to(self.dtype))
        return norm

    def log_step(self, lr: float, grad_norm: float) -> None:
        """Set `lr` and `grad_norm` to those of a step that `apply_gradient_on_device` took."""
        self.lr, self.grad_norm = lr, grad_norm

    def update_target(self, parameters: Tensor | None = None) -> None:
        """Overwrite the target network with these flat parameters `[parameters]`, by default the online network's.

        Its buffers become the online network's, unless it moves at every update: then they move with it.
        """
        self.target_parameters.copy_(self.parameters if parameters is None else parameters)
        for name in self.copied_buffers if self.target_tau == 1.0 else ():
            self.buffers[f"target.{name}"].copy_(self.buffers[f"online.{name}"])

    def sha256(self, parameters: Tensor | None = None) -> str:
        """Return the hash of these flat parameters, by default the online network's, and of its buffers."""
        online = [buffer for name, buffer in self.buffers.items() if name.startswith("online.")]
        return sha256([self.parameters if parameters is None else parameters, *online])

    def state(self) -> dict[str, Tensor]:
        """Return the flat tensors for a checkpoint: both networks and the optimizer's moments; they are no copies."""
        moments = {f"optimizer.{name}": value for name, value in self.optimizer.moments().items()}
        return {"online": self.parameters, "target": self.target_parameters, **moments}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite both networks and the optimizer's moments with those that `state` returned."""
        load_tensors(self.state(), state)


def sha256(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 hash of the content of these tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def load_tensors(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Overwrite each tensor with the saved one of the same name.

    Raises:
        KeyError: a saved tensor is missing.
        ValueError: a saved tensor has another shape, which `copy_` would broadcast.
    """
    for name, tensor in tensors.items():
        if saved[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {list(saved[name].shape)}, not {list(tensor.shape)}")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
