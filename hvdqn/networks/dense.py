"""Compute the forward and backward passes of small fully connected networks without autograd.

Autograd spends more time on bookkeeping than on the arithmetic of a small MLP. This module computes the same
passes with NumPy's matrix products and a few torch kernels, on the CPU. It covers sequences of `nn.Linear`,
`nn.LayerNorm` and ReLU, also where they end in separate layers for value and advantages (dueling networks). All other
networks use `AutogradPasses`.
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

# What `backward` needs of the forward pass. For each layer: its input, the output of its linear part, the mean and
# 1 / deviation that its layer norm computed, and its output.
Tape: TypeAlias = list[tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]]


class Layer(NamedTuple):
    """The tensors of one fully connected layer, kept here because looking up a module's attributes is slow.

    `weight_grad` and `bias_grad` are the parameters' `.grad`, which `backward` overwrites; None where there is none.
    """

    weight: NDArray[Any]
    bias: Tensor
    norm: nn.LayerNorm | None
    relu: bool
    weight_grad: NDArray[Any] | None
    bias_grad: Tensor | None


class Stack:
    """Computes a sequence of fully connected layers, each with or without layer norm and ReLU.

        z_l = W_l h_{l-1} + b_l,   h_l = relu(g_l (z_l - mean z_l) / deviation z_l + c_l)

    Args:
        layers: the layers, from input to output.
        shape: shape that the output of each row is viewed as; (): it stays flat, `[units]`.
    """

    def __init__(self, layers: Sequence[Layer], shape: Sequence[int] = ()) -> None:
        self.layers, self.shape = list(layers), tuple(shape)

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
                layers[-1] = last._replace(norm=module)
            elif type(module) is nn.ReLU and last and not last.relu:
                layers[-1] = last._replace(relu=True)
            elif type(module) is nn.Unflatten and last and not shape:
                shape = tuple(module.unflattened_size)
            elif type(module) is not nn.Flatten or layers:
                return None
        return cls(layers, shape)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tape]:
        """Map inputs `[rows, units]` to outputs `[rows, *shape]`; also return what `backward` needs of this pass."""
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
            tape: what `forward` returned beside its output.
            slope: gradient of the loss with respect to the output `[rows, *shape]`.
            input_gradient: whether to compute also the gradient with respect to the inputs.

        Returns:
            The gradient with respect to the inputs `[rows, units]` if `input_gradient`, else a tensor to ignore.
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
    """Computes the passes of a small fully connected network; implements `Passes` of `networks.passes`.

    The constructor keeps references to parameters and gradients. Create a new object when they move to other memory.

    Args:
        network: the Q-network; its head turns outputs into Q-values.
        trunk: the layers that value and advantages share; all layers of a network that is not dueling.
        streams: the layers for the advantages and those for the value, if the network is dueling (`layers.Dueling`).
    """

    # Inference mode makes every operation a little shorter.
    no_grad = torch.inference_mode
    pinned_inputs = False

    def __init__(self, network: QNetwork, trunk: Stack, streams: tuple[Stack, Stack] | None = None) -> None:
        self.head, self.dtype = network.head, network.dtype
        self.trunk, self.streams = trunk, streams

    @classmethod
    def of(cls, network: QNetwork) -> DensePasses | None:
        """Return the passes of a network on the CPU, or None if it has layers that only autograd can handle."""
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
        """Return the head's output `[batch, actions, ...]` for observations `[batch, ...]` of the environments."""
        return self.forward(observation)[0]

    def q_values(self, observation: Tensor) -> Tensor:
        """Return the Q-values `[batch, actions]` for observations `[batch, ...]` of the environments."""
        return self.head.q_values(self.forward(observation)[0])

    def forward(self, observation: Tensor) -> tuple[Tensor, list[Tape]]:
        """Return what `output` returns, and the intermediate results that `backward` needs."""
        if observation.dtype != self.dtype:
            observation = scale_observation(observation, self.dtype)
        h, tape = self.trunk.forward(observation if observation.ndim == 2 else observation.flatten(1))
        if self.streams is None:
            return h, [tape]
        (advantage, advantage_tape), (value, value_tape) = (stack.forward(h) for stack in self.streams)
        return value + advantage - advantage.mean(dim=1, keepdim=True), [tape, advantage_tape, value_tape]

    def backward(self, tapes: list[Tape], slope: Tensor) -> None:
        """Overwrite every parameter's `.grad` by backpropagation from the output.

        Args:
            tapes: what `forward` returned beside the output.
            slope: gradient of the loss with respect to the output `[batch, actions, ...]`.
        """
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
    """Return the gradient with respect to the norm's input `z`; overwrite the `.grad` of its weight and bias.

    Args:
        slope: gradient of the loss with respect to the norm's output `[rows, units]`.
        z: the norm's input `[rows, units]`.
        moments: the mean and 1 / deviation of each row.
        norm: the layer norm.
    """
    slope, weight, bias = torch.ops.aten.native_layer_norm_backward(
        slope, z, norm.normalized_shape, *moments, norm.weight, norm.bias, (True, True, True)
    )
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    norm.weight.grad.copy_(weight)
    norm.bias.grad.copy_(bias)
    return slope


def _is_affine_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Return whether the module is a layer norm that has both a weight and a bias (PyTorch allows norms without)."""
    return type(module) is nn.LayerNorm and module.weight is not None and module.bias is not None


def _share_parameters(modules: Sequence[nn.Module]) -> bool:
    """Return whether two modules share a parameter; `backward` would keep only one of its two gradients."""
    each = [id(p) for module in modules for _, p in module.named_parameters(remove_duplicate=False)]
    return len(set(each)) < len(each)


def _is_hooked(module: nn.Module) -> bool:
    """Return whether the module has hooks, as `torch.nn.utils.spectral_norm` adds; `DensePasses` would not run them."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(part, kind) for part in module.modules() for kind in kinds)


def _leaves(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from _leaves(list(module))
        else:
            yield module
