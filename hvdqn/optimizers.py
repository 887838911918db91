"""Optimizers over one flat tensor.

`torch.optim` walks lists of parameters, runs hooks, and its constructors import `torch._dynamo`, some two seconds a
rank. With one flat parameter tensor a step is a few operations, and what a checkpoint keeps is a few tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Optimizer(Protocol):
    """Steps a flat parameter tensor along a flat gradient, both `[parameters]`."""

    def step(self, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """Take one step.

        Args:
            lr: learning rate; a tensor `[]` where the step is recorded in a graph.
            skip: float32 `[]`, 1 where everything is to stay as it is, else 0: decided without asking the host.
        """

    def moments(self) -> dict[str, Tensor]:
        """The tensors that it carries from step to step, by name: not copies."""


class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1), as in `torch.optim.Adam(fused=True)`: the same kernel.

    Args:
        parameters: stepped in place.
        gradient: read at every step.
        eps: added to the square root of the second moment.
        betas: decay of the first and of the second moment.
    """

    def __init__(
        self, parameters: Tensor, gradient: Tensor, eps: float, betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        self.parameters, self.gradient, self.eps, self.betas = parameters, gradient, eps, betas
        self.exp_avg = torch.zeros_like(parameters)
        self.exp_avg_sq = torch.zeros_like(parameters)
        self.steps = torch.zeros((), dtype=torch.float32, device=parameters.device)

    def step(self, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """Take one step, unless it is to be skipped."""
        self.steps += 1 if skip is None else 1 - skip
        torch._fused_adam_(
            [self.parameters],
            [self.gradient],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.steps],
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            found_inf=skip,
        )

    def moments(self) -> dict[str, Tensor]:
        """The tensors that it carries from step to step, by name: not copies."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.steps}


class RMSProp:
    """Centred RMSProp (Graves 2013, eqs. 38-41), as in `torch.optim.RMSprop(centered=True)`.

    Args:
        parameters: stepped in place.
        gradient: read at every step.
        eps: added to the standard deviation of the gradient.
        alpha: decay of both averages; 0.95 in Mnih et al. 2015.
    """

    def __init__(self, parameters: Tensor, gradient: Tensor, eps: float, alpha: float = 0.95) -> None:
        self.parameters, self.gradient, self.eps, self.alpha = parameters, gradient, eps, alpha
        self.square_avg = torch.zeros_like(parameters)
        self.grad_avg = torch.zeros_like(parameters)

    def step(self, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """Take one step, unless it is to be skipped."""
        gradient = self.gradient
        with _kept_if(skip, self.parameters, self.square_avg, self.grad_avg):
            self.square_avg.mul_(self.alpha).addcmul_(gradient, gradient, value=1 - self.alpha)
            self.grad_avg.lerp_(gradient, 1 - self.alpha)
            variance = self.square_avg.addcmul(self.grad_avg, self.grad_avg, value=-1)
            # Rounding may leave it below zero, where there is no root.
            self.parameters.addcdiv_(gradient * -lr, variance.clamp_(min=0).sqrt_().add_(self.eps))

    def moments(self) -> dict[str, Tensor]:
        """The tensors that it carries from step to step, by name: not copies."""
        return {"square_avg": self.square_avg, "grad_avg": self.grad_avg}


class SGD:
    """Gradient descent without momentum.

    Args:
        parameters: stepped in place.
        gradient: read at every step.
    """

    def __init__(self, parameters: Tensor, gradient: Tensor) -> None:
        self.parameters, self.gradient = parameters, gradient

    def step(self, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """Take one step, unless it is to be skipped."""
        with _kept_if(skip, self.parameters):
            self.parameters.add_(self.gradient * -lr)

    def moments(self) -> dict[str, Tensor]:
        """It carries none."""
        return {}


@contextmanager
def _kept_if(skip: Tensor | None, *tensors: Tensor) -> Iterator[None]:
    """Undo what happens to these tensors where `skip` is 1."""
    if skip is None:
        yield
        return
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        torch.where(skip.bool(), old, tensor, out=tensor)
