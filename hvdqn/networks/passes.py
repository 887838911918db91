"""Compute the forward and backward passes of a Q-network by autograd, and choose the passes that the actor takes.

`hvdqn/networks/dense.py` has the passes of small networks without autograd.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from hvdqn.networks.dense import DenseNetwork
from hvdqn.networks.network import QNetwork
from hvdqn.networks.sharded import Group


class Passes(Protocol):
    """Computes the Q-values from which actions are chosen; call it in `torch.inference_mode`."""

    @property
    def pinned_inputs(self) -> bool:
        """Whether to keep observations in pinned host memory, from which they are copied to a GPU faster."""

    def q_values(self, observation: Tensor) -> Tensor:
        """Return the Q-values `[batch, *action_shape, actions]` for observations `[batch, ...]` of the environments."""


class AutogradPasses:
    """Computes the forward and backward passes of any network by autograd.

    Args:
        network: the Q-network, already on its device.
        autocast: whether to compute under bf16 autocast; the output stays in the parameters' dtype.
    """

    def __init__(self, network: QNetwork, autocast: bool = False) -> None:
        self.network, self.parameters = network, list(network.parameters())
        self.autocast: AbstractContextManager[object]
        device = self.parameters[0].device.type
        self.pinned_inputs = device == "cuda"
        self.autocast = torch.autocast(device, dtype=torch.bfloat16) if autocast else nullcontext()

    def output(self, observation: Tensor) -> Tensor:
        """Return the head's output for each action, `[batch, actions, ...]`."""
        with self.autocast:
            output: Tensor = self.network(observation)
        return output

    def q_values(self, observation: Tensor) -> Tensor:
        """Return the Q-values, `[batch, actions]`."""
        with self.autocast:
            return self.network.q_values(observation)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `output` returns, detached, and the same tensor with its autograd graph for `backward`."""
        with torch.enable_grad():
            output = self.output(observation)
        return output.detach(), output

    def backward(self, tape: Tensor, slope: Tensor) -> None:
        """Overwrite every parameter's `.grad` by backpropagation from the output.

        Args:
            tape: the output with its autograd graph, from `forward`.
            slope: gradient of the loss with respect to the output `[batch, actions, ...]`.
        """
        # `Tensor.backward` adds to `.grad`, so it would have to be zeroed first: two more passes over memory.
        gradients = torch.autograd.grad(tape, self.parameters, slope, materialize_grads=True)
        torch._foreach_copy_([p.grad for p in self.parameters if p.grad is not None], gradients)


class GroupPasses(AutogradPasses):
    """Passes of a network that a group of ranks holds between them; every method is collective in the group.

    Each rank gives its own observations and gets the outputs of those. In between every rank computes its part of the
    network for the rows of all of them.
    """

    def __init__(self, network: QNetwork, group: Group) -> None:
        super().__init__(network)
        self.group = group

    def output(self, observation: Tensor) -> Tensor:
        """Return the head's output, `[batch, actions, ...]`."""
        return self._own_rows(super().output(self.group.gather(observation)))

    def q_values(self, observation: Tensor) -> Tensor:
        """Return the Q-values, `[batch, actions]`."""
        return self._own_rows(super().q_values(self.group.gather(observation)))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same as `output`, and the output of all rows with its graph."""
        with torch.enable_grad():
            output = super().output(self.group.gather(observation))
        return self._own_rows(output.detach()), output

    def backward(self, tape: Tensor, slope: Tensor) -> None:
        """Overwrite every parameter's `.grad` by the sum of the gradients of all ranks' losses.

        Args:
            tape: from `forward`.
            slope: gradient of this rank's loss with respect to its own output.
        """
        super().backward(tape, self.group.gather(slope))

    def _own_rows(self, rows: Tensor) -> Tensor:
        return rows.chunk(self.group.size)[self.group.index]


def autograd_passes(network: QNetwork, autocast: bool = False) -> AutogradPasses:
    """Return the passes to learn with, by autograd."""
    if network.group is not None:
        return GroupPasses(network, network.group)
    return AutogradPasses(network, autocast)


def make_passes(network: QNetwork) -> Passes:
    """Return the fastest passes to act with, on the device of the network's parameters."""
    return DenseNetwork.of(network) or autograd_passes(network)
