"""Heads: what is known of each action's return, and how wrong it was. All answer the same questions.

Outputs are tensors `[batch, actions, ...]`, so that whoever picks an action's entry, or averages over actions, need not
know the head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdqn.config import NetworkConfig
from hvdqn.losses import (
    categorical_loss,
    categorical_projection,
    huber_loss,
    huber_slope,
    mse_loss,
    pairwise_td_error,
    q_learning_target,
    quantile_huber_loss,
    select,
)
from hvdqn.networks.layers import make_streams

Scalars = Callable[[Tensor], Tensor]
# Each with its derivative.
LOSSES: dict[str, tuple[Scalars, Scalars]] = {
    "huber": (huber_loss, huber_slope),
    "mse": (mse_loss, torch.clone),
}


class Head(nn.Module, ABC):
    """Answers for its network: what are the q-values, what should they have been, how wrong is a sample.

    Attributes:
        streams: from features to outputs.
        is_streams: whether `forward` and `act` are `streams` and nothing else.
    """

    streams: nn.Module
    is_streams = True

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """`[batch, features]` to the output that losses are about, `[batch, actions, ...]`."""

    @abstractmethod
    def q_values(self, output: Tensor) -> Tensor:
        """Expected return of each action, `[batch, actions]`, from an output."""

    def best(self, output: Tensor) -> Tensor:
        """The entry of each row's best action, `[batch, ...]`."""
        return select(output, self.q_values(output).argmax(dim=1))

    @abstractmethod
    def goal(self, next_output: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """What an output should have been, `[batch, ...]`.

        Args:
            next_output: the target network's for the next observation, of the action taken there, `[batch, ...]`.
            reward: `[batch]`.
            discount: `[batch]`, 0 after a termination.
        """

    @abstractmethod
    def loss(self, output: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each sample, and how wrong it was, without gradient: its priority in replay. Both `[batch]`.

        Args:
            output: of the action that was taken, `[batch, ...]`.
            goal: what `goal` gave.
        """

    def slope(
        self, output: Tensor, action: Tensor, goal: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and its derivative.

        Args:
            output: `[batch, actions, ...]`.
            action: that was taken `[batch]`.
            goal: what `goal` gave.
            weight: of each sample `[batch]`.

        Returns:
            The weighted mean of the losses `[]`, the priorities `[batch]`, and the slope of the first with regard to
            the output, as `output`.
        """
        with torch.inference_mode(False), torch.enable_grad():
            # Copies, for what was made in inference mode cannot be kept for a derivative.
            output, goal = output.clone().requires_grad_(), goal.clone()
            losses, priorities = self.loss(select(output, action), goal)
            loss = torch.dot(weight, losses) / len(losses)
            (slope,) = torch.autograd.grad(loss, output)
        return loss.detach(), priorities, slope

    def act(self, features: Tensor) -> Tensor:
        """The output by which actions are chosen."""
        output: Tensor = self(features)
        return output

    def becomes_target(self) -> None:
        """From now on this head belongs to a target network."""


class ScalarHead(Head):
    """One expected return per action (Mnih et al. 2015).

    Args:
        streams: with one output an action.
        loss: of each TD error, by name.
    """

    def __init__(self, streams: nn.Module, loss: str) -> None:
        super().__init__()
        self.streams = streams
        self.loss_of, self.slope_of = LOSSES[loss]

    def forward(self, features: Tensor) -> Tensor:
        """`[batch, features]` to q `[batch, actions]`."""
        q: Tensor = self.streams(features)
        return q

    def q_values(self, output: Tensor) -> Tensor:
        """The output itself."""
        return output

    def best(self, output: Tensor) -> Tensor:
        """The largest of each row, `[batch]`."""
        return output.amax(dim=1)

    def goal(self, next_output: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """The backed-up return, `[batch]`."""
        return q_learning_target(reward, discount, next_output)

    def loss(self, output: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """The priority is the absolute TD error."""
        td_error = goal - output
        return self.loss_of(td_error), td_error.detach().abs()

    def slope(
        self, output: Tensor, action: Tensor, goal: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As every head's, without autograd: of so short a formula the derivative is another."""
        index = action.unsqueeze(1)
        error = output.gather(1, index).squeeze(1).sub_(goal)
        slopes = self.slope_of(error)
        weighted = weight.mul(1.0 / len(action)).mul_(slopes)
        # Huber's loss and the squared one alike are slope x (error - slope / 2).
        loss = torch.dot(weighted, error.sub(slopes, alpha=0.5))
        slope = torch.zeros_like(output).scatter_(1, index, weighted.unsqueeze(1))
        return loss, error.abs_(), slope


class CategoricalHead(Head):
    """Probabilities of fixed returns: C51 (Bellemare et al. 2017).

    Args:
        streams: with as many outputs an action as there are atoms.
        support: the returns, evenly spaced `[atoms]`.
    """

    support: Tensor

    def __init__(self, streams: nn.Module, support: Tensor) -> None:
        super().__init__()
        self.streams = streams
        self.register_buffer("support", support)

    def forward(self, features: Tensor) -> Tensor:
        """`[batch, features]` to logits `[batch, actions, atoms]`."""
        logits: Tensor = self.streams(features)
        return logits

    def q_values(self, output: Tensor) -> Tensor:
        """The mean of each action's distribution, `[batch, actions]`."""
        return (functional.softmax(output, dim=2) * self.support).sum(
            dim=2
        )  # a product would be taken in bf16

    def goal(self, next_output: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """The backed-up distribution, `[batch, atoms]`."""
        probabilities = functional.softmax(next_output, dim=1)
        goal = categorical_projection(probabilities, self.support, reward, discount)
        return goal + 0.0 * reward[:, None]  # an infinite one lies on the last atom, and would be learned

    def loss(self, output: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """The priority is the loss itself (Hessel et al. 2018, section "The integrated agent")."""
        losses = categorical_loss(output, goal)
        return losses, losses.detach()


class QuantileHead(Head):
    """Quantiles at fixed fractions: QR-DQN (Dabney et al. 2018a).

    Args:
        streams: with as many outputs an action as there are quantiles.
        quantiles: how many, each standing for an equal part of the distribution.
    """

    fraction: Tensor

    def __init__(self, streams: nn.Module, quantiles: int) -> None:
        super().__init__()
        self.streams = streams
        self.register_buffer("fraction", midpoints(quantiles))

    def forward(self, features: Tensor) -> Tensor:
        """`[batch, features]` to quantiles `[batch, actions, quantiles]`."""
        quantiles: Tensor = self.streams(features)
        return quantiles

    def q_values(self, output: Tensor) -> Tensor:
        """The mean of each action's quantiles, `[batch, actions]`."""
        return output.mean(dim=2)

    def goal(self, next_output: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """The backed-up quantiles, `[batch, quantiles]`."""
        return q_learning_target(reward[:, None], discount[:, None], next_output)

    def loss(self, output: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """The priority is the mean absolute TD error over all pairs of quantiles."""
        return _quantile_loss(output, self.fraction, goal)


class ImplicitQuantileHead(Head):
    """Quantiles at fractions drawn anew for each sample: IQN (Dabney et al. 2018b).

    Where actions are chosen, evenly spaced fractions stand in for the paper's K draws: the same mean, unscattered.

    Args:
        streams: with one output an action.
        features: width of what comes in.
        config: numbers of fractions: N of the online network, N' of the target, K to act on; width of the embedding.
    """

    is_streams = False
    order: Tensor
    evenly: Tensor

    def __init__(self, streams: nn.Module, features: int, config: NetworkConfig) -> None:
        super().__init__()
        self.draws, self.target_draws = config.iqn_samples, config.iqn_target_samples
        self.embedding = nn.Linear(config.iqn_embedding, features)
        self.streams = streams
        self.register_buffer("order", math.pi * torch.arange(config.iqn_embedding, dtype=torch.float32))
        self.register_buffer("evenly", midpoints(config.iqn_policy_samples)[None])

    def forward(self, features: Tensor) -> Tensor:
        """`[batch, features]` to quantiles and the fractions they are of, `[batch, actions, draws, 2]`."""
        drawn = torch.rand(len(features), self.draws, dtype=self.order.dtype, device=self.order.device)
        return self._at(features, drawn)

    def act(self, features: Tensor) -> Tensor:
        """As `forward`, at evenly spaced fractions."""
        return self._at(features, self.evenly)

    def becomes_target(self) -> None:
        """From now on it draws N' fractions."""
        self.draws = self.target_draws

    def q_values(self, output: Tensor) -> Tensor:
        """The mean of each action's quantiles, `[batch, actions]`."""
        return output[..., 0].mean(dim=2)

    def goal(self, next_output: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """The backed-up quantiles, `[batch, draws]`."""
        return q_learning_target(reward[:, None], discount[:, None], next_output[..., 0])

    def loss(self, output: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """The priority is the mean absolute TD error over all pairs of quantiles."""
        return _quantile_loss(output[..., 0], output[..., 1], goal)

    def _at(self, features: Tensor, fraction: Tensor) -> Tensor:
        """The output at fractions `[batch, draws]`, or `[1, draws]` for all alike (eq. 4).

        z(s, a) = f(psi(s) * phi(fraction))_a,   phi = ReLU(W cos(pi i fraction) + b),  i = 0, 1, ...
        """
        phi = functional.relu(self.embedding(torch.cos(fraction[..., None] * self.order)))
        joined = features[:, None, :] * phi
        rows: Tensor = self.streams(joined.flatten(0, 1))
        quantiles = rows.view(*joined.shape[:2], -1).transpose(1, 2).to(fraction.dtype)
        return torch.stack([quantiles, fraction[:, None, :].expand_as(quantiles)], dim=3)


def midpoints(count: int) -> Tensor:
    """The fractions (2 i + 1) / (2 count) that stand for `count` equal parts of a distribution, `[count]`."""
    return (torch.arange(count) + 0.5) / count


def _quantile_loss(prediction: Tensor, fraction: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    td_error = pairwise_td_error(prediction, goal)
    return quantile_huber_loss(td_error, fraction), td_error.detach().abs().mean(dim=(1, 2))


def make_head(config: NetworkConfig, loss: str, features: int, hidden: Sequence[int], actions: int) -> Head:
    """The head that `--head` names.

    Args:
        config: which head, and how its layers are made.
        loss: of a scalar head.
        features: width of what the torso gives.
        hidden: units of the head's own hidden layers.
        actions: number of actions.
    """

    def streams(*outputs: int) -> nn.Module:
        return make_streams(features, hidden, actions, outputs, config)

    if config.head == "c51":
        return CategoricalHead(
            streams(config.atoms), torch.linspace(config.v_min, config.v_max, config.atoms)
        )
    if config.head == "qr":
        return QuantileHead(streams(config.quantiles), config.quantiles)
    if config.head == "iqn":
        return ImplicitQuantileHead(streams(), features, config)
    return ScalarHead(streams(), loss)
