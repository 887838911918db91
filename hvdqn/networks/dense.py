"""Fully connected networks as one piece, with their derivative written out.

A network of some ten thousand parameters takes longer to be kept book of than to be worked out: modules that call
modules, and autograd with a node for every operation, cost more than half of its update.

On the host NumPy multiplies the matrices. The MKL that torch brings leaves half of an AMD processor's vector units
idle: NumPy's OpenBLAS takes 13 to 15 us for a product of 128 x 120 x 84 where MKL takes 24 to 27 (one core of Zen 5).
All products are NumPy's, short ones too: with only the long ones, nothing was gained.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

# The learner looks itself whether what comes out is finite, and `np.errstate` takes as long as a small product.
warnings.filterwarnings("ignore", ".* encountered in matmul", RuntimeWarning, r"hvdqn\.networks\.dense")


class Dense:
    """Fully connected layers, each with ReLU or without, in a row.

    h_0 = x,   h_l = relu(W_l h_{l-1} + b_l)

    Args:
        layers: the linear ones, whose parameters it looks at and does not own.
        rectified: whether ReLU follows, of each.
        shape: of what is given for each row, where it is not flat.
    """

    def __init__(self, layers: Sequence[nn.Linear], rectified: Sequence[bool], shape: Sequence[int]) -> None:
        # A module's attributes are looked up slowly. Parameters stay the same objects when their data moves.
        self.layers = [
            (layer.weight, layer.bias, relu) for layer, relu in zip(layers, rectified, strict=True)
        ]
        self.shape = tuple(shape)
        self._addresses: list[int] = []
        self._weights: list[NDArray[Any]] = []

    @classmethod
    def of(cls, *modules: nn.Module) -> Dense | None:
        """These modules in a row, or None where anything else than such layers is among them."""
        layers: list[nn.Linear] = []
        rectified: list[bool] = []
        shape: tuple[int, ...] = ()
        for module in _leaves(modules):
            if type(module) is nn.Linear and module.bias is not None and not shape:
                layers.append(module)
                rectified.append(False)
            elif type(module) is nn.ReLU and layers and not rectified[-1]:
                rectified[-1] = True
            elif type(module) is nn.Unflatten and not shape:
                shape = tuple(module.unflattened_size)
            elif type(module) is not nn.Flatten or layers:
                return None
        return cls(layers, rectified, shape) if layers else None

    def __call__(self, inputs: Tensor) -> Tensor:
        """`[rows, ...]` to `[rows, *shape]`. With or without autograd, in bf16 if that is on."""
        if inputs.is_cpu and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")):
            return self.activations(inputs)[-1]
        h = inputs.flatten(1)
        for weight, bias, relu in self.layers:
            h = functional.linear(h, weight, bias)
            if relu:
                h.relu_()
        return h.view(-1, *self.shape) if self.shape else h

    def activations(self, inputs: Tensor) -> list[Tensor]:
        """What enters each layer, `[rows, units]`, and last of all what it gives, `[rows, *shape]`.

        On the host, with autograd off.
        """
        h = inputs if inputs.ndim == 2 else inputs.flatten(1)
        found = [h]
        for weights, (_, bias, relu) in zip(self.weights(), self.layers, strict=True):
            h = torch.from_numpy(np.matmul(h.numpy(), weights.T)).add_(bias)
            if relu:
                h.relu_()
            found.append(h)
        if self.shape:
            found[-1] = h.view(-1, *self.shape)
        return found

    def weights(self) -> list[NDArray[Any]]:
        """The weights of each layer as NumPy sees them, `[outputs, inputs]`."""
        addresses = [weight.data_ptr() for weight, _, _ in self.layers]
        if addresses != self._addresses:
            self._addresses = addresses
            self._weights = [weight.detach().numpy() for weight, _, _ in self.layers]
        return self._weights

    def backward(self, activations: Sequence[Tensor], slope: Tensor) -> None:
        """Leave in every parameter's `.grad` what autograd would add to it (Rumelhart et al. 1986).

            d_L = dloss/dh_L,   d_l' = d_l where h_l > 0 else 0,
            dloss/dW_l = d_l'^T h_{l-1},   dloss/db_l = sum over rows of d_l',   d_{l-1} = d_l' W_l

        On the host, with autograd off.

        Args:
            activations: what `activations` gave.
            slope: of the loss, with regard to the last of them `[rows, *shape]`.
        """
        slope = slope.flatten(1) if self.shape else slope
        weights = self.weights()
        for index in range(len(self.layers) - 1, -1, -1):
            weight, bias, relu = self.layers[index]
            if relu:
                slope = slope * activations[index + 1].sign()  # what ReLU gives is never negative
            assert weight.grad is not None, "where the gradient is to be left"
            slopes = slope.numpy()
            np.matmul(slopes.T, activations[index].numpy(), out=weight.grad.numpy())
            torch.sum(slope, 0, out=bias.grad)
            if index:
                slope = torch.from_numpy(np.matmul(slopes, weights[index]))


def _leaves(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        if isinstance(module, nn.Sequential):
            yield from _leaves(list(module))
        else:
            yield module
