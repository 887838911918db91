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
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvdqn.networks.layers import Dueling

# The learner looks itself whether what comes out is finite, and `np.errstate` takes as long as a small product.
warnings.filterwarnings("ignore", ".* encountered in matmul", RuntimeWarning, r"hvdqn\.networks\.dense")

# Of each layer what enters it, what its weights make of that, its mean and 1 / deviation, and what it gives.
Tape: TypeAlias = list[tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]]


class Norm(NamedTuple):
    """What a `nn.LayerNorm` holds."""

    gain: Tensor
    bias: Tensor
    units: tuple[int, ...]
    eps: float


class Layer(NamedTuple):
    """A fully connected layer. A module's attributes are looked up slowly; parameters stay, when their data moves."""

    weight: Tensor
    bias: Tensor
    norm: Norm | None = None
    relu: bool = False


class Row:
    """Fully connected layers in a row, each normalised or not, with ReLU or without.

        z_l = W_l h_{l-1} + b_l,   h_l = relu(g_l (z_l - mean z_l) / deviation z_l + c_l)

    Args:
        layers: whose parameters it looks at and does not own.
        shape: of what is given for each row, where it is not flat.
    """

    def __init__(self, layers: Sequence[Layer], shape: Sequence[int] = ()) -> None:
        self.layers, self.shape = list(layers), tuple(shape)
        self._addresses: list[int] = []
        self._weights: list[NDArray[Any]] = []

    @classmethod
    def of(cls, *modules: nn.Module) -> Row | None:
        """These modules in a row, or None where anything else than such layers is among them."""
        layers: list[Layer] = []
        shape: tuple[int, ...] = ()
        for module in _leaves(modules):
            last = layers[-1] if layers else None
            if type(module) is nn.Linear and module.bias is not None and not shape:
                layers.append(Layer(module.weight, module.bias))
            elif _is_affine_norm(module) and last and last.norm is None and not last.relu:
                norm = Norm(module.weight, module.bias, module.normalized_shape, module.eps)
                layers[-1] = last._replace(norm=norm)
            elif type(module) is nn.ReLU and last and not last.relu:
                layers[-1] = last._replace(relu=True)
            elif type(module) is nn.Unflatten and last and not shape:
                shape = tuple(module.unflattened_size)
            elif type(module) is not nn.Flatten or layers:
                return None
        return cls(layers, shape)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tape]:
        """`[rows, units]` to `[rows, *shape]`, and what `backward` will want."""
        h, tape = inputs, []
        for weights, (_, bias, norm, relu) in zip(self.weights(), self.layers, strict=True):
            out = z = torch.from_numpy(np.matmul(h.numpy(), weights.T)).add_(bias)
            moments: tuple[Tensor, ...] = ()
            if norm:
                out, *found = torch.native_layer_norm(z, norm.units, norm.gain, norm.bias, norm.eps)
                moments = tuple(found)
            if relu:
                out.relu_()
            tape.append((h, z, moments, out))
            h = out
        return h.view(-1, *self.shape) if self.shape else h, tape

    def backward(self, tape: Tape, slope: Tensor, further: bool = False) -> Tensor:
        """Leave in every parameter's `.grad` what autograd would add to it (Rumelhart et al. 1986).

            dloss/dW_l = d_l^T h_{l-1},   dloss/db_l = sum over rows of d_l,   dloss/dh_{l-1} = d_l W_l

        where d_l = dloss/dz_l.

        Args:
            tape: of `forward`.
            slope: of the loss, with regard to what `forward` gave `[rows, *shape]`.
            further: whether the slope with regard to the inputs is wanted.

        Returns:
            That slope, if wanted `[rows, units]`.
        """
        slope = slope.flatten(1) if self.shape else slope
        weights = self.weights()
        for index in range(len(self.layers) - 1, -1, -1):
            weight, bias, norm, relu = self.layers[index]
            h, z, moments, out = tape[index]
            if relu:
                slope = slope * out.sign()  # what ReLU gives is never negative
            if norm:
                slope = _normalised_backward(slope, z, moments, norm)
            slopes = slope.numpy()
            np.matmul(slopes.T, h.numpy(), out=_grad(weight).numpy())
            torch.sum(slope, 0, out=_grad(bias))
            if index or further:
                slope = torch.from_numpy(np.matmul(slopes, weights[index]))
        return slope

    def weights(self) -> list[NDArray[Any]]:
        """The weights of each layer as NumPy sees them, `[outputs, inputs]`."""
        addresses = [layer.weight.data_ptr() for layer in self.layers]
        if addresses != self._addresses:
            self._addresses = addresses
            self._weights = [layer.weight.detach().numpy() for layer in self.layers]
        return self._weights


class Dense:
    """A network that is one row of layers, or a row that two others duel after. On the host, with autograd off.

    Args:
        trunk: what both have in common, or all there is.
        streams: for advantages and for the value, `layers.Dueling`.
    """

    def __init__(self, trunk: Row, streams: tuple[Row, Row] | None = None) -> None:
        self.trunk, self.streams = trunk, streams

    @classmethod
    def of(cls, *modules: nn.Module) -> Dense | None:
        """These modules in a row, or None where they are no such network."""
        leaves = list(_leaves(modules))
        last = leaves[-1] if leaves else None
        if _share_parameters(leaves) or any(map(_is_hooked, modules)):
            return None
        if last is None or type(last) is not Dueling:
            row = Row.of(*leaves)
            return cls(row) if row and row.layers else None
        trunk, advantage, value = Row.of(*leaves[:-1]), Row.of(last.advantage), Row.of(last.value)
        if not (trunk and advantage and value) or trunk.shape:
            return None
        return cls(trunk, (advantage, value))

    def __call__(self, inputs: Tensor) -> Tensor:
        """`[rows, ...]` to `[rows, *shape]`."""
        return self.forward(inputs)[0]

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Tape]]:
        """The same, and what `backward` will want."""
        h, tape = self.trunk.forward(inputs if inputs.ndim == 2 else inputs.flatten(1))
        if self.streams is None:
            return h, [tape]
        (advantage, of_advantage), (value, of_value) = (row.forward(h) for row in self.streams)
        return value + advantage - advantage.mean(dim=1, keepdim=True), [tape, of_advantage, of_value]

    def backward(self, tapes: Sequence[Tape], slope: Tensor) -> None:
        """Leave in every parameter's `.grad` what autograd would add to it.

        Args:
            tapes: of `forward`.
            slope: of the loss, with regard to what `forward` gave `[rows, *shape]`.
        """
        if self.streams is not None:
            further = bool(self.trunk.layers)
            slopes = slope - slope.mean(dim=1, keepdim=True), slope.sum(dim=1, keepdim=True)
            of_advantage, of_value = (
                row.backward(tape, mine, further)
                for row, tape, mine in zip(self.streams, tapes[1:], slopes, strict=True)
            )
            if not further:
                return
            slope = of_advantage.add_(of_value)
        self.trunk.backward(tapes[0], slope)


def _normalised_backward(slope: Tensor, z: Tensor, moments: Sequence[Tensor], norm: Norm) -> Tensor:
    """The slope with regard to `z`, from that with regard to what `norm` made of it; leaves that of its parameters."""
    slope, gain, bias = torch.ops.aten.native_layer_norm_backward(
        slope, z, norm.units, *moments, norm.gain, norm.bias, (True, True, True)
    )
    _grad(norm.gain).copy_(gain)
    _grad(norm.bias).copy_(bias)
    return slope


def _is_affine_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether it is a layer norm with gain and bias, which both may be left out of one."""
    return type(module) is nn.LayerNorm and module.weight is not None and module.bias is not None


def _share_parameters(modules: Sequence[nn.Module]) -> bool:
    """Whether they share a parameter, whose gradient is a sum, of which `backward` would leave the last summand."""
    each = [id(p) for module in modules for _, p in module.named_parameters(remove_duplicate=False)]
    return len(set(each)) < len(each)


def _is_hooked(module: nn.Module) -> bool:
    """Whether something besides the layers themselves happens in it, such as `torch.nn.utils.spectral_norm`."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(part, kind) for part in module.modules() for kind in kinds)


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "where the gradient is to be left"
    return parameter.grad


def _leaves(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from _leaves(list(module))
        else:
            yield module
