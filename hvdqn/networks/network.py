"""Build the Q-network of a run from a torso (observation to features) and a head (features to Q-values)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvdqn.config import NetworkConfig
from hvdqn.networks.decoupled import make_decoupled_head
from hvdqn.networks.heads import Head, make_head
from hvdqn.networks.torsos import make_torso


class QNetwork(nn.Module):
    """Maps observations to a prediction of each action's return, by a torso and a head.

    It takes observations as environments return them, and calls `scale_observation` itself.

    Args:
        torso: maps float observations `[batch, ...]` to features `[batch, features]`.
        head: maps features to an output for each action.
    """

    def __init__(self, torso: nn.Module, head: Head) -> None:
        super().__init__()
        self.torso = torso
        self.head = head

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    def forward(self, observation: Tensor) -> Tensor:
        """Map observations `[batch, ...]` to the head's output `[batch, actions, ...]`, for computing the loss."""
        scaled = scale_observation(observation, self.dtype)
        output: Tensor = self.head(self.torso(scaled))
        return output.to(scaled.dtype)  # under autocast the output is bf16, too coarse for the loss

    def q_values(self, observation: Tensor) -> Tensor:
        """Map observations `[batch, ...]` to the expected return of each action, `[batch, *action_shape, actions]`."""
        scaled = scale_observation(observation, self.dtype)
        output = self.head.act(self.torso(scaled))
        return self.head.q_values(output.to(scaled.dtype))

    def target_copy(self) -> QNetwork:
        """Return the target network: a copy with parameters of its own, which need no gradients."""
        target = copy.deepcopy(self).requires_grad_(False)
        target.head.become_target()
        return target


def scale_observation(observation: Tensor, dtype: torch.dtype) -> Tensor:
    """Return observations as floats of this dtype, in the same shape; divide uint8 by 255, so that it is in [0, 1]."""
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
    action_shape: tuple[int, ...] = (),
) -> QNetwork:
    """Create the Q-network of a run.

    Args:
        config: the settings of torso, hidden layers and head.
        loss: name of the loss of the TD error, in `losses.TD_LOSSES`; used by a scalar head only.
        frame_shape: shape of a single observation, without frame stack.
        frame_stack: number of frames that are stacked to one input.
        is_image: whether observations are images.
        actions: number of actions, in each dimension.
        action_shape: `()`, or `(dimensions,)` where an action has several.

    Raises:
        UserError: the torso does not fit the observation, or the head the actions.
    """
    torso, hidden = make_torso(config, frame_shape, frame_stack, is_image)
    if action_shape:
        head: Head = make_decoupled_head(config, loss, torso.features, hidden, actions, *action_shape)
    else:
        head = make_head(config, loss, torso.features, hidden, actions)
    return QNetwork(torso, head)
