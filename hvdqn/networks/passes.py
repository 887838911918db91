"""Forward and backward passes of a Q-network, by autograd or by hand.

The learner and the actor compute through this interface and do not know which implementation answers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from hvdqn.networks.dense import DensePasses
from hvdqn.networks.network import QNetwork


class Passes(Protocol):
    """Computes a network's outputs and gradients. Observations are raw, `[batch, ...]`, on the network's device."""

    @property
    def no_grad(self) -> Callable[[], AbstractContextManager[None]]:
        """The context that the caller computes in; `forward` records what `backward` needs all the same."""

    @property
    def pinned_inputs(self) -> bool:
        """Whether inputs in pinned host memory reach the network's device faster."""

    def output(self, observation: Tensor) -> Tensor:
        """Return the head's output, `[batch, actions, ...]`."""

    def q_values(self, observation: Tensor) -> Tensor:
        """Return the Q-values, `[batch, *action_shape, actions]`."""

    def forward(self, observation: Tensor) -> tuple[Tensor, Any]:
        """Return the same as `output`, and a tape for `backward`."""

    def backward(self, tape: Any, slope: Tensor) -> None:
        """Overwrite every parameter's `.grad`.

        Args:
            tape: from `forward`.
            slope: gradient of the loss with respect to the output.
        """


class AutogradPasses:
    """Passes of any network, by autograd.

    Args:
        network: on its device.
        autocast: compute in bf16 what autocast can; the output stays in the parameters' dtype.
    """

    no_grad = torch.no_grad

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


def make_passes(network: QNetwork, autocast: bool = False) -> Passes:
    """Return the fastest passes that this network can use on the device of its parameters."""
    on_cpu = next(network.parameters()).device.type == "cpu"
    # Autocast would cast weights to bf16, which the passes by hand do not do.
    by_hand = DensePasses.of(network) if on_cpu and not autocast else None
    return by_hand or AutogradPasses(network, autocast)
