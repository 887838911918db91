"""Torsos and heads: from an observation to what is known of each action's value."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hvdqn.config import NetworkConfig
from hvdqn.networks.dense import Dense
from hvdqn.networks.heads import Head, make_head
from hvdqn.networks.torsos import Images, make_torso

PullBack = Callable[[Tensor], None]

__all__ = ["Head", "Images", "QNetwork", "make_network"]


class QNetwork(nn.Module):
    """A torso and a head. Takes raw observations: integers and booleans become floats, uint8 is scaled to [0, 1]."""

    def __init__(self, torso: nn.Module, head: Head) -> None:
        super().__init__()
        self.torso = torso
        self.head = head
        self._own = (
            list(self.parameters()),
        )  # looked up once; in a tuple, or they would be registered twice
        self.dense = Dense.of(torso, head.streams) if head.is_streams else None
        """All of the network, where that is fully connected layers and nothing else."""

    def forward(self, observation: Tensor) -> Tensor:
        """Raw observation `[batch, ...]` to the head's output `[batch, actions, ...]`, which losses are about."""
        scaled = self._scaled(observation)
        dense = self._dense_for(scaled)
        output: Tensor = dense(scaled) if dense else self.head(self.torso(scaled))
        return output.to(scaled.dtype)  # no loss is worked out in bf16

    def q_values(self, observation: Tensor) -> Tensor:
        """Expected return of each action, `[batch, actions]`, as actions are chosen by it."""
        scaled = self._scaled(observation)
        dense = self._dense_for(scaled)
        output = dense(scaled) if dense else self.head.act(self.torso(scaled))
        return self.head.q_values(output.to(scaled.dtype))

    def by_autograd(self, observation: Tensor) -> tuple[Tensor, PullBack]:
        """The output, and what overwrites every parameter's `.grad`, given the slope of the loss at the output."""
        (parameters,) = self._own
        with torch.enable_grad():
            output = self(observation)

        def pull_back(slope: Tensor) -> None:
            # Added to `.grad` by autograd itself, they would have to be zero before: two more passes over them.
            gradients = torch.autograd.grad(output, parameters, slope, materialize_grads=True)
            torch._foreach_copy_([p.grad for p in parameters if p.grad is not None], gradients)

        return output.detach(), pull_back

    def by_hand(self, observation: Tensor) -> tuple[Tensor, PullBack]:
        """As `by_autograd`, for a network that is `dense`; on the host, to be called in inference mode."""
        assert self.dense is not None
        output, tapes = self.dense.forward(self._scaled(observation))
        return output, partial(self.dense.backward, tapes)

    def target_copy(self) -> QNetwork:
        """A copy with parameters of its own, which wants no gradients: the target network."""
        target = copy.deepcopy(self).requires_grad_(False)
        target.head.becomes_target()
        return target

    def _dense_for(self, scaled: Tensor) -> Dense | None:
        if not scaled.is_cpu or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        return self.dense

    def _scaled(self, observation: Tensor) -> Tensor:
        dtype = self._own[0][0].dtype
        if observation.dtype == dtype:
            return observation
        scaled = observation.to(dtype)
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
