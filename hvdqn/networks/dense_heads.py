"""The equations of heads as `hvdqn/dense_update.py` needs them: with derivatives written out, in NumPy on the CPU.

Each class answers for one class of `heads.py`, whose equations and papers it shares. Arrays: `output: [rows, actions,
...]`; `value` and `target`, of one action per row: `[batch, ...]`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from hvdqn.losses import categorical_loss, huber_derivative, pairwise_td_error
from hvdqn.networks.heads import CategoricalHead, Head, QuantileHead, ScalarHead

Array: TypeAlias = NDArray[Any]


class Losses(NamedTuple):
    """The losses of a minibatch before importance weights."""

    losses: Array
    """[batch]."""
    priorities: Array
    """In replay `[batch]`."""
    derivative: Array
    """Of each loss with respect to its `value`, shaped as that."""


class DenseHead(Protocol):
    """What an update must know of a head."""

    def q_values(self, output: Array) -> Array:
        """Return the expected return of each action, `[rows, actions]`."""

    def target(self, next_value: Array, reward: Array, discount: Array) -> Array:
        """Return what the value of the action taken should have been, as `Head.target` does."""

    def losses(self, value: Array, target: Array) -> Losses:
        """Return what `Head.loss` returns, and the derivative of the losses."""


class DenseScalar:
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


class DenseCategorical:
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


class DenseQuantile:
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
