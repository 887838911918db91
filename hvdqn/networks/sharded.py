"""Fully connected layers whose weights are split over a group of ranks (Shoeybi et al. 2019, Megatron-LM, section 3).

Layers are split in pairs, the first by its outputs and the second by its inputs:

    h_i = relu(x A_i^T + a_i),   y = sum over i of (h_i B_i^T) + b

where rank i of the group holds A_i, a_i and B_i. The activations between the two layers stay where they are. Only the
sum in the forward pass and the gradient of x in the backward pass travel. A last layer without a partner is not split:
each rank of the group holds all of it, as it holds convolutions.

Networks know nothing of ranks: a `Group` sums and gathers.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from hvdqn.networks.wide import WIDE, WideLinear, wide_product

N = TypeVar("N", bound=nn.Module)


class Group(Protocol):
    """The ranks that hold one network between them. Every method is collective in the group.

    Attributes:
        index: place of this rank in the group, 0 <= index < size.
        size: number of ranks in the group.
    """

    index: int
    size: int

    def allreduce_sum(self, tensor: Tensor) -> Tensor:
        """Overwrite a contiguous tensor of any shape with its sum over the group, and return it."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks in order, `[size x rows, ...]`; every rank gives equally many."""
        ...


class CopyToGroup(torch.autograd.Function):
    """The identity, in front of a layer of which each rank holds a part; its gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, group: Group) -> Tensor:
        """Return a view of the inputs `[rows, units]`."""
        ctx.group = group
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        """Return the sum of the ranks' gradients."""
        return ctx.group.allreduce_sum(slopes[0].clone(memory_format=torch.contiguous_format)), None


class SumOverGroup(torch.autograd.Function):
    """The sum over the group of what each rank computed with its part of a layer; its gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        """Return the sum of the ranks' parts `[rows, units]`."""
        return group.allreduce_sum(part.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        """Return the gradient as it is."""
        return slopes[0], None


class SumBothWays(torch.autograd.Function):
    """The sum over the group of a number from which each rank goes on with its own part; its gradient is summed too."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        """Return the sum of the ranks' parts."""
        ctx.group = group
        return group.allreduce_sum(part.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        """Return the sum of the ranks' gradients."""
        return ctx.group.allreduce_sum(slopes[0].clone(memory_format=torch.contiguous_format)), None


class SplitModule(nn.Module, ABC):
    """A layer of which each rank of a group holds an equal part.

    Args:
        full: the whole layer; this rank's part of it is copied.
        group: the ranks that hold it.

    Attributes:
        split: the dimension along which each parameter is split, by name; others are held by every rank.
    """

    split: ClassVar[dict[str, int]]

    def __init__(self, full: nn.Module, group: Group) -> None:
        super().__init__()
        self.group = group
        for name, parameter in full.named_parameters():
            part = parameter.detach()
            if name in self.split:
                part = part.chunk(group.size, self.split[name])[group.index]
            setattr(self, name, nn.Parameter(part.clone(memory_format=torch.contiguous_format)))

    @abstractmethod
    def whole(self) -> nn.Module:
        """Return a whole layer without memory for its parameters (on the device `meta`)."""


class SplitLinear(SplitModule):
    """A fully connected layer that is split."""

    weight: Tensor
    bias: Tensor

    def __init__(self, full: nn.Linear, group: Group) -> None:
        super().__init__(full, group)
        self.inputs, self.outputs = full.in_features, full.out_features

    def whole(self) -> nn.Module:
        """Return a whole layer without memory for its parameters."""
        kind = WideLinear if self.inputs * self.outputs >= WIDE else nn.Linear
        return kind(self.inputs, self.outputs, device="meta")


class ColumnLinear(SplitLinear):
    """A layer that is split by its outputs: inputs `[rows, inputs]` give `[rows, outputs / size]`."""

    split: ClassVar[dict[str, int]] = {"weight": 0, "bias": 0}

    def forward(self, inputs: Tensor) -> Tensor:
        """Return this rank's share of the outputs."""
        copied: Tensor = CopyToGroup.apply(inputs, self.group)  # type: ignore[no-untyped-call]
        return wide_product(copied, self.weight, self.bias)


class RowLinear(SplitLinear):
    """A layer that is split by its inputs: `[rows, inputs / size]` give all outputs `[rows, outputs]` on every rank."""

    split: ClassVar[dict[str, int]] = {"weight": 1}

    def forward(self, inputs: Tensor) -> Tensor:
        """Return all outputs."""
        part = wide_product(inputs, self.weight, None)
        total: Tensor = SumOverGroup.apply(part, self.group)  # type: ignore[no-untyped-call]
        return total + self.bias


class SplitLayerNorm(SplitModule):
    """Layer normalization of units that are split over the group: `[rows, units / size]` give the same shape.

    The mean and the variance are those of all units (Ba et al. 2016, eq. 3), from two sums over the group.
    """

    split: ClassVar[dict[str, int]] = {"weight": 0, "bias": 0}
    weight: Tensor
    bias: Tensor

    def __init__(self, full: nn.LayerNorm, group: Group) -> None:
        super().__init__(full, group)
        (self.units,), self.eps = full.normalized_shape, full.eps

    def forward(self, inputs: Tensor) -> Tensor:
        """Return this rank's share of the normalized units."""
        centered = inputs - self._mean(inputs)
        scale = torch.rsqrt(self._mean(centered.square()) + self.eps)
        return torch.addcmul(self.bias, centered * scale, self.weight)

    def _mean(self, numbers: Tensor) -> Tensor:
        """Return the mean over all units, `[rows, 1]`."""
        total: Tensor = SumBothWays.apply(numbers.sum(dim=1, keepdim=True), self.group)  # type: ignore[no-untyped-call]
        return total / self.units

    def whole(self) -> nn.Module:
        """Return a whole layer without memory for its parameters."""
        return nn.LayerNorm(self.units, self.eps, device="meta")


class Splitter:
    """Splits the fully connected layers of a network while it is built, one after the other.

    Each layer is made whole, from the same random numbers as without a group, and freed when its part is copied. So the
    weights do not depend on the size of the group, and at most one whole layer is in memory.

    Args:
        group: the ranks that will hold the network.
        layers: number of fully connected layers from the observation to the output.
    """

    def __init__(self, group: Group, layers: int) -> None:
        self.group, self.left, self.columns_next = group, layers, True

    def fork(self) -> Splitter:
        """Return a splitter that goes on from here by itself; each dueling stream has its own."""
        return copy.copy(self)

    def take(self, full: nn.Linear) -> nn.Module:
        """Return this rank's part of the next layer, or the whole layer if it has no partner."""
        self.left -= 1
        if self.columns_next and self.left == 0:
            return full
        kind = ColumnLinear if self.columns_next else RowLinear
        self.columns_next = not self.columns_next
        return kind(full, self.group)

    def normalize(self, full: nn.LayerNorm) -> nn.Module:
        """Return the layer norm for the outputs of the layer that was taken last."""
        return full if self.columns_next else SplitLayerNorm(full, self.group)


class Layout:
    """Where each parameter of a split network lies in this rank's flat tensor, and in that of the whole network.

    A rank's flat tensor holds its parts of split parameters first and then the parameters that every rank of the group
    holds, each in the order of the network. The whole network's holds all parameters in that order.

    Args:
        network: split over a group.

    Attributes:
        split_numel: numbers of split parameters in this rank's flat tensor.
        full_numel: numbers of the whole network.
        whole_shapes: the shape of each parameter of the whole network, by name.
    """

    def __init__(self, network: nn.Module, group: Group) -> None:
        self.size, self.index = group.size, group.index
        shapes = [p.shape for p in network.parameters()]
        self._dims = split_dimensions(network)
        self._numels = [shape.numel() for shape in shapes]
        self._shapes = shapes
        self.split_numel = sum(n for n, d in zip(self._numels, self._dims, strict=True) if d is not None)
        self.full_numel = sum(
            n * (1 if d is None else self.size) for n, d in zip(self._numels, self._dims, strict=True)
        )

        self.whole_shapes = {
            name: torch.Size(n * self.size if axis == dim else n for axis, n in enumerate(p.shape))
            for (name, p), dim in zip(network.named_parameters(), self._dims, strict=True)
        }

    def extract(self, full: Tensor) -> Tensor:
        """Return this rank's flat tensor, given that of the whole network `[full_numel]`."""
        parts: list[list[Tensor]] = [[], []]
        for dim, whole, _, _ in self._walk(full):
            mine = whole if dim is None else whole.chunk(self.size, dim)[self.index]
            parts[dim is None].append(mine.reshape(-1))
        return torch.cat([*parts[0], *parts[1]])

    def place_split(self, part: Tensor, index: int, full: Tensor) -> None:
        """Copy the split parameters of a rank of the group, `[split_numel]`, into the whole network's flat tensor."""
        for dim, whole, shape, start in self._walk(full):
            if dim is not None:
                numbers = part[start : start + shape.numel()].view(shape)
                whole.chunk(self.size, dim)[index].copy_(numbers)

    def place_common(self, common: Tensor, full: Tensor) -> None:
        """Copy the parameters that every rank holds into the whole network's flat tensor."""
        for dim, whole, shape, start in self._walk(full):
            if dim is None:
                whole.copy_(common[start : start + shape.numel()].view(shape))

    def _walk(self, full: Tensor) -> list[tuple[int | None, Tensor, torch.Size, int]]:
        """Return of each parameter: its dimension, its whole view, its shape here and its start among its kind."""
        found = []
        starts, begin = [0, 0], 0
        for dim, numel, shape in zip(self._dims, self._numels, self._shapes, strict=True):
            whole_shape = list(shape)
            if dim is not None:
                whole_shape[dim] *= self.size
            end = begin + numel * (1 if dim is None else self.size)
            found.append((dim, full[begin:end].view(whole_shape), shape, starts[dim is None]))
            begin, starts[dim is None] = end, starts[dim is None] + numel
        return found


def split_dimensions(network: nn.Module) -> list[int | None]:
    """Return the dimension along which each parameter is split, None if it is not, in the order of the network."""
    dims = []
    for path, _ in network.named_parameters():
        place, _, name = path.rpartition(".")
        module = network.get_submodule(place)
        dims.append(module.split.get(name) if isinstance(module, SplitModule) else None)
    return dims


def split_first(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters in the order of `Layout`: split ones first. Without any this is the network's order."""
    dims = split_dimensions(network)
    parameters = list(network.parameters())
    order = sorted(range(len(dims)), key=lambda place: dims[place] is None)
    return [parameters[place] for place in order]


def whole_network(network: N, full: Tensor) -> N:
    """Return a copy of a split network that is not split; its parameters are views of a flat tensor `[full_numel]`."""
    whole = copy.deepcopy(network)
    for path, module in list(whole.named_modules()):
        if isinstance(module, SplitModule):
            place, _, name = path.rpartition(".")
            setattr(whole.get_submodule(place), name, module.whole())
    begin = 0
    for path, parameter in list(whole.named_parameters()):
        end = begin + parameter.numel()
        place, _, name = path.rpartition(".")
        view = full[begin:end].view(parameter.shape)
        setattr(whole.get_submodule(place), name, nn.Parameter(view))
        begin = end
    return whole
