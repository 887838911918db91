"""Heads, the last part of a Q-network: they predict each action's return as a number, a distribution or quantiles.

All heads have the same methods. Outputs are tensors `[batch, actions, ...]`, so that code which picks one action's
entry, or averages over actions, works for every head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdqn.config import NetworkConfig
from hvdqn.losses import (
    TD_LOSSES,
    categorical_loss,
    categorical_projection,
    gaussian_histogram,
    mask_q,
    pairwise_td_error,
    q_learning_target,
    quantile_huber_loss,
    select,
    select_each,
)


class Head(nn.Module, ABC):
    """The last part of a Q-network, with the Q-values, the target and the loss that belong to its output.

    Attributes:
        streams: the layers from features to outputs.
        is_streams: whether `forward` and `act` do nothing but call `streams`; hand-written passes need that.
        dimensions: of an action.
    """

    streams: nn.Module
    is_streams = True
    dimensions = 1

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Map `[batch, features]` to the output that the loss is computed from, `[batch, actions, ...]`."""

    @abstractmethod
    def q_values(self, output: Tensor) -> Tensor:
        """Return the expected return of each action, `[batch, actions]`, from the head's output."""

    def next_values(self, output: Tensor) -> Tensor:
        """Return what targets bootstrap from, `[batch, actions, ...]`: by default the output itself.

        It may be averaged over actions, and over dimensions of actions.
        """
        return output

    def greedy(self, output: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the `next_values` of each row's best legal action, `[batch, ...]`.

        Args:
            output: `[batch, actions, ...]`.
            mask: legal actions, shaped as the Q-values; None: all are legal.
        """
        return select(self.next_values(output), mask_q(self.q_values(output), mask).argmax(dim=-1))

    @abstractmethod
    def target(self, next_value: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Return the learning target for the output of the action taken, `[batch, ...]`.

        Args:
            next_value: the target network's `next_values` for the next observation and the action chosen there
                `[batch, ...]`.
            reward: the (n-step) reward `[batch]`.
            discount: what the next value is multiplied by `[batch]`; 0 after a termination.
        """

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return each sample's loss, and its priority in replay, which is detached from the graph. Both `[batch]`.

        Args:
            output: what `chosen` returned for the action that was taken, `[batch, ...]`.
            target: what the method `target` returned, `[batch, ...]`.
        """

    def chosen(self, output: Tensor, action: Tensor) -> Tensor:
        """Return what `loss` compares with the target, `[batch, ...]`: the output for the actions taken.

        Args:
            output: `[batch, actions, ...]`.
            action: `[batch]`, or `[batch, dimensions]`.
        """
        return select(output, action)

    def loss_and_gradient(
        self, output: Tensor, action: Tensor, target: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of a minibatch, its priorities, and the loss's gradient with respect to the output.

        Args:
            output: the head's output `[batch, actions, ...]`.
            action: the actions taken `[batch]`.
            target: what the method `target` returned, `[batch, ...]`.
            weight: importance weight of each sample `[batch]`.

        Returns:
            The weighted mean of the losses `[]`, the priorities `[batch]`, and the gradient, shaped as the output.
        """
        with torch.inference_mode(False), torch.enable_grad():
            # Copies, because autograd refuses tensors that were made in inference mode.
            output, target = output.clone().requires_grad_(), target.clone()
            losses, priorities = self.loss(self.chosen(output, action), target)
            loss = torch.dot(weight, losses) / len(losses)
            (gradient,) = torch.autograd.grad(loss, output)
        return loss.detach(), priorities, gradient

    def act(self, features: Tensor) -> Tensor:
        """Map `[batch, features]` to the output that actions are chosen from, `[batch, actions, ...]`."""
        output: Tensor = self(features)
        return output

    def become_target(self) -> None:
        """Change what this head does differently in a target network; by default nothing.

        `QNetwork.target_copy` calls it once, on the copy.
        """


class ScalarHead(Head):
    """Predicts one expected return per action (Mnih et al. 2015).

    Args:
        streams: the layers from features to one Q-value per action.
        loss: name of the loss of the TD error, in `losses.TD_LOSSES`.
    """

    def __init__(self, streams: nn.Module, loss: str) -> None:
        super().__init__()
        self.streams = streams
        self.td_loss = TD_LOSSES[loss]

    def forward(self, features: Tensor) -> Tensor:
        """Map `[batch, features]` to Q-values `[batch, actions]`."""
        q: Tensor = self.streams(features)
        return q

    def q_values(self, output: Tensor) -> Tensor:
        """Return the output itself, which holds the Q-values `[batch, actions]`."""
        return output

    def greedy(self, output: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the largest Q-value of each row's legal actions, `[batch]`."""
        # Not the largest masked value: in a terminal state perhaps no action is legal, and -inf times 0 is NaN.
        return output.amax(dim=1) if mask is None else super().greedy(output, mask)

    def target(self, next_value: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Return the Q-learning target `reward + discount * next_value`, `[batch]`."""
        return q_learning_target(reward, discount, next_value)

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each sample's TD error, and its absolute TD error as priority. Both `[batch]`."""
        td_error = output - target
        return self.td_loss.value(td_error), td_error.detach().abs()

    def loss_and_gradient(
        self, output: Tensor, action: Tensor, target: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `Head.loss_and_gradient` returns, computed from the loss's derivative instead of by autograd."""
        index = action.unsqueeze(1)
        td_error = output.gather(1, index).squeeze(1).sub_(target)
        mean_weight = weight.mul(1.0 / len(action))
        loss = torch.dot(mean_weight, self.td_loss.value(td_error))
        slope = mean_weight.mul_(self.td_loss.derivative(td_error))
        gradient = torch.zeros_like(output).scatter_(1, index, slope.unsqueeze(1))
        return loss, td_error.abs_(), gradient


class CategoricalHead(Head):
    """Predicts the probabilities of fixed returns, called atoms: C51 (Bellemare et al. 2017).

    Args:
        streams: the layers from features to one logit per action and atom.
        support: the returns of the atoms, evenly spaced `[atoms]`.
    """

    support: Tensor

    def __init__(self, streams: nn.Module, support: Tensor) -> None:
        super().__init__()
        self.streams = streams
        self.register_buffer("support", support, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map `[batch, features]` to logits `[batch, actions, atoms]`."""
        logits: Tensor = self.streams(features)
        return logits

    def q_values(self, output: Tensor) -> Tensor:
        """Return the mean of each action's distribution, `[batch, actions]`."""
        # A product and a sum, because autocast would compute a matrix product in bf16.
        return (functional.softmax(output, dim=2) * self.support).sum(dim=2)

    def target(self, next_value: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Return the distribution of reward + discount * next return, projected onto the atoms, `[batch, atoms]`."""
        probabilities = functional.softmax(next_value, dim=1)
        target = categorical_projection(probabilities, self.support, reward, discount)
        # The projection clips an infinite reward to the last atom. This makes its target NaN, so the update is skipped.
        return target + 0.0 * reward[:, None]

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return each sample's KL divergence from the target, as loss and as priority (Hessel et al. 2018)."""
        losses = categorical_loss(output, target)
        return losses, losses.detach()


class HLGaussHead(CategoricalHead):
    """Predicts the probabilities of bins of returns, and learns expected returns: HL-Gauss (Imani and White 2018).

    The target of Q-learning, a number, is spread over the bins by a Gaussian and learned as a classification. The
    Q-value is the mean of the bins' centers (Farebrother et al. 2024, section 3.1).

    Args:
        streams: the layers from features to one logit per action and bin.
        edges: the edges of the bins, evenly spaced `[bins + 1]`.
        sigma: standard deviation of the Gaussian, in widths of a bin.
    """

    edges: Tensor

    def __init__(self, streams: nn.Module, edges: Tensor, sigma: float) -> None:
        super().__init__(streams, (edges[1:] + edges[:-1]) / 2)
        self.register_buffer("edges", edges, persistent=False)
        self.sigma = sigma * float(edges[1] - edges[0])

    def next_values(self, output: Tensor) -> Tensor:
        """Return the Q-values `[batch, actions]`: the mean of logits would be those of another distribution."""
        return self.q_values(output)

    def target(self, next_value: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Return the histogram of a Gaussian around reward + discount * next Q-value, `[batch, bins]`."""
        mean = q_learning_target(reward, discount, next_value)
        # The bins clip an infinite mean. This makes its target NaN, so the update is skipped.
        return gaussian_histogram(mean, self.edges, self.sigma) + 0.0 * mean[:, None]

    def chosen(self, output: Tensor, action: Tensor) -> Tensor:
        """Return logits `[batch, bins]`; with several dimensions, those of each, `[batch, dimensions, bins]`."""
        return select(output, action) if action.ndim == 1 else select_each(output, action)

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return each sample's KL divergence from the target, as loss and as priority, as C51 does.

        With several dimensions of an action, each learns the same target, as in BDQ (Tavakoli et al. 2018), and these
        are means over dimensions.
        """
        if output.ndim == 2:
            return super().loss(output, target)
        losses, _ = super().loss(output, target[:, None].expand_as(output))
        losses = losses.mean(dim=1)
        return losses, losses.detach()


class QuantileHead(Head):
    """Predicts quantiles of the return at fixed, evenly spaced probabilities: QR-DQN (Dabney et al. 2018a).

    Args:
        streams: the layers from features to one number per action and quantile.
        quantiles: number of quantiles; each stands for an equal part of the distribution.
    """

    fraction: Tensor

    def __init__(self, streams: nn.Module, quantiles: int) -> None:
        super().__init__()
        self.streams = streams
        self.register_buffer("fraction", midpoints(quantiles), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map `[batch, features]` to quantiles `[batch, actions, quantiles]`."""
        quantiles: Tensor = self.streams(features)
        return quantiles

    def q_values(self, output: Tensor) -> Tensor:
        """Return the mean of each action's quantiles, `[batch, actions]`."""
        return output.mean(dim=2)

    def target(self, next_value: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Return reward + discount * each quantile of the next return, `[batch, quantiles]`."""
        return q_learning_target(reward[:, None], discount[:, None], next_value)

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return each sample's quantile loss, and as priority the mean |TD error| over all pairs of quantiles."""
        return _quantile_loss(output, self.fraction, target)


class ImplicitQuantileHead(Head):
    """Predicts quantiles of the return at random fractions (probabilities in (0, 1)): IQN (Dabney et al. 2018b).

    Actions are chosen from quantiles at evenly spaced fractions, where the paper draws K at random. Their mean
    estimates the same value without random error.

    Args:
        streams: the layers from features times embedding to one quantile per action.
        features: number of input features.
        config: numbers of fractions (N online, N' target, K for acting) and the width of the embedding.
    """

    is_streams = False
    order: Tensor
    evenly: Tensor

    def __init__(self, streams: nn.Module, features: int, config: NetworkConfig) -> None:
        super().__init__()
        self.draws, self.target_draws = config.iqn_samples, config.iqn_target_samples
        self.embedding = nn.Linear(config.iqn_embedding, features)
        self.streams = streams
        order = math.pi * torch.arange(config.iqn_embedding, dtype=torch.float32)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("evenly", midpoints(config.iqn_policy_samples)[None], persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Draw random fractions, and return each quantile with its fraction, `[batch, actions, draws, 2]`."""
        drawn = torch.rand(len(features), self.draws, dtype=self.order.dtype, device=self.order.device)
        return self._at(features, drawn)

    def act(self, features: Tensor) -> Tensor:
        """Return each quantile at evenly spaced fractions with its fraction, `[batch, actions, K, 2]`."""
        return self._at(features, self.evenly)

    def become_target(self) -> None:
        """Draw as many fractions from now on as the paper's target network does (N')."""
        self.draws = self.target_draws

    def q_values(self, output: Tensor) -> Tensor:
        """Return the mean of each action's quantiles, `[batch, actions]`."""
        return output[..., 0].mean(dim=2)

    def target(self, next_value: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Return reward + discount * each quantile of the next return, `[batch, draws]`."""
        return q_learning_target(reward[:, None], discount[:, None], next_value[..., 0])

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return each sample's quantile loss, and as priority the mean |TD error| over all pairs of quantiles."""
        return _quantile_loss(output[..., 0], output[..., 1], target)

    def _at(self, features: Tensor, fraction: Tensor) -> Tensor:
        """Return each action's quantiles at these fractions, with the fractions, `[batch, actions, draws, 2]` (eq. 4).

        Fractions are `[batch, draws]`, or `[1, draws]` to use the same for the whole batch.

        z(s, a) = f(psi(s) * phi(fraction))_a,   phi = ReLU(W cos(pi i fraction) + b),  i = 0, 1, ...
        """
        phi = functional.relu(self.embedding(torch.cos(fraction[..., None] * self.order)))
        joined = features[:, None, :] * phi
        rows: Tensor = self.streams(joined.flatten(0, 1))
        quantiles = rows.view(*joined.shape[:2], -1).transpose(1, 2).to(fraction.dtype)
        return torch.stack([quantiles, fraction[:, None, :].expand_as(quantiles)], dim=3)


def midpoints(count: int) -> Tensor:
    """Return the midpoints (2 i + 1) / (2 count) of `count` equal parts of (0, 1), `[count]`."""
    return (torch.arange(count) + 0.5) / count


def _quantile_loss(prediction: Tensor, fraction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    td_error = pairwise_td_error(prediction, target)
    return quantile_huber_loss(td_error, fraction), td_error.detach().abs().mean(dim=(1, 2))
