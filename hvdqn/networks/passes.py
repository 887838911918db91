"""Forward and backward passes of a Q-network by autograd, and which passes act."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from hvdqn.networks.dense import DenseNetwork
from hvdqn.networks.network import QNetwork


class Passes(Protocol):
    """Computes the Q-values that actions are chosen from."""

    @property
    def pinned_inputs(self) -> bool:
        """Whether inputs in pinned host memory reach the network's device faster."""

    def q_values(self, observation: Tensor) -> Tensor:
        """Return the Q-values `[batch, actions]` of raw observations `[batch, ...]` on the network's device."""


class AutogradPasses:
    """Passes of any network, by autograd.

    Args:
        network: on its device.
        autocast: compute in bf16 what autocast can; the output stays in the parameters' dtype.
    """

    def __init__(self, network: QNetwork, autocast: bool = False) -> None:
        self.network, self.parameters = network, list(network.parameters())
        self.autocast: AbstractContextManager[object]
        device = self.parameters[0].device.type
        self.pinned_inputs = device == "cuda"
        self.autocast = torch.autocast(device, dtype=torch.bfloat16) if autocast else nullcontext()

    def output(self, observation: Tensor) -> Tensor:
        """Return the head's output, `[batch, actions, ...]`."""
        with self.autocast:
            output: Tensor = self.network(observation)
        return output

    def q_values(self, observation: Tensor) -> Tensor:
        """Return the Q-values, `[batch, actions]`."""
        with self.autocast:
            return self.network.q_values(observation)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same as `output`, and that output with its graph."""
        with torch.enable_grad():
            output = self.output(observation)
        return output.detach(), output

    def backward(self, tape: Tensor, slope: Tensor) -> None:
        """Overwrite every parameter's `.grad`, given the gradient of the loss with respect to the output."""
        # `Tensor.backward` would add to `.grad`, which then had to be set to zero before: two more passes over memory.
        gradients = torch.autograd.grad(tape, self.parameters, slope, materialize_grads=True)
        torch._foreach_copy_([p.grad for p in self.parameters if p.grad is not None], gradients)


def make_passes(network: QNetwork) -> Passes:
    """Return the fastest passes to act with, on the device of the network's parameters."""
    return DenseNetwork.of(network) or AutogradPasses(network)
