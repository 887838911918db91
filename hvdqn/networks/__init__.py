"""Torsos and heads: from an observation to what is known of each action's value."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvdqn.config import NetworkConfig
from hvdqn.networks.heads import Head, make_head
from hvdqn.networks.torsos import Images, make_torso

__all__ = ["Head", "Images", "QNetwork", "make_network"]


class QNetwork(nn.Module):
    """A torso and a head. Takes raw observations: integers and booleans become floats, uint8 is scaled to [0, 1]."""

    def __init__(self, torso: nn.Module, head: Head) -> None:
        super().__init__()
        self.torso = torso
        self.head = head
        self._like = [
            next(self.parameters())
        ]  # of the network's dtype; in a list, or it would be registered twice

    def forward(self, observation: Tensor) -> Tensor:
        """Raw observation `[batch, ...]` to the head's output `[batch, actions, ...]`, which losses are about."""
        scaled = self._scaled(observation)
        output: Tensor = self.head(self.torso(scaled))
        return output.to(scaled.dtype)  # no loss is worked out in bf16

    def q_values(self, observation: Tensor) -> Tensor:
        """Expected return of each action, `[batch, actions]`, as actions are chosen by it."""
        scaled = self._scaled(observation)
        return self.head.q_values(self.head.act(self.torso(scaled)).to(scaled.dtype))

    def target_copy(self) -> QNetwork:
        """A copy with parameters of its own, which wants no gradients: the target network."""
        target = copy.deepcopy(self).requires_grad_(False)
        target.head.becomes_target()
        return target

    def _scaled(self, observation: Tensor) -> Tensor:
        scaled = observation.to(self._like[0].dtype)
        # In place, for of bytes it is a copy.
        return scaled.div_(255) if observation.dtype == torch.uint8 else scaled


def make_network(
    config: NetworkConfig,
    loss: str,
    frame_shape: Sequence[int],
    frame_stack: int,
    is_image: bool,
    actions: int,
) -> QNetwork:
    """The Q-network of a run.

    Raises:
        UserError: the torso does not fit the observation.
    """
    torso, hidden = make_torso(config, frame_shape, frame_stack, is_image)
    return QNetwork(torso, make_head(config, loss, torso.features, hidden, actions))
