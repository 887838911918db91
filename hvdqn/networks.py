"""Torsos and heads: from an observation to what is known of each action's value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hvdqn.config import NetworkConfig, UserError
from hvdqn.losses import huber_loss, mse_loss, q_learning_target, select

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"huber": huber_loss, "mse": mse_loss}


class Images(nn.Module):
    """Raw image observations as the float planes that convolutions take.

    Frames `[batch, (stack,) H, W]`, `[batch, (stack,) H, W, C]` or `[batch, (stack,) C, H, W]`, the last two told
    apart by which end is smaller, become `[batch, stack x C, H, W]`; uint8 is scaled to [0, 1].
    """

    def __init__(self, frame_shape: Sequence[int], frame_stack: int) -> None:
        super().__init__()
        shape = tuple(frame_shape)
        self.channels_last = len(shape) == 3 and shape[2] < shape[0]
        height_width = shape if len(shape) == 2 else shape[:2] if self.channels_last else shape[1:]
        self.channels_per_frame = 1 if len(shape) == 2 else shape[2] if self.channels_last else shape[0]
        self.planes = (frame_stack * self.channels_per_frame, *height_width)

    def forward(self, observation: Tensor) -> Tensor:
        """`[batch, (stack,) *frame]` raw to `[batch, planes, H, W]` float."""
        if self.channels_last:
            observation = observation.movedim(-1, -3)
        return observation.reshape(-1, *self.planes)


class Mlp(nn.Sequential):
    """Fully connected layers with ReLU over the flattened observation: `[batch, ...]` to `[batch, features]`."""

    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for units in hidden:
            layers += [nn.Linear(inputs, units), nn.ReLU()]
            inputs = units
        super().__init__(*layers)
        self.features = inputs


class Convolutions(nn.Sequential):
    """Convolutions with ReLU, then fully connected layers: `[batch, *frames]` to `[batch, features]`.

    Args:
        images: brings raw frames into planes.
        layers: (filters, kernel, stride) of each convolution.
        hidden: units of the fully connected layers.

    Raises:
        UserError: the image is smaller than the kernels.
    """

    def __init__(
        self, images: Images, layers: Sequence[tuple[int, int, int]], hidden: Sequence[int], name: str
    ) -> None:
        channels, height, width = images.planes
        modules: list[nn.Module] = [images]
        for filters, kernel, stride in layers:
            if min(height, width) < kernel:
                raise UserError(
                    f"--torso {name} cannot take an image of {images.planes[1]} x {images.planes[2]}; "
                    f"use --torso minatar or mlp, or resize it with a --wrapper"
                )
            modules += [nn.Conv2d(channels, filters, kernel, stride), nn.ReLU()]
            channels, height, width = filters, (height - kernel) // stride + 1, (width - kernel) // stride + 1
        mlp = Mlp(channels * height * width, hidden)
        super().__init__(*modules, *mlp)
        self.features = mlp.features


# Mnih et al. 2015, Methods; Young and Tian 2019, section 4.
NATURE = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
MINATAR = ((16, 3, 1),)


def make_torso(
    config: NetworkConfig, frame_shape: Sequence[int], frame_stack: int, is_image: bool
) -> nn.Module:
    """The torso that the configuration names, or that the observation asks for.

    Raises:
        UserError: a convolutional torso for an observation that is no image.
    """
    torso = config.torso
    if torso == "auto":
        torso = (
            "mlp" if not is_image else "nature" if min(Images(frame_shape, 1).planes[1:]) >= 36 else "minatar"
        )
    if torso == "mlp":
        return Mlp(frame_stack * math.prod(frame_shape), config.hidden)
    if not is_image:
        raise UserError(
            f"--torso {torso} needs images, observations are {tuple(frame_shape)}; use --torso mlp"
        )
    layers = NATURE if torso == "nature" else MINATAR
    return Convolutions(Images(frame_shape, frame_stack), layers, config.hidden, torso)


class ScalarHead(nn.Module):
    """One expected return per action (Mnih et al. 2015).

    A head answers for its network: what are the q-values, what should they have been, how wrong is a sample.
    """

    def __init__(self, features: int, actions: int, loss: str) -> None:
        super().__init__()
        self.values = nn.Linear(features, actions)
        self.loss_of = LOSSES[loss]

    def forward(self, features: Tensor) -> Tensor:
        """`[batch, features]` to q `[batch, actions]`."""
        q: Tensor = self.values(features)
        return q

    def q_values(self, output: Tensor) -> Tensor:
        """Expected return of each action, `[batch, actions]`."""
        return output

    def backup(self, output: Tensor, action: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
        """What the taken actions should be worth, given the target network's output for the next observation."""
        return q_learning_target(reward, discount, output, action)

    def loss(self, output: Tensor, action: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and absolute TD error of each sample, both `[batch]`."""
        td_error = goal - select(output, action)
        return self.loss_of(td_error), td_error.detach().abs()


class QNetwork(nn.Module):
    """A torso and a head. Takes raw observations: integers and booleans become floats, uint8 is scaled to [0, 1]."""

    def __init__(self, torso: nn.Module, head: ScalarHead) -> None:
        super().__init__()
        self.torso = torso
        self.head = head

    def forward(self, observation: Tensor) -> Tensor:
        """Raw observation `[batch, ...]` to the head's output `[batch, actions, ...]`."""
        dtype = next(self.parameters()).dtype
        scaled = observation.to(dtype)
        if observation.dtype == torch.uint8:
            scaled = scaled / 255
        output: Tensor = self.head(self.torso(scaled))
        return output

    def q_values(self, observation: Tensor) -> Tensor:
        """Expected return of each action, `[batch, actions]`."""
        return self.head.q_values(self(observation))


def make_network(
    config: NetworkConfig,
    loss: str,
    frame_shape: Sequence[int],
    frame_stack: int,
    is_image: bool,
    actions: int,
) -> QNetwork:
    """The Q-network of a run.

    Raises:
        UserError: the torso does not fit the observation.
    """
    torso = make_torso(config, frame_shape, frame_stack, is_image)
    return QNetwork(torso, ScalarHead(int(torso.features), actions, loss))  # type: ignore[arg-type]
