"""Create torsos, the layers from an observation to features. `--torso module:attribute` names a class of your own.

    # wide.py, on PYTHONPATH or where the job is started: --torso wide:Wide --hidden 256
    from torch import nn

    class Wide(nn.Sequential):
        # hvdqn calls the class with the shape of one input: (planes of all stacked frames, H, W) for images, (n,) for
        # a vector, (frames, n) for stacked vectors. The module gets floats [batch, *shape], where uint8 observations
        # are divided by 255, and returns [batch, features].
        def __init__(self, shape):
            channels, height, width = shape
            super().__init__(nn.Conv2d(channels, 64, 3), nn.ReLU(), nn.Flatten())

The layers of `--hidden` follow your module, then the head. It must not contain batch norm, whose statistics would
differ between ranks, nor other state that a forward pass changes. Tensors that are not learned must be buffers, with
equal values on every rank; policies keep them, unless they are registered with `persistent=False`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hvdqn.config import NetworkConfig, import_attribute
from hvdqn.errors import UserError
from hvdqn.networks.layers import hidden_layers
from hvdqn.networks.sharded import Splitter
from hvdqn.networks.spectral import SpectralConv2d


class Images(nn.Module):
    """Reshapes images and stacks of images to the channels that `nn.Conv2d` takes, called planes here.

    Inputs `[batch, (stack,) H, W]`, `[batch, (stack,) H, W, C]` or `[batch, (stack,) C, H, W]` become
    `[batch, stack x C, H, W]`. In a frame of three axes, the smaller of the first and the last one is taken for the
    channels; if they are equal, the last one, as in Gymnasium's `[H, W, C]`.

    Args:
        frame_shape: shape of one frame.
        frame_stack: number of frames in one input.
    """

    def __init__(self, frame_shape: Sequence[int], frame_stack: int) -> None:
        super().__init__()
        shape = tuple(frame_shape)
        self.channels_last = len(shape) == 3 and shape[2] <= shape[0]
        height_width = shape if len(shape) == 2 else shape[:2] if self.channels_last else shape[1:]
        self.channels_per_frame = 1 if len(shape) == 2 else shape[2] if self.channels_last else shape[0]
        self.planes = (frame_stack * self.channels_per_frame, *height_width)

    def forward(self, observation: Tensor) -> Tensor:
        """Map images `[batch, (stack,) *frame_shape]` to `[batch, planes, H, W]`."""
        if self.channels_last:
            observation = observation.movedim(-1, -3)
        return observation.reshape(-1, *self.planes)


class Centered(nn.Module):
    """Subtracts from each image the mean of all its pixels, over all planes.

    In most Atari games nearly every pixel shows the same background. It adds the same large constant to every unit of
    the first layer, beside which a ball or a paddle hardly counts.
    """

    def forward(self, image: Tensor) -> Tensor:
        """Subtract from each image the mean of all its pixels; `[batch, ...]` keeps its shape."""
        return image - image.mean(dim=tuple(range(1, image.ndim)), keepdim=True)


class ChannelsLast(nn.Module):
    """Changes the memory format to channels last, which the convolutions after it keep.

    With few planes the backward pass of a convolution is much faster in this format.
    """

    def forward(self, planes: Tensor) -> Tensor:
        """Return the same planes `[batch, planes, H, W]` in channels-last memory format."""
        return planes.contiguous(memory_format=torch.channels_last)


class Torso(nn.Sequential):
    """Maps float observations `[batch, ...]` to features `[batch, features]`, by `layers` in order.

    Args:
        features: number of features that the last layer returns.
        *layers: the modules to call one after the other.
    """

    def __init__(self, features: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.features = features


# (filters, kernel, stride) of each convolution: Mnih et al. 2015, Methods; Young and Tian 2019, section 4.
CONVOLUTIONS = {"nature": ((32, 8, 4), (64, 4, 2), (64, 3, 1)), "minatar": ((16, 3, 1),)}
# Number of filters of each of the three sections of IMPALA's large network: Espeholt et al. 2018, figure 3.
IMPALA = (16, 32, 32)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def make_torso(
    config: NetworkConfig,
    frame_shape: Sequence[int],
    frame_stack: int,
    is_image: bool,
    splitter: Splitter | None = None,
) -> tuple[Torso, tuple[int, ...]]:
    """Return the torso that `--torso` names, and the units of those `--hidden` layers that the head has to create.

    The last hidden layer belongs to the head, so that the two streams of a dueling head each have their own, noisy
    layers include it, and IQN multiplies features by its embedding before it. An MLP with a single hidden layer keeps
    it in the torso.

    Args:
        config: the settings of the network.
        frame_shape: shape of a single observation, without frame stack.
        frame_stack: number of frames that are stacked to one input.
        is_image: whether observations are images.
        splitter: splits the layers over a group of ranks; None: they are not split.

    Raises:
        UserError: the torso cannot take such observations.
    """
    if config.center_images and not is_image:
        raise UserError(
            f"--center-images needs images, observations are {tuple(frame_shape)}; leave it out, "
            f"or give --no-center-images if a preset has it"
        )
    name = config.torso if config.torso != "auto" else _default_torso(frame_shape, is_image)
    if name == "mlp":
        flat = frame_stack == len(frame_shape) == 1
        body = Torso(frame_stack * math.prod(frame_shape), *([] if flat else [nn.Flatten()]))
    elif ":" in name:
        body = _make_own_torso(name, frame_shape, frame_stack, is_image)
    elif not is_image:
        raise UserError(
            f"--torso {name} needs images, observations are {tuple(frame_shape)}; use --torso mlp"
        )
    elif name == "impala":
        body = _impala(Images(frame_shape, frame_stack), config)
    else:
        body = _convolutions(Images(frame_shape, frame_stack), name, config.layer_norm)
    shared = max(len(config.hidden) - 1, 1 if name == "mlp" else 0)
    mine, heads = config.hidden[:shared], config.hidden[shared:]
    layers = hidden_layers(body.features, mine, config, False, splitter)
    centered = [Centered()] if config.center_images else []
    return Torso(mine[-1] if mine else body.features, *centered, *body, *layers), heads


def _default_torso(frame_shape: Sequence[int], is_image: bool) -> str:
    """Return the name of the torso that `--torso auto` stands for.

    An image that is smaller than the smallest convolution kernel gets "mlp", as vectors do.
    """
    smaller_side = min(Images(frame_shape, 1).planes[1:]) if is_image else 0
    if smaller_side >= 36:
        return "nature"
    return "minatar" if smaller_side >= 3 else "mlp"


def _norm(channels: int, layer_norm: bool) -> list[nn.Module]:
    # One group normalizes over all channels and pixels of an image, as LayerNorm does over units.
    return [nn.GroupNorm(1, channels)] if layer_norm else []


def _convolutions(images: Images, name: str, layer_norm: bool) -> Torso:
    channels, height, width = images.planes
    modules: list[nn.Module] = [images, ChannelsLast()]
    for filters, kernel, stride in CONVOLUTIONS[name]:
        if min(height, width) < kernel:
            raise UserError(
                f"--torso {name} cannot take an image of {images.planes[1]} x {images.planes[2]}; "
                f"use --torso minatar or mlp, or resize it with a --wrapper"
            )
        modules += [
            nn.Conv2d(channels, filters, kernel, stride),
            *_norm(filters, layer_norm),
            nn.ReLU(),
        ]
        channels, height, width = filters, (height - kernel) // stride + 1, (width - kernel) // stride + 1
    return Torso(channels * height * width, *modules, nn.Flatten())


class Residual(nn.Module):
    """Computes x + conv(relu(conv(relu(x)))) with 3 x 3 kernels: a residual block of IMPALA (Espeholt et al. 2018).

    Args:
        channels: number of planes in and out.
        config: whether there is layer norm before each ReLU, and whether convolutions have spectral normalization.
    """

    def __init__(self, channels: int, config: NetworkConfig) -> None:
        super().__init__()
        kind = SpectralConv2d if config.spectral_norm else nn.Conv2d
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [
                *_norm(channels, config.layer_norm),
                nn.ReLU(),
                kind(channels, channels, 3, padding=1),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, planes: Tensor) -> Tensor:
        """Return the sum of the input and its convolutions; `[batch, channels, H, W]` keeps its shape."""
        out: Tensor = planes + self.layers(planes)
        return out


def _impala(images: Images, config: NetworkConfig) -> Torso:
    channels, height, width = images.planes
    modules: list[nn.Module] = [images, ChannelsLast()]
    for narrow in IMPALA:
        filters = narrow * config.torso_width
        modules += [
            nn.Conv2d(channels, filters, 3, padding=1),
            nn.MaxPool2d(3, stride=2, padding=1),
            Residual(filters, config),
            Residual(filters, config),
        ]
        channels, height, width = filters, (height + 1) // 2, (width + 1) // 2
    modules += [*_norm(channels, config.layer_norm), nn.ReLU()]
    pool = config.torso_pool
    if pool > min(height, width):
        raise UserError(
            f"--torso-pool {pool} cannot pool the {height} x {width} planes that --torso impala makes of an image of "
            f"{images.planes[1]} x {images.planes[2]}; give {min(height, width)} or less, or 0"
        )
    if pool:
        modules.append(nn.AdaptiveMaxPool2d(pool))
        height = width = pool
    return Torso(channels * height * width, *modules, nn.Flatten())


def _make_own_torso(path: str, frame_shape: Sequence[int], frame_stack: int, is_image: bool) -> Torso:
    """Create a torso from the user's class at `path`, written `module:attribute`.

    Raises:
        UserError: the class cannot be imported, does not create an `nn.Module`, or the module does not map such
            observations to features.
    """
    build: Callable[[tuple[int, ...]], nn.Module] = import_attribute(path, "--torso")
    stack = (frame_stack,) if frame_stack > 1 else ()
    images = [Images(frame_shape, frame_stack)] if is_image else []
    shape = images[0].planes if images else (*stack, *frame_shape)
    try:
        module = build(shape)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--torso '{path}' cannot be made for observations of shape {shape}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(module, nn.Module):
        raise UserError(f"--torso '{path}' gave a {type(module).__name__}; it must be a torch.nn.Module")
    if any(isinstance(part, BATCH_NORMS) for part in module.modules()):
        raise UserError(
            f"--torso '{path}' has batch norm, whose statistics would differ between ranks; use LayerNorm or GroupNorm"
        )
    if not all(parameter.requires_grad for parameter in module.parameters()):
        raise UserError(
            f"--torso '{path}' has parameters that want no gradient, and all are trained; make them buffers"
        )
    before = [buffer.clone() for buffer in module.buffers()]
    features = _width(module, shape, path)
    if not all(map(torch.equal, before, module.buffers())):
        raise UserError(
            f"--torso '{path}' has buffers that a forward pass changes, so that ranks would differ; leave them out"
        )
    return Torso(features, *images, module)


def _width(module: nn.Module, shape: tuple[int, ...], path: str) -> int:
    """Return the number of features that a user's module returns, found by a forward pass of zeros `[2, *shape]`."""
    with torch.no_grad():
        try:
            features = module(torch.zeros(2, *shape))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--torso '{path}' does not take floats of shape [batch, {', '.join(map(str, shape))}]: "
                f"{' '.join(str(error).split())}"
            ) from error
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(f"--torso '{path}' gave {found} for a batch of 2; it must give [batch, features]")
    return features.shape[1]
