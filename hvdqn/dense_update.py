"""Compute the gradient of a small fully connected network by hand, from the minibatch to every `.grad`.

It computes what `Learner.differentiate` computes for any network, without autograd, with few operations and in memory
that is allocated once: the update of a small network takes as long as the number of its operations. Where a network
sees observations and next observations, both pass as one matrix.

`DenseUpdate` is the update. The classes before it hold the equations that depend on the head, with derivatives; each
belongs to one class of `hvdqn/networks/heads.py`, which names the papers. Their arrays: `output: [rows, actions, ...]`;
`value` and `target`, of one action per row: `[batch, ...]`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdqn.config import LearningConfig
from hvdqn.losses import (
    categorical_loss,
    gaussian_histogram,
    huber_derivative,
    pairwise_td_error,
    scaled_log_policy,
)
from hvdqn.networks import QNetwork
from hvdqn.networks.dense import DenseNetwork
from hvdqn.networks.heads import CategoricalHead, Head, HLGaussHead, QuantileHead, ScalarHead
from hvdqn.replay import Batch

Array: TypeAlias = NDArray[Any]

# The learner checks losses and gradients for NaN and Inf itself.
warnings.filterwarnings("ignore", ".* encountered in ", RuntimeWarning, r"hvdqn\.dense_update")


class Losses(NamedTuple):
    """The losses of a minibatch before importance weights."""

    losses: Array
    """[batch]."""
    priorities: Array
    """In replay `[batch]`."""
    derivative: Array
    """Of each loss with respect to its `value`, shaped as that."""


class DenseHead(ABC):
    """What an update must know of a head."""

    @abstractmethod
    def q_values(self, output: Array) -> Array:
        """Return the expected return of each action, `[rows, actions]`."""

    def next_values(self, output: Array) -> Array:
        """Return what targets bootstrap from, as `Head.next_values` does: by default the output itself."""
        return output

    @abstractmethod
    def target(self, next_value: Array, reward: Array, discount: Array) -> Array:
        """Return what the value of the action taken should have been, as `Head.target` does."""

    @abstractmethod
    def losses(self, value: Array, target: Array) -> Losses:
        """Return what `Head.loss` returns, and the derivative of the losses."""


class DenseScalar(DenseHead):
    """The equations of `ScalarHead`."""

    def __init__(self, head: ScalarHead) -> None:
        self.td_loss = head.td_loss

    def q_values(self, output: Array) -> Array:
        """Return the output itself."""
        return output

    def target(self, next_value: Array, reward: Array, discount: Array) -> Array:
        """Return r + discount * Q(s', a'), `[batch]`."""
        target: Array = reward + discount * next_value
        return target

    def losses(self, value: Array, target: Array) -> Losses:
        """Return the losses of the TD error d = Q(s, a) - target."""
        d = value - target
        tensor = torch.from_numpy(d)
        losses, derivative = self.td_loss.value(tensor), self.td_loss.derivative(tensor)
        return Losses(losses.numpy(), np.abs(d), derivative.numpy())


class DenseCategorical(DenseHead):
    """The equations of `CategoricalHead`."""

    def __init__(self, head: CategoricalHead) -> None:
        self.support: Array = head.support.numpy()

    def q_values(self, output: Array) -> Array:
        """Return the mean of each action's distribution, `[rows, actions]`."""
        means: Array = np.matmul(_softmax(output), self.support)
        return means

    def target(self, next_value: Array, reward: Array, discount: Array) -> Array:
        """Return the distribution of r + discount * z, projected onto the atoms z: `[batch, atoms]`.

        Each atom's probability is divided between the two atoms next to its place, the closer one getting more: the
        same as `losses.categorical_projection`, which computes every pair of atoms because it must suit GPUs.
        """
        z = self.support
        last = len(z) - 1
        backed_up = reward[:, None] + discount[:, None] * z
        # NaN becomes 0 here, because it has no place.
        place = np.fmin(np.fmax((backed_up - z[0]) / ((z[-1] - z[0]) / last), 0), last)
        lower = place.astype(np.int64)
        upper_share = place - lower
        upper = np.minimum(lower + 1, last)
        probability = _softmax(next_value)
        first = np.arange(0, place.size, len(z))[:, None]
        projected = np.bincount(
            (first + lower).ravel(), (probability * (1 - upper_share)).ravel(), place.size
        )
        projected += np.bincount((first + upper).ravel(), (probability * upper_share).ravel(), place.size)
        # As in `CategoricalHead.target`: an infinite reward, which lies on the last atom now, makes its target NaN.
        target: Array = projected.reshape(place.shape).astype(z.dtype) + 0.0 * reward[:, None]
        return target

    def losses(self, value: Array, target: Array) -> Losses:
        """Return the KL divergences, and their derivative softmax(logits) - target."""
        losses = categorical_loss(torch.from_numpy(value), torch.from_numpy(target)).numpy()
        return Losses(losses, losses, _softmax(value) - target)


class DenseHLGauss(DenseCategorical):
    """The equations of `HLGaussHead`."""

    def __init__(self, head: HLGaussHead) -> None:
        super().__init__(head)
        self.edges, self.sigma = head.edges, head.sigma

    def next_values(self, output: Array) -> Array:
        """Return the mean of each distribution, `[...]`."""
        return self.q_values(output)

    def target(self, next_value: Array, reward: Array, discount: Array) -> Array:
        """Return the histogram of a Gaussian around r + discount * Q(s', a'), `[batch, bins]`."""
        mean = reward + discount * next_value
        histogram = gaussian_histogram(torch.from_numpy(mean), self.edges, self.sigma).numpy()
        target: Array = histogram + 0.0 * mean[:, None]  # as in `HLGaussHead.target`
        return target


class DenseQuantile(DenseHead):
    """The equations of `QuantileHead`."""

    def __init__(self, head: QuantileHead) -> None:
        self.fraction = head.fraction[:, None]

    def q_values(self, output: Array) -> Array:
        """Return the mean of each action's quantiles, `[rows, actions]`."""
        return _mean_of_last(output)

    def target(self, next_value: Array, reward: Array, discount: Array) -> Array:
        """Return the target quantiles, `[batch, quantiles]`."""
        target: Array = reward[:, None] + discount[:, None] * next_value
        return target

    def losses(self, value: Array, target: Array) -> Losses:
        """Return the quantile losses and their derivative.

            loss = sum_i mean_j w_ij huber(d_ij),   dloss/dvalue_i = - mean_j w_ij clip(d_ij, -1, 1)

        where d_ij = target_j - value_i, w_ij = |fraction_i - 1{d_ij < 0}| and huber(d) = clip(d) (d - clip(d) / 2).
        """
        d = pairwise_td_error(torch.from_numpy(value), torch.from_numpy(target))
        clipped = huber_derivative(d)
        weighted = torch.where(d < 0, 1 - self.fraction, self.fraction) * clipped
        huber = weighted * d.sub(clipped, alpha=0.5)
        losses = _mean_of_last(huber.numpy()).sum(axis=1)
        priorities = _mean_of_last(_mean_of_last(d.abs().numpy()))
        return Losses(losses, priorities, -_mean_of_last(weighted.numpy()))


def dense_head(head: Head) -> DenseHead | None:
    """Return the equations of a head, or None if they are not written out."""
    if type(head) is ScalarHead:
        return DenseScalar(head)
    if type(head) is CategoricalHead:
        return DenseCategorical(head)
    if type(head) is HLGaussHead:
        return DenseHLGauss(head)
    if type(head) is QuantileHead:
        return DenseQuantile(head)
    return None


def _softmax(logits: Array) -> Array:
    """Return the probabilities of the last axis."""
    probabilities: Array = torch.softmax(torch.from_numpy(logits), -1).numpy()
    return probabilities


def _mean_of_last(values: Array) -> Array:
    """Return the mean over the last axis; a matrix product takes less time than a sum over a short axis."""
    count = values.shape[-1]
    mean: Array = np.matmul(values, np.full(count, 1.0 / count, values.dtype))
    return mean


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
        # The observations of a minibatch, then its next ones, if any `[2 batch, inputs]`; and `0 ... batch - 1`.
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
            if len(batch.next_observation):
                target = self.td_target(batch, q)
            else:  # rewards are whole returns: with discounts of 0, any value can stand beside them
                value = head.next_values(output[self.rows, action])
                target = head.target(value, batch.reward, batch.discount)
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
        """Write observations and next observations into one matrix of floats, scaled and normalized as inputs."""
        size, inputs = len(batch.action), math.prod(batch.observation.shape[1:])
        if size != len(self.rows):
            self.rows = np.arange(size)
            self.observations = np.empty((size + len(batch.next_observation), inputs), self.dtype)
        self.observations[:size] = batch.observation.reshape(size, -1)
        self.observations[size:] = batch.next_observation.reshape(len(self.observations) - size, inputs)
        if batch.observation.dtype == np.uint8:
            self.observations /= 255
        if self.online.normalize is not None:
            rows = torch.from_numpy(self.observations).view(
                len(self.observations), *batch.observation.shape[1:]
            )
            rows.copy_(self.online.normalize(rows))

    def td_target(self, batch: Batch, q: Array) -> Array:
        """Return the target of the outputs of the actions taken, `[batch, ...]`: see `Learner.td_target`.

        Args:
            batch: whose observations have been loaded.
            q: the online network's, for the observations and with Double DQN also for the next ones `[rows, actions]`.
        """
        config, head, size = self.config, self.head, len(self.rows)
        reward, discount = np.asarray(batch.reward, self.dtype), np.asarray(batch.discount, self.dtype)
        if not config.munchausen:
            next_output, _ = self.target.forward(self.observations[size:])
            next_action = (q[size:] if self.double else head.q_values(next_output)).argmax(axis=1)
            chosen = next_output[self.rows, next_action]
            return head.target(head.next_values(chosen), reward, discount)
        output, _ = self.target.forward(self.observations)
        temperature = config.munchausen_temperature
        # tau log pi of both states; it is never above 0.
        log_policy: Array = scaled_log_policy(torch.from_numpy(head.q_values(output)), temperature).numpy()
        bonus = np.maximum(log_policy[self.rows, batch.action], config.munchausen_clip)
        log_policy = log_policy[size:]
        policy = np.exp(log_policy / temperature)
        entropy = -np.einsum("ba,ba->b", policy, log_policy)
        next_value: Array = np.einsum("ba...,ba->b...", head.next_values(output[size:]), policy)
        return head.target(
            next_value, reward + config.munchausen_alpha * bonus + discount * entropy, discount
        )
