"""Convolutions with spectral normalization (Miyato et al. 2018).

torch's own `spectral_norm` takes a power iteration in every forward pass in training mode. Actors take forward passes
too, and ranks not equally many, so that their networks would differ. The layers here change only in `power_iteration`,
which the learner calls once per update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# As many as torch's `spectral_norm` takes before the first update.
FIRST_ITERATIONS = 15


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight is divided by its largest singular value (Miyato et al. 2018, eq. 8).

        W / sigma,   sigma = u^T W v

    W is the weight as a matrix `[outputs, inputs x kernel]`. The unit vectors u `[outputs]` and v `[inputs x kernel]`
    approach its first singular vectors. They are buffers, so that they belong to checkpoints and policies.

    Args:
        *arguments: those of `nn.Conv2d`, as are the keywords. u begins with numbers from torch's generator.
    """

    u: Tensor
    v: Tensor

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        matrix = self.weight.detach().flatten(1)
        self.register_buffer("u", functional.normalize(torch.randn(len(matrix)), dim=0))
        self.register_buffer("v", torch.zeros(matrix.shape[1]))
        for _ in range(FIRST_ITERATIONS):
            self.power_iteration()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map planes `[batch, inputs, H, W]` to `[batch, outputs, H, W]`."""
        planes: Tensor = self._conv_forward(inputs, self.normalized_weight(), self.bias)
        return planes

    def normalized_weight(self) -> Tensor:
        """Return the weight divided by sigma. Its gradient flows through sigma too, with u and v constant (eq. 12)."""
        # Products and a sum, because autocast would compute matrix products in bf16.
        sigma = (self.u[:, None] * self.weight.flatten(1) * self.v).sum()
        return self.weight / sigma

    @torch.no_grad()
    def power_iteration(self, applied: Tensor | float = 1.0) -> None:
        """Move u and v toward the singular vectors of the present weight, by one iteration (algorithm 1).

        Args:
            applied: 0: leave u and v as they are, 1: move them. As a tensor `[]` it need not be read on the host.
        """
        matrix = self.weight.flatten(1)
        v = functional.normalize(matrix.T @ self.u, dim=0)
        u = functional.normalize(matrix @ v, dim=0)
        self.v.lerp_(v, applied)
        self.u.lerp_(u, applied)


def spectral_layers(network: nn.Module) -> list[SpectralConv2d]:
    """Return the layers of a network that have spectral normalization."""
    return [layer for layer in network.modules() if isinstance(layer, SpectralConv2d)]
