"""Forward and backward passes of small fully connected networks, written out by hand.

Autograd spends more time on bookkeeping than on the arithmetic of a small MLP. This module computes the same
passes with NumPy's matrix products and a few torch kernels, on the CPU and without autograd. It covers networks of
`nn.Linear`, `nn.LayerNorm` and ReLU in a row, with or without dueling streams; all others use `AutogradPasses`.
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

# The learner checks gradients for NaN and Inf itself, and `np.errstate` takes as long as a small product.
warnings.filterwarnings("ignore", ".* encountered in matmul", RuntimeWarning, r"hvdqn\.networks\.dense")

# For each layer: its input, its output before norm and ReLU, the norm's mean and 1 / deviation, and its output.
Tape: TypeAlias = list[tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]]


class Layer(NamedTuple):
    """A fully connected layer whose tensors are looked up once: looking up a module's attributes is slow.

    The gradients are the buffers that `backward` overwrites; None where a parameter has no `.grad`.
    """

    weight: NDArray[Any]
    bias: Tensor
    norm: nn.LayerNorm | None
    relu: bool
    weight_grad: NDArray[Any] | None
    bias_grad: Tensor | None


class Stack:
    """Fully connected layers in a row, each with or without layer norm and ReLU.

        z_l = W_l h_{l-1} + b_l,   h_l = relu(g_l (z_l - mean z_l) / deviation z_l + c_l)

    Args:
        layers: in order.
        shape: shape of the output of one row, where it is not flat.
    """

    def __init__(self, layers: Sequence[Layer], shape: Sequence[int] = ()) -> None:
        self.layers, self.shape = list(layers), tuple(shape)

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
                layers[-1] = last._replace(norm=module)
            elif type(module) is nn.ReLU and last and not last.relu:
                layers[-1] = last._replace(relu=True)
            elif type(module) is nn.Unflatten and last and not shape:
                shape = tuple(module.unflattened_size)
            elif type(module) is not nn.Flatten or layers:
                return None
        return cls(layers, shape)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tape]:
        """Map `[rows, units]` to `[rows, *shape]`; also return the tape that `backward` needs."""
        h, tape = inputs, []
        for weight, bias, norm, relu, _, _ in self.layers:
            out = z = torch.from_numpy(np.matmul(h.numpy(), weight.T)).add_(bias)
            moments: tuple[Tensor, ...] = ()
            if norm is not None:
                out, *found = torch.native_layer_norm(
                    z, norm.normalized_shape, norm.weight, norm.bias, norm.eps
                )
                moments = tuple(found)
            if relu:
                out.relu_()
            tape.append((h, z, moments, out))
            h = out
        return h.view(-1, *self.shape) if self.shape else h, tape

    def backward(self, tape: Tape, slope: Tensor, input_gradient: bool = False) -> Tensor:
        """Overwrite every parameter's `.grad` by backpropagation (Rumelhart et al. 1986).

            dloss/dW_l = d_l^T h_{l-1},   dloss/db_l = sum over rows of d_l,   dloss/dh_{l-1} = d_l W_l

        where d_l = dloss/dz_l.

        Args:
            tape: from `forward`.
            slope: gradient of the loss with respect to the output `[rows, *shape]`.
            input_gradient: whether to compute the gradient with respect to the inputs.

        Returns:
            The gradient with respect to the inputs `[rows, units]`, if asked for.
        """
        slope = slope.flatten(1) if self.shape else slope
        for index in range(len(self.layers) - 1, -1, -1):
            weight, _, norm, relu, weight_grad, bias_grad = self.layers[index]
            h, z, moments, out = tape[index]
            if relu:
                slope = slope * out.sign()  # the output of ReLU is never negative
            if norm is not None:
                slope = _layer_norm_backward(slope, z, moments, norm)
            slopes = slope.numpy()
            assert weight_grad is not None
            np.matmul(slopes.T, h.numpy(), out=weight_grad)
            torch.sum(slope, 0, out=bias_grad)
            if index or input_gradient:
                slope = torch.from_numpy(np.matmul(slopes, weight))
        return slope


class DensePasses:
    """`Passes` of a small fully connected network (see `networks.passes`).

    Parameters and gradients are looked up when this is made: make it anew where they move to other memory.

    Args:
        network: whose head is applied to the output.
        trunk: the shared layers, or all layers there are.
        streams: the advantage and value streams of `layers.Dueling`.
    """

    # Inference mode makes every operation a little shorter.
    no_grad = torch.inference_mode
    pinned_inputs = False

    def __init__(self, network: QNetwork, trunk: Stack, streams: tuple[Stack, Stack] | None = None) -> None:
        self.head, self.dtype = network.head, network.dtype
        self.trunk, self.streams = trunk, streams

    @classmethod
    def of(cls, network: QNetwork) -> DensePasses | None:
        """Return the passes of a network on the CPU, or None if it has other layers."""
        if not network.head.is_streams:
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

    def output(self, observation: Tensor) -> Tensor:
        """Return the head's output `[batch, actions, ...]` for raw observations `[batch, ...]`."""
        return self.forward(observation)[0]

    def q_values(self, observation: Tensor) -> Tensor:
        """Return the Q-values `[batch, actions]` for raw observations `[batch, ...]`."""
        return self.head.q_values(self.forward(observation)[0])

    def forward(self, observation: Tensor) -> tuple[Tensor, list[Tape]]:
        """Return the same as `output`, and the tapes that `backward` needs."""
        if observation.dtype != self.dtype:
            observation = scale_observation(observation, self.dtype)
        h, tape = self.trunk.forward(observation if observation.ndim == 2 else observation.flatten(1))
        if self.streams is None:
            return h, [tape]
        (advantage, advantage_tape), (value, value_tape) = (stack.forward(h) for stack in self.streams)
        return value + advantage - advantage.mean(dim=1, keepdim=True), [tape, advantage_tape, value_tape]

    def backward(self, tapes: list[Tape], slope: Tensor) -> None:
        """Overwrite every parameter's `.grad`, given the gradient of the loss with respect to the output."""
        if self.streams is not None:
            has_trunk = bool(self.trunk.layers)
            slopes = slope - slope.mean(dim=1, keepdim=True), slope.sum(dim=1, keepdim=True)
            advantage, value = (
                stack.backward(tape, stream_slope, has_trunk)
                for stack, tape, stream_slope in zip(self.streams, tapes[1:], slopes, strict=True)
            )
            if not has_trunk:
                return
            slope = advantage.add_(value)
        self.trunk.backward(tapes[0], slope)


def _layer(linear: nn.Linear) -> Layer:
    weight_grad = None if linear.weight.grad is None else linear.weight.grad.numpy()
    return Layer(linear.weight.detach().numpy(), linear.bias, None, False, weight_grad, linear.bias.grad)


def _layer_norm_backward(slope: Tensor, z: Tensor, moments: Sequence[Tensor], norm: nn.LayerNorm) -> Tensor:
    """Return the gradient with respect to `z`; overwrite the gradients of the norm's own parameters."""
    slope, weight, bias = torch.ops.aten.native_layer_norm_backward(
        slope, z, norm.normalized_shape, *moments, norm.weight, norm.bias, (True, True, True)
    )
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    norm.weight.grad.copy_(weight)
    norm.bias.grad.copy_(bias)
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
