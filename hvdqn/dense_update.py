"""The gradient of small fully connected networks, from the minibatch to every `.grad`, in memory allocated once.

It computes what `Learner.differentiate` computes for any network, without autograd and with few operations: a small
network's update is short, and takes as long as the number of its operations. Wherever both networks see observations
and next observations, these pass as one matrix.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdqn.config import LearningConfig
from hvdqn.losses import scaled_log_policy
from hvdqn.networks import QNetwork
from hvdqn.networks.dense import DenseNetwork
from hvdqn.networks.dense_heads import DenseHead, dense_head
from hvdqn.replay import Batch

Array: TypeAlias = NDArray[Any]

# The learner checks losses and gradients for NaN and Inf itself.
warnings.filterwarnings(
    "ignore", ".* encountered in ", RuntimeWarning, r"hvdqn\.(dense_update|networks\.dense_heads)"
)


class DenseUpdate:
    """Computes gradients of a small network on the CPU.

    Parameters and gradients are looked up when this is made: make it anew where they move to other memory.

    Args:
        online: the network that learns; every parameter has a `.grad`.
        target: its target network.
        head: the equations of their head.
        config: which target the online network learns.
        gradient: the flat tensor of which every `.grad` is a view `[parameters]`.
        scale: factor of the gradient.
    """

    def __init__(
        self,
        online: DenseNetwork,
        target: DenseNetwork,
        head: DenseHead,
        config: LearningConfig,
        gradient: Tensor,
        scale: float,
    ) -> None:
        self.online, self.target, self.head, self.config = online, target, head, config
        self.gradient, self.scale = gradient, scale
        self.double = config.double and not config.munchausen
        self.dtype = gradient.numpy().dtype
        # The observations of a minibatch, then its next observations `[2 batch, inputs]`; and `0 ... batch - 1`.
        self.observations: Array = np.empty((0, 0), self.dtype)
        self.rows: NDArray[np.int64] = np.empty(0, np.int64)

    @classmethod
    def of(
        cls, online: QNetwork, target: QNetwork, config: LearningConfig, gradient: Tensor, scale: float
    ) -> DenseUpdate | None:
        """Return the update of these networks, or None if they have other layers or another head."""
        dense, dense_target, head = DenseNetwork.of(online), DenseNetwork.of(target), dense_head(online.head)
        if dense is None or dense_target is None or head is None:
            return None
        return cls(dense, dense_target, head, config, gradient, scale)

    def differentiate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Write the gradient of a minibatch; return its statistics and priorities as `Learner.differentiate` does.

        loss = mean_b weight_b loss(output_b[action_b], target_b)
        """
        size, action, head = len(batch.action), batch.action, self.head
        with torch.inference_mode():
            self.load_observations(batch)
            output, traces = self.online.forward(
                self.observations if self.double else self.observations[:size]
            )
            q = head.q_values(output)
            target = self.td_target(batch, q)
            losses, priorities, derivative = head.losses(output[self.rows, action], target)
            mean_weight = np.asarray(batch.weight, self.dtype) * (1.0 / size)
            slope = np.zeros((size, *output.shape[1:]), self.dtype)
            slope[self.rows, action] = (mean_weight * derivative.T).T
            if self.scale != 1.0:
                slope *= self.scale
            self.online.backward(traces, slope)
            loss = np.dot(mean_weight, losses)
            # Huber's gradient is clipped, so that an infinite reward shows in the loss alone.
            finite = float(self.gradient.sum()) + loss
            q_mean = q[:size].sum() / q[:size].size
        statistics = np.array([loss, priorities.sum() / size, q_mean, finite], self.dtype)
        return torch.from_numpy(statistics), torch.from_numpy(priorities)

    def load_observations(self, batch: Batch) -> None:
        """Write the observations and the next observations into one matrix of floats; bytes are scaled to [0, 1]."""
        size = len(batch.action)
        if size != len(self.rows):
            inputs = int(np.prod(batch.observation.shape[1:]))
            self.rows = np.arange(size)
            self.observations = np.empty((2 * size, inputs), self.dtype)
        self.observations[:size] = batch.observation.reshape(size, -1)
        self.observations[size:] = batch.next_observation.reshape(size, -1)
        if batch.observation.dtype == np.uint8:
            self.observations /= 255

    def td_target(self, batch: Batch, q: Array) -> Array:
        """Return the target of the outputs of the actions taken, `[batch, ...]`: see `Learner.td_target`.

        Args:
            batch: whose observations have been loaded.
            q: the online network's, for the observations and with Double DQN also for the next ones `[rows, actions]`.
        """
        config, head, size = self.config, self.head, len(self.rows)
        reward, discount = (np.asarray(array, self.dtype) for array in (batch.reward, batch.discount))
        if not config.munchausen:
            next_output, _ = self.target.forward(self.observations[size:])
            next_action = (q[size:] if self.double else head.q_values(next_output)).argmax(axis=1)
            return head.target(next_output[self.rows, next_action], reward, discount)
        output, _ = self.target.forward(self.observations)
        temperature = config.munchausen_temperature
        # tau log pi of both states; it is never above 0.
        log_policy: Array = scaled_log_policy(torch.from_numpy(head.q_values(output)), temperature).numpy()
        bonus = np.maximum(log_policy[self.rows, batch.action], config.munchausen_clip)
        log_policy = log_policy[size:]
        policy = np.exp(log_policy / temperature)
        entropy = -np.einsum("ba,ba->b", policy, log_policy)
        next_value: Array = np.einsum("ba...,ba->b...", output[size:], policy)
        return head.target(
            next_value, reward + config.munchausen_alpha * bonus + discount * entropy, discount
        )
