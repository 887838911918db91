"""Build the Q-network of a run from a torso (observation to features) and a head (features to Q-values)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvdqn.config import NetworkConfig
from hvdqn.errors import UserError
from hvdqn.networks.decoupled import DecoupledHead
from hvdqn.networks.heads import (
    CategoricalHead,
    Head,
    HLGaussHead,
    ImplicitQuantileHead,
    QuantileHead,
    ScalarHead,
)
from hvdqn.networks.layers import make_streams
from hvdqn.networks.normalize import Normalize
from hvdqn.networks.sharded import Group, Layout, Splitter, whole_network
from hvdqn.networks.torsos import make_torso


class QNetwork(nn.Module):
    """Maps observations to a prediction of each action's return, by a torso and a head.

    It takes observations as environments return them, and scales and normalizes them itself.

    Args:
        torso: maps float observations `[batch, ...]` to features `[batch, features]`.
        head: maps features to an output for each action.
        group: the ranks that hold the network between them; None: this rank holds all of it.
        normalize: normalizes observations before the torso; None: they are not normalized.
    """

    def __init__(
        self, torso: nn.Module, head: Head, group: Group | None = None, normalize: Normalize | None = None
    ) -> None:
        super().__init__()
        self.torso = torso
        self.head = head
        self.group = group
        self.normalize = normalize

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    @property
    def num_parameters(self) -> int:
        """The number of parameters; of a network that is split over ranks, those of all its parts."""
        if self.group is None:
            return sum(parameter.numel() for parameter in self.parameters())
        return Layout(self, self.group).full_numel

    def state_buffers(self) -> dict[str, Tensor]:
        """Return the persistent buffers by name: what the network knows besides its learned parameters; no copies.

        Policies and checkpoints keep them. Buffers that the settings determine are registered with `persistent=False`.
        """
        state = self.state_dict(keep_vars=True)
        tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        return {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, nn.Parameter)}

    def forward(self, observation: Tensor) -> Tensor:
        """Map observations `[batch, ...]` to the head's output `[batch, actions, ...]`, for computing the loss."""
        inputs = self.inputs(observation)
        output: Tensor = self.head(self.torso(inputs))
        return output.to(inputs.dtype)  # under autocast the output is bf16, too coarse for the loss

    def q_values(self, observation: Tensor) -> Tensor:
        """Map observations `[batch, ...]` to the expected return of each action, `[batch, *action_shape, actions]`."""
        inputs = self.inputs(observation)
        output = self.head.act(self.torso(inputs))
        return self.head.q_values(output.to(inputs.dtype))

    def inputs(self, observation: Tensor) -> Tensor:
        """Return observations `[batch, ...]` as the torso takes them: scaled, and normalized if configured."""
        scaled = scale_observation(observation, self.dtype)
        return scaled if self.normalize is None else self.normalize(scaled)

    def whole(self, full: Tensor) -> QNetwork:
        """Return a copy that is not split; its parameters are views of a flat tensor, in the network's order."""
        whole = whole_network(self, full)
        whole.group = None
        return whole

    def whole_shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each parameter by name; of a network that is split over ranks, that of the whole."""
        if self.group is None:
            return {name: parameter.shape for name, parameter in self.named_parameters()}
        return Layout(self, self.group).whole_shapes

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of a flat tensor of the whole network's parameters, each with its name and shape."""
        shapes = self.whole_shapes()
        parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
        return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}

    def target_copy(self) -> QNetwork:
        """Return the target network: a copy with parameters of its own, which need no gradients.

        It normalizes observations by the same statistics.
        """
        target = copy.deepcopy(self).requires_grad_(False)
        target.normalize = self.normalize
        target.head.become_target()
        return target


def scale_observation(observation: Tensor, dtype: torch.dtype) -> Tensor:
    """Return observations as floats of this dtype, in the same shape; divide uint8 by 255, so that it is in [0, 1]."""
    if observation.dtype == dtype:
        return observation
    scaled = observation.to(dtype)
    return scaled.div_(255) if observation.dtype == torch.uint8 else scaled


def make_network(
    config: NetworkConfig,
    loss: str,
    frame_shape: Sequence[int],
    frame_stack: int,
    is_image: bool,
    actions: int,
    action_shape: tuple[int, ...] = (),
    group: Group | None = None,
) -> QNetwork:
    """Create the Q-network of a run.

    Args:
        config: the settings of torso, hidden layers and head.
        loss: name of the loss of the TD error, in `losses.TD_LOSSES`; used by a scalar head only.
        frame_shape: shape of a single observation, without frame stack.
        frame_stack: number of frames that are stacked to one input.
        is_image: whether observations are images.
        actions: number of actions, in each dimension.
        action_shape: `()`, or `(dimensions,)` where an action has several.
        group: the ranks that hold the network between them; None: this rank holds all of it.

    Raises:
        UserError: the torso does not fit the observation, or the head the actions.
    """
    if action_shape and group:
        raise UserError(
            f"--model-parallel {group.size} does not support actions of several dimensions; use --model-parallel 1"
        )
    if action_shape and config.head == "c51":
        raise UserError(
            "--head c51 is not defined for actions of several dimensions, whose distributions have no mean on its "
            "atoms; use --head scalar, hl-gauss, qr or iqn"
        )
    splitter = Splitter(group, layers=len(config.hidden) + 1) if group else None
    torso, hidden = make_torso(config, frame_shape, frame_stack, is_image, splitter)
    (dimensions,) = action_shape or (1,)
    head = make_head(config, loss, torso.features, hidden, dimensions * actions, dimensions, splitter)
    normalize = Normalize(*frame_shape) if config.normalize_observations else None
    return QNetwork(torso, DecoupledHead(head, dimensions) if action_shape else head, group, normalize)


def make_head(
    config: NetworkConfig,
    loss: str,
    features: int,
    hidden: Sequence[int],
    actions: int,
    dimensions: int = 1,
    splitter: Splitter | None = None,
) -> Head:
    """Create the head that `--head` names.

    Args:
        config: the kind of head, and the options of its layers.
        loss: name of the loss, in `losses.TD_LOSSES`; used by a scalar head only.
        features: number of features that the torso returns.
        hidden: number of units of each hidden layer of the head.
        actions: number of actions, those of all dimensions together.
        dimensions: of an action, for the dueling streams.
        splitter: splits the layers over a group of ranks; None: they are not split.
    """

    def streams(*outputs: int) -> nn.Module:
        return make_streams(features, hidden, actions, outputs, config, splitter, dimensions)

    if config.head == "c51":
        support = torch.linspace(config.v_min, config.v_max, config.atoms)
        return CategoricalHead(streams(config.atoms), support)
    if config.head == "hl-gauss":
        edges = torch.linspace(config.v_min, config.v_max, config.atoms + 1)
        return HLGaussHead(streams(config.atoms), edges, config.hl_gauss_sigma)
    if config.head == "qr":
        return QuantileHead(streams(config.quantiles), config.quantiles)
    if config.head == "iqn":
        return ImplicitQuantileHead(streams(), features, config)
    return ScalarHead(streams(), loss)
