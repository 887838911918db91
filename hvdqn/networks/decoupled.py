"""The head for actions of several dimensions: decoupled Q-values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvdqn.networks.heads import Head
from hvdqn.networks.layers import Dueling


class DecoupledHead(Head):
    """Values of each action dimension by itself; the value of an action is their mean.

        Q(s, a) = 1/D sum_d Q_d(s, a_d)

    The best action is the best one in each dimension (BDQ, Tavakoli et al. 2018; DecQN, Seyde et al. 2023, eq. 2). The
    mean of quantiles is that of returns which rise and fall together. Outputs are `[batch, D * actions, ...]`.

    Args:
        inner: a head with the actions of all dimensions in a row.
        dimensions: D.
    """

    def __init__(self, inner: Head, dimensions: int) -> None:
        super().__init__()
        self.inner, self.dimensions = inner, dimensions
        self.is_streams = inner.is_streams and not isinstance(inner.streams, Dueling)

    @property
    def streams(self) -> nn.Module:  # type: ignore[override]
        """The layers of the inner head."""
        return self.inner.streams

    def forward(self, features: Tensor) -> Tensor:
        """Map `[batch, features]` to the output of the inner head."""
        output: Tensor = self.inner(features)
        return output

    def act(self, features: Tensor) -> Tensor:
        """Return what the inner head does."""
        return self.inner.act(features)

    def become_target(self) -> None:
        """Change what the inner head does differently in a target network."""
        self.inner.become_target()

    def q_values(self, output: Tensor) -> Tensor:
        """Return the values of each dimension's actions, `[batch, D, actions]`."""
        return torch.unflatten(self.inner.q_values(output), 1, (self.dimensions, -1))

    def next_values(self, output: Tensor) -> Tensor:
        """Return what targets bootstrap from, `[batch, D * actions, ...]`, as the inner head does."""
        return self.inner.next_values(output)

    def target(self, next_value: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """Return the target of the mean over dimensions, as the inner head does."""
        return self.inner.target(next_value, reward, discount)

    def chosen(self, output: Tensor, action: Tensor) -> Tensor:
        """Return the output for the actions taken, as the inner head does."""
        return self.inner.chosen(output, action)

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of the mean over dimensions, as the inner head does."""
        return self.inner.loss(output, target)
