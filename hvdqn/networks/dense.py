"""Forward and backward passes of small fully connected networks, written out by hand in memory allocated once.

Autograd spends more time on bookkeeping than on the arithmetic of a small MLP. This module computes the same passes on
the CPU, with NumPy's matrix products and torch's element-wise kernels, whichever is faster for small matrices; both see
the same memory. It covers networks of `nn.Linear`, `nn.LayerNorm` and ReLU in a row, with or without dueling streams.
`hvdqn/dense_update.py` learns with these passes, and `Actor` acts with them; all other networks use autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hvdqn.networks.layers import Dueling, dueling
from hvdqn.networks.network import QNetwork, scale_observation

Array: TypeAlias = NDArray[Any]
Shared: TypeAlias = tuple[Array, Tensor]
"""The same memory, as an array for NumPy and as a tensor for torch."""

# The learner checks gradients for NaN and Inf itself, and `np.errstate` takes as long as a small product.
warnings.filterwarnings("ignore", ".* encountered in matmul", RuntimeWarning, r"hvdqn\.networks\.dense")

_relu_backward = torch.ops.aten.threshold_backward.grad_input
_norm_backward = torch.ops.aten.native_layer_norm_backward.default


class Norm(NamedTuple):
    """The tensors of a layer norm with weight and bias. The gradients are None where its parameters have none."""

    shape: tuple[int, ...]
    weight: Tensor
    bias: Tensor
    eps: float
    weight_grad: Tensor | None
    bias_grad: Tensor | None


class Layer(NamedTuple):
    """A fully connected layer whose tensors are looked up once: looking up a module's attributes is slow.

    The gradients are the buffers that `backward` overwrites; None where a parameter has no `.grad`.
    """

    weight: Array
    bias: Tensor
    norm: Norm | None
    relu: bool
    weight_grad: Array | None
    bias_grad: Tensor | None


class Trace(NamedTuple):
    """What one layer's forward pass leaves for its backward pass."""

    inputs: Array
    z: Tensor
    """W h + b `[rows, units]`, before norm and ReLU."""
    moments: tuple[Tensor, ...]
    """Of a norm: the mean and 1 / deviation of each row `[rows, 1]`."""
    output: Tensor

    def first(self, rows: int) -> Trace:
        """Return the trace of the first rows alone."""
        moments = tuple(each[:rows] for each in self.moments)
        return Trace(self.inputs[:rows], self.z[:rows], moments, self.output[:rows])


class Stack:
    """Fully connected layers in a row, each with or without layer norm and ReLU.

        z_l = W_l h_{l-1} + b_l,   h_l = relu(g_l (z_l - mean z_l) / deviation z_l + c_l)

    What a pass returns is overwritten by the next pass over as many rows.

    Args:
        layers: in order.
        shape: shape of the output of one row, where it is not flat.
    """

    def __init__(self, layers: Sequence[Layer], shape: Sequence[int] = ()) -> None:
        self.layers, self.shape = list(layers), tuple(shape)
        # Of each layer, by the number of rows.
        self._outputs: dict[int, list[Shared]] = {}
        self._slopes: dict[int, list[Shared]] = {}

    @classmethod
    def of(cls, *modules: nn.Module) -> Stack | None:
        """Return these modules as a stack, or None if they hold anything else than such layers."""
        layers: list[Layer] = []
        shape: tuple[int, ...] = ()
        for module in _leaves(modules):
            last = layers[-1] if layers else None
            if type(module) is nn.Linear and module.bias is not None and not shape:
                layers.append(_layer(module))
            elif _is_affine_norm(module) and last and last.norm is None and not last.relu:
                layers[-1] = last._replace(norm=_norm(module))
            elif type(module) is nn.ReLU and last and not last.relu:
                layers[-1] = last._replace(relu=True)
            elif type(module) is nn.Unflatten and last and not shape:
                shape = tuple(module.unflattened_size)
            elif type(module) is not nn.Flatten or layers:
                return None
        return cls(layers, shape)

    def forward(self, inputs: Array) -> tuple[Array, list[Trace]]:
        """Map `[rows, units]` to `[rows, *shape]`; also return the traces that `backward` needs."""
        rows = len(inputs)
        if rows not in self._outputs:
            self._outputs[rows] = [_shared(layer.bias, rows, len(layer.weight)) for layer in self.layers]
        h, traces = inputs, []
        for layer, (product, z) in zip(self.layers, self._outputs[rows], strict=True):
            np.matmul(h, layer.weight.T, out=product)
            output = z.add_(layer.bias)
            moments: tuple[Tensor, ...] = ()
            if layer.norm is not None:
                output, *found = torch.native_layer_norm(z, *layer.norm[:4])
                moments = tuple(found)
            if layer.relu:
                output.relu_()
            traces.append(Trace(h, z, moments, output))
            h = product if layer.norm is None else output.numpy()
        return h.reshape(-1, *self.shape) if self.shape else h, traces

    def backward(self, traces: Sequence[Trace], slope: Array, input_slope: bool = False) -> Array:
        """Overwrite every parameter's `.grad` by backpropagation (Rumelhart et al. 1986).

            dloss/dW_l = d_l^T h_{l-1},   dloss/db_l = sum over rows of d_l,   dloss/dh_{l-1} = d_l W_l

        where d_l = dloss/dz_l.

        Args:
            traces: from `forward`.
            slope: gradient of the loss with respect to the output `[rows, *shape]`.
            input_slope: whether to compute the gradient with respect to the inputs.

        Returns:
            The gradient with respect to the inputs `[rows, units]`, if asked for.
        """
        rows = len(slope)
        if rows not in self._slopes:
            inputs = (layer.weight.shape[1] for layer in self.layers)
            self._slopes[rows] = [
                _shared(layer.bias, rows, units) for layer, units in zip(self.layers, inputs, strict=True)
            ]
        slope = slope.reshape(rows, -1)
        d = torch.from_numpy(slope)
        for index in range(len(self.layers) - 1, -1, -1):
            layer, trace = self.layers[index], traces[index]
            if layer.relu:
                _relu_backward(d, trace.output, 0, grad_input=d)
            if layer.norm is not None:
                d = _layer_norm_backward(d, trace, layer.norm)
                slope = d.numpy()
            np.matmul(slope.T, trace.inputs, out=layer.weight_grad)
            torch.sum(d, 0, out=layer.bias_grad)
            if index or input_slope:
                before, d = self._slopes[rows][index]
                slope = np.matmul(slope, layer.weight, out=before)
        return slope


class DenseNetwork:
    """A small fully connected Q-network on the CPU, computed without autograd.

    Parameters and gradients are looked up when this is made: make it anew where they move to other memory.

    Args:
        network: whose head is applied to the output.
        trunk: the shared layers, or all layers there are.
        streams: the advantage and value streams of `layers.Dueling`.
    """

    pinned_inputs = False

    def __init__(self, network: QNetwork, trunk: Stack, streams: tuple[Stack, Stack] | None = None) -> None:
        self.head, self.dtype = network.head, network.dtype
        self.trunk, self.streams = trunk, streams

    @classmethod
    def of(cls, network: QNetwork) -> DenseNetwork | None:
        """Return a network in this form, or None if it is not on the CPU or has other layers."""
        on_cpu = next(network.parameters()).device.type == "cpu"
        if not on_cpu or not network.head.is_streams:
            return None
        modules = (network.torso, network.head.streams)
        leaves = list(_leaves(modules))
        last = leaves[-1] if leaves else None
        if _share_parameters(leaves) or any(map(_is_hooked, modules)):
            return None
        if last is None or type(last) is not Dueling:
            stack = Stack.of(*leaves)
            return cls(network, stack) if stack and stack.layers else None
        trunk, advantage, value = Stack.of(*leaves[:-1]), Stack.of(last.advantage), Stack.of(last.value)
        if not (trunk and advantage and value) or trunk.shape:
            return None
        return cls(network, trunk, (advantage, value))

    def q_values(self, observation: Tensor) -> Tensor:
        """Return the Q-values `[batch, actions]` for raw observations `[batch, ...]`."""
        scaled = scale_observation(observation, self.dtype)
        output, _ = self.forward(scaled.numpy().reshape(len(scaled), -1))
        return self.head.q_values(torch.from_numpy(output))

    def forward(self, inputs: Array) -> tuple[Array, list[list[Trace]]]:
        """Map scaled, flat observations `[rows, inputs]` to the head's output; also return what `backward` needs.

        Returns:
            The output `[rows, actions, ...]`, which the next pass over as many rows overwrites, and the traces.
        """
        h, traces = self.trunk.forward(inputs)
        if self.streams is None:
            return h, [traces]
        (advantage, advantage_traces), (value, value_traces) = (stack.forward(h) for stack in self.streams)
        output = dueling(torch.from_numpy(value), torch.from_numpy(advantage))
        return output.numpy(), [traces, advantage_traces, value_traces]

    def backward(self, traces: Sequence[Sequence[Trace]], slope: Array) -> None:
        """Overwrite every parameter's `.grad`.

        Args:
            traces: from `forward`.
            slope: gradient of the loss with respect to the output of the first rows of that pass; overwritten.
        """
        if len(slope) < len(traces[-1][-1].output):
            traces = [[trace.first(len(slope)) for trace in stack] for stack in traces]
        if self.streams is None:
            self.trunk.backward(traces[0], slope)
            return
        has_trunk = bool(self.trunk.layers)
        total = slope.sum(axis=1, keepdims=True)
        slopes = slope - total * (1.0 / slope.shape[1]), total
        advantage, value = (
            stack.backward(each, stream_slope, has_trunk)
            for stack, each, stream_slope in zip(self.streams, traces[1:], slopes, strict=True)
        )
        if has_trunk:
            advantage += value
            self.trunk.backward(traces[0], advantage)


def _shared(like: Tensor, rows: int, units: int) -> Shared:
    tensor = like.new_empty(rows, units)
    return tensor.numpy(), tensor


def _layer(linear: nn.Linear) -> Layer:
    weight_grad = None if linear.weight.grad is None else linear.weight.grad.numpy()
    return Layer(
        linear.weight.detach().numpy(), linear.bias.detach(), None, False, weight_grad, linear.bias.grad
    )


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(
        norm.normalized_shape,
        norm.weight.detach(),
        norm.bias.detach(),
        norm.eps,
        norm.weight.grad,
        norm.bias.grad,
    )


def _layer_norm_backward(slope: Tensor, trace: Trace, norm: Norm) -> Tensor:
    """Return the gradient with respect to `z`; overwrite the gradients of the norm's own parameters."""
    slope, weight, bias = _norm_backward(
        slope, trace.z, norm.shape, *trace.moments, norm.weight, norm.bias, (True, True, True)
    )
    assert norm.weight_grad is not None
    assert norm.bias_grad is not None
    norm.weight_grad.copy_(weight)
    norm.bias_grad.copy_(bias)
    return slope


def _is_affine_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Return whether the module is a layer norm with weight and bias; either may be left out of one."""
    return type(module) is nn.LayerNorm and module.weight is not None and module.bias is not None


def _share_parameters(modules: Sequence[nn.Module]) -> bool:
    """Return whether modules share a parameter: its gradient is a sum, of which `backward` would keep one term."""
    each = [id(p) for module in modules for _, p in module.named_parameters(remove_duplicate=False)]
    return len(set(each)) < len(each)


def _is_hooked(module: nn.Module) -> bool:
    """Return whether hooks add to the layers' computation, as those of `torch.nn.utils.spectral_norm` do."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(part, kind) for part in module.modules() for kind in kinds)


def _leaves(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from _leaves(list(module))
        else:
            yield module
