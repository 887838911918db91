"""The Q-network: a torso and a head."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvdqn.config import NetworkConfig
from hvdqn.networks.heads import Head, make_head
from hvdqn.networks.sharded import Group, Layout, Splitter, whole_network
from hvdqn.networks.torsos import make_torso


class QNetwork(nn.Module):
    """A torso and a head. Takes raw observations: see `scale_observation`.

    Args:
        torso: from observations to features.
        head: from features to outputs.
        group: the ranks that hold the network between them; None: this rank holds all of it.
    """

    def __init__(self, torso: nn.Module, head: Head, group: Group | None = None) -> None:
        super().__init__()
        self.torso = torso
        self.head = head
        self.group = group

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    @property
    def num_parameters(self) -> int:
        """The number of parameters; of a network that is split over ranks, those of all its parts."""
        if self.group is None:
            return sum(parameter.numel() for parameter in self.parameters())
        return Layout(self, self.group).full_numel

    def forward(self, observation: Tensor) -> Tensor:
        """Map raw observations `[batch, ...]` to the head's output `[batch, actions, ...]`."""
        scaled = scale_observation(observation, self.dtype)
        output: Tensor = self.head(self.torso(scaled))
        return output.to(scaled.dtype)  # under autocast too, the loss is not computed in bf16

    def q_values(self, observation: Tensor) -> Tensor:
        """Return the expected return of each action, `[batch, actions]`, from which actions are chosen."""
        scaled = scale_observation(observation, self.dtype)
        output = self.head.act(self.torso(scaled))
        return self.head.q_values(output.to(scaled.dtype))

    def whole(self, full: Tensor) -> QNetwork:
        """Return a copy that is not split; its parameters are views of a flat tensor, in the network's order."""
        whole = whole_network(self, full)
        whole.group = None
        return whole

    def target_copy(self) -> QNetwork:
        """Return the target network: a copy with parameters of its own, which need no gradients."""
        target = copy.deepcopy(self).requires_grad_(False)
        target.head.become_target()
        return target


def scale_observation(observation: Tensor, dtype: torch.dtype) -> Tensor:
    """Return raw observations as floats; uint8 is scaled to [0, 1]."""
    if observation.dtype == dtype:
        return observation
    scaled = observation.to(dtype)
    return scaled.div_(255) if observation.dtype == torch.uint8 else scaled


def make_network(
    config: NetworkConfig,
    loss: str,
    frame_shape: Sequence[int],
    frame_stack: int,
    is_image: bool,
    actions: int,
    group: Group | None = None,
) -> QNetwork:
    """Make the Q-network of a run.

    Args:
        config: torso, hidden layers and head.
        loss: of the TD error, for a scalar head.
        frame_shape: shape of a single observation, without stack.
        frame_stack: frames that are stacked to one input.
        is_image: whether observations are images.
        actions: number of actions.
        group: the ranks that hold the network between them; None: this rank holds all of it.

    Raises:
        UserError: the torso does not fit the observation.
    """
    splitter = Splitter(group, layers=len(config.hidden) + 1) if group else None
    torso, hidden = make_torso(config, frame_shape, frame_stack, is_image, splitter)
    return QNetwork(torso, make_head(config, loss, torso.features, hidden, actions, splitter), group)
