"""Compute the forward and backward passes of small fully connected networks without autograd.

Autograd spends more time on bookkeeping than on the arithmetic of a small MLP. This module computes the same passes on
the CPU, in memory that is allocated once, with NumPy's matrix products and torch's element-wise operations: for small
matrices each is the faster of the two. It covers sequences of `nn.Linear`, `nn.LayerNorm` and ReLU, also where they
end in separate layers for value and advantages (dueling networks). `hvdqn/dense_update.py` learns with these passes
and `Actor` acts with them; all other networks use `AutogradPasses`.

Call the passes in `torch.inference_mode`, which makes every operation of torch a little shorter.
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
from hvdqn.networks.network import QNetwork, scale_observation

Array: TypeAlias = NDArray[Any]
Shared: TypeAlias = tuple[Array, Tensor]
"""The same memory, as an array for NumPy and as a tensor for torch."""

# The learner checks gradients for NaN and Inf itself, and `np.errstate` takes as long as a small product.
warnings.filterwarnings("ignore", ".* encountered in matmul", RuntimeWarning, r"hvdqn\.networks\.dense")

_relu_backward = torch.ops.aten.threshold_backward.grad_input
_norm_backward = torch.ops.aten.native_layer_norm_backward.default


class Norm(NamedTuple):
    """The tensors of a layer norm. `backward` overwrites the gradients, which are None where there are none."""

    shape: tuple[int, ...]
    weight: Tensor
    bias: Tensor
    eps: float
    weight_grad: Tensor | None
    bias_grad: Tensor | None


class Layer(NamedTuple):
    """The tensors of one fully connected layer, kept here because looking up a module's attributes is slow.

    `weight_grad` and `bias_grad` are the parameters' `.grad`, which `backward` overwrites; None where there is none.
    """

    weight: Array
    bias: Tensor
    norm: Norm | None
    relu: bool
    weight_grad: Array | None
    bias_grad: Tensor | None


class Trace(NamedTuple):
    """What the backward pass of one layer needs of its forward pass."""

    inputs: Array
    z: Tensor
    """W h + b `[rows, units]`, before norm and ReLU."""
    mean: Tensor
    """Of each row, with a norm `[rows, 1]`; of no use without one, as the next."""
    inverse_deviation: Tensor
    output: Tensor

    def first(self, rows: int) -> Trace:
        """Return the trace of the first rows alone."""
        inputs, z, mean, inverse_deviation, output = self
        return Trace(inputs[:rows], z[:rows], mean[:rows], inverse_deviation[:rows], output[:rows])


class Stack:
    """Computes a sequence of fully connected layers, each with or without layer norm and ReLU.

        z_l = W_l h_{l-1} + b_l,   h_l = relu(g_l (z_l - mean z_l) / deviation z_l + c_l)

    The next pass with the same number of rows overwrites what a pass returned.

    Args:
        layers: the layers, from input to output.
        shape: shape that the output of each row is viewed as; (): it stays flat, `[units]`.
    """

    def __init__(self, layers: Sequence[Layer], shape: Sequence[int] = ()) -> None:
        self.layers, self.shape = list(layers), tuple(shape)
        # Of each layer, by the number of rows.
        self._outputs: dict[int, list[Shared]] = {}
        self._slopes: dict[int, list[Shared]] = {}

    @classmethod
    def of(cls, *modules: nn.Module) -> Stack | None:
        """Return a stack that computes these modules in order, or None if one is of a kind that it cannot compute."""
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
        """Map inputs `[rows, units]` to outputs `[rows, *shape]`; also return what `backward` needs of this pass."""
        rows = len(inputs)
        if rows not in self._outputs:
            self._outputs[rows] = [_shared(layer.bias, rows, len(layer.weight)) for layer in self.layers]
        h, traces = inputs, []
        for layer, (product, z) in zip(self.layers, self._outputs[rows], strict=True):
            np.matmul(h, layer.weight.T, out=product)
            output = mean = inverse_deviation = z.add_(layer.bias)
            if layer.norm is not None:
                output, mean, inverse_deviation = torch.native_layer_norm(z, *layer.norm[:4])
            if layer.relu:
                output.relu_()
            traces.append(Trace(h, z, mean, inverse_deviation, output))
            h = product if layer.norm is None else output.numpy()
        return h.reshape(-1, *self.shape) if self.shape else h, traces

    def backward(self, traces: Sequence[Trace], slope: Array, input_slope: bool = False) -> Array:
        """Overwrite every parameter's `.grad` by backpropagation (Rumelhart et al. 1986).

            dloss/dW_l = d_l^T h_{l-1},   dloss/db_l = sum over rows of d_l,   dloss/dh_{l-1} = d_l W_l

        where d_l = dloss/dz_l.

        Args:
            traces: what `forward` returned beside its output.
            slope: gradient of the loss with respect to the output `[rows, *shape]`, of all rows of that pass or of the
                first; it may be overwritten.
            input_slope: whether to compute also the gradient with respect to the inputs.

        Returns:
            The gradient with respect to the inputs `[rows, units]` if `input_slope`, else an array to ignore.
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
            if rows < len(trace.inputs):
                trace = trace.first(rows)
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
    """Computes the passes of a small fully connected network on the CPU.

    The constructor keeps references to parameters and gradients. Create a new object when they move to other memory.

    Args:
        network: the Q-network; its head turns outputs into Q-values.
        trunk: the layers that value and advantages share; all layers of a network that is not dueling.
        streams: the layers for the advantages and those for the value, if the network is dueling (`layers.Dueling`).
    """

    pinned_inputs = False

    def __init__(self, network: QNetwork, trunk: Stack, streams: tuple[Stack, Stack] | None = None) -> None:
        self.head, self.dtype, self.normalize = network.head, network.dtype, network.normalize
        self.trunk, self.streams = trunk, streams

    @classmethod
    def of(cls, network: QNetwork) -> DenseNetwork | None:
        """Return the passes of a network; None if it is on a GPU, split over ranks, or has layers of another kind."""
        on_cpu = all(parameter.device.type == "cpu" for parameter in network.parameters())
        if not on_cpu or network.group is not None or not network.head.is_streams:
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
        """Return the Q-values `[batch, actions]` for observations `[batch, ...]`; the next call may overwrite them."""
        scaled = scale_observation(observation, self.dtype)
        if self.normalize is not None:
            scaled = self.normalize(scaled)
        output, _ = self.forward(scaled.numpy().reshape(len(scaled), -1))
        return self.head.q_values(torch.from_numpy(output))

    def forward(self, inputs: Array) -> tuple[Array, list[list[Trace]]]:
        """Return the head's output for flat inputs in the network's dtype, scaled and normalized `[rows, inputs]`.

        Returns:
            The output `[rows, actions, ...]`, which the next pass with as many rows overwrites, and what `backward`
            needs of this pass.
        """
        h, traces = self.trunk.forward(inputs)
        if self.streams is None:
            return h, [traces]
        advantage, advantage_traces = self.streams[0].forward(h)
        value, value_traces = self.streams[1].forward(h)
        mean = advantage.sum(axis=1, keepdims=True) * (1.0 / advantage.shape[1])
        return value + advantage - mean, [traces, advantage_traces, value_traces]

    def backward(self, traces: Sequence[Sequence[Trace]], slope: Array) -> None:
        """Overwrite every parameter's `.grad` by backpropagation from the output.

        Args:
            traces: what `forward` returned beside the output.
            slope: gradient of the loss with respect to the output of the first rows of that pass `[first rows, actions,
                ...]`; it may be overwritten.
        """
        if self.streams is None:
            self.trunk.backward(traces[0], slope)
            return
        has_trunk = bool(self.trunk.layers)
        total = slope.sum(axis=1, keepdims=True)
        advantage = slope - total * (1.0 / slope.shape[1])
        advantage = self.streams[0].backward(traces[1], advantage, has_trunk)
        value = self.streams[1].backward(traces[2], total, has_trunk)
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
    """Return the gradient with respect to the norm's input; overwrite the `.grad` of its weight and bias.

    Args:
        slope: gradient of the loss with respect to the norm's output `[rows, units]`.
        trace: of the forward pass.
        norm: the layer norm.
    """
    slope, weight, bias = _norm_backward(
        slope,
        trace.z,
        norm.shape,
        trace.mean,
        trace.inverse_deviation,
        norm.weight,
        norm.bias,
        (True, True, True),
    )
    assert norm.weight_grad is not None
    assert norm.bias_grad is not None
    norm.weight_grad.copy_(weight)
    norm.bias_grad.copy_(bias)
    return slope


def _is_affine_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Return whether the module is a layer norm that has both a weight and a bias (PyTorch allows norms without)."""
    return type(module) is nn.LayerNorm and module.weight is not None and module.bias is not None


def _share_parameters(modules: Sequence[nn.Module]) -> bool:
    """Return whether two modules share a parameter; `backward` would keep only one of its two gradients."""
    each = [id(p) for module in modules for _, p in module.named_parameters(remove_duplicate=False)]
    return len(set(each)) < len(each)


def _is_hooked(module: nn.Module) -> bool:
    """Return whether the module has hooks, as `torch.nn.utils.spectral_norm` adds, which these passes would not run."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(part, kind) for part in module.modules() for kind in kinds)


def _leaves(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from _leaves(list(module))
        else:
            yield module
