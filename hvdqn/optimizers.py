"""Step a flat parameter tensor by Adam, RAdam, RMSProp or SGD.

`torch.optim` walks lists of parameters, runs hooks, and imports `torch._dynamo`, which takes seconds on every rank.
With one flat parameter tensor a step is a few operations, and a checkpoint holds a few tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class Optimizer(Protocol):
    """The interface of optimizers, which step a flat parameter tensor `[parameters]` in place."""

    def step(self, gradient: Tensor, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """Step the parameters along the gradient, in place, and update the optimizer's own tensors.

        Args:
            gradient: the flat gradient `[parameters]`.
            lr: learning rate; a tensor `[]` if a CUDA graph records the step.
            skip: float32 `[]`: 1 leaves parameters and moments unchanged, 0 takes the step. It is a tensor so that a
                GPU can decide without waiting for the host. None: take the step.
        """

    def moments(self) -> dict[str, Tensor]:
        """Return, by name, the tensors that the next step depends on: the optimizer's own, not copies."""


class Adam:
    """Steps parameters by Adam (Kingma and Ba 2015, algorithm 1), with the kernel of `torch.optim.Adam(fused=True)`.

    Args:
        parameters: the flat tensor to step in place `[parameters]`.
        eps: added to the square root of the second moment.
        betas: decay rates of the first and of the second moment.
    """

    def __init__(self, parameters: Tensor, eps: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.parameters, self.eps, self.betas = parameters, eps, betas
        self.exp_avg = torch.zeros_like(parameters)
        self.exp_avg_sq = torch.zeros_like(parameters)
        self.steps = torch.zeros((), dtype=torch.float32, device=parameters.device)

    def step(self, gradient: Tensor, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """Take one step, or none if `skip` is 1; see `Optimizer.step`."""
        self.steps += 1 if skip is None else 1 - skip
        torch._fused_adam_(
            [self.parameters],
            [gradient],
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
        """Return both moments and the number of steps: the optimizer's own tensors, not copies."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.steps}


class RAdam(Adam):
    """Steps parameters by rectified Adam (Liu et al. 2020, algorithm 2): the first steps are small, as in a warm-up.

    Adam's second moment is a poor estimate after few steps. RAdam takes Adam's steps times r_t <= 1, and leaves the
    second moment out of the first steps, those with rho_t <= 5:

        rho_t = rho - 2 t beta2^t / (1 - beta2^t),   rho = 2 / (1 - beta2) - 1
        r_t = sqrt((rho_t - 4) (rho_t - 2) rho / ((rho - 4) (rho - 2) rho_t))
    """

    def step(self, gradient: Tensor, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """Take one step, or none if `skip` is 1; see `Optimizer.step`."""
        beta1, beta2 = self.betas
        # A number on the host, or a tensor for a CUDA graph. Float32 would lose rho_t, a difference of large numbers.
        t: Any = 1 + (self.steps.item() if skip is None else self.steps.double())
        rho = 2 / (1 - beta2) - 1
        rho_t = rho - 2 * t * beta2**t / (1 - beta2**t)
        r_t = abs((rho_t - 4) * (rho_t - 2) * rho / ((rho - 4) * (rho - 2) * rho_t)) ** 0.5
        adaptive, plain = lr * r_t * (rho_t > 5), lr * (rho_t <= 5) / (1 - beta1**t)
        if skip is None:
            super().step(gradient, adaptive)
        else:
            super().step(gradient, adaptive.float(), skip)
            plain = plain * (1 - skip)
        if skip is not None or plain:
            self.parameters.add_(self.exp_avg * -plain)


class RMSProp:
    """Steps parameters by centred RMSProp (Graves 2013, eqs. 38-41), as `torch.optim.RMSprop(centered=True)` does.

    Args:
        parameters: the flat tensor to step in place `[parameters]`.
        eps: added to the standard deviation of the gradient.
        alpha: decay rate of both running averages; 0.95 in Mnih et al. 2015.
    """

    def __init__(self, parameters: Tensor, eps: float, alpha: float = 0.95) -> None:
        self.parameters, self.eps, self.alpha = parameters, eps, alpha
        self.square_avg = torch.zeros_like(parameters)
        self.grad_avg = torch.zeros_like(parameters)

    def step(self, gradient: Tensor, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """Take one step, or none if `skip` is 1; see `Optimizer.step`."""
        with _kept_if(skip, self.parameters, self.square_avg, self.grad_avg):
            self.square_avg.mul_(self.alpha).addcmul_(gradient, gradient, value=1 - self.alpha)
            self.grad_avg.lerp_(gradient, 1 - self.alpha)
            variance = self.square_avg.addcmul(self.grad_avg, self.grad_avg, value=-1)
            # Rounding may leave the variance slightly below zero, which has no square root.
            self.parameters.addcdiv_(gradient * -lr, variance.clamp_(min=0).sqrt_().add_(self.eps))

    def moments(self) -> dict[str, Tensor]:
        """Return both running averages: the optimizer's own tensors, not copies."""
        return {"square_avg": self.square_avg, "grad_avg": self.grad_avg}


class SGD:
    """Steps parameters by stochastic gradient descent without momentum.

    Args:
        parameters: the flat tensor to step in place `[parameters]`.
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters

    def step(self, gradient: Tensor, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """Take one step, or none if `skip` is 1; see `Optimizer.step`."""
        with _kept_if(skip, self.parameters):
            self.parameters.add_(gradient * -lr)

    def moments(self) -> dict[str, Tensor]:
        """Return no tensors: a step of SGD without momentum depends on no earlier one."""
        return {}


@contextmanager
def _kept_if(skip: Tensor | None, *tensors: Tensor) -> Iterator[None]:
    """After the `with` block, restore the values that these tensors had before it, if `skip` is 1."""
    if skip is None:
        yield
        return
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        torch.where(skip.bool(), old, tensor, out=tensor)
