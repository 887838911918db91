"""Create the fully connected layers of torsos and heads: plain, with layer norm, noisy, or dueling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdqn.config import NetworkConfig
from hvdqn.networks.sharded import Splitter
from hvdqn.networks.wide import WIDE, WideLinear


class NoisyLinear(nn.Module):
    """A linear layer with learned, factorised Gaussian noise on its weights (Fortunato et al. 2018, eq. 9-11).

        y = (mu_w + sigma_w * e_out e_in^T) x + mu_b + sigma_b * e_out,   e = sgn(n) sqrt|n|,  n ~ N(0, 1)

    Each forward pass in training mode draws new noise from torch's generator, once for the whole batch. In evaluation
    mode there is none.

    Args:
        inputs: number of inputs.
        outputs: number of outputs.
        sigma: sigma_0 of the paper; the initial scale of the noise is sigma / sqrt(inputs).
    """

    def __init__(self, inputs: int, outputs: int, sigma: float) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((outputs, inputs), sigma * bound))
        self.bias_sigma = nn.Parameter(torch.full((outputs,), sigma * bound))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs `[rows, inputs]` to outputs `[rows, outputs]`."""
        if not self.training:
            return functional.linear(inputs, self.weight, self.bias)
        noise_out, noise_in = self._noise()
        # Adding the noise to the weights and multiplying once is faster than multiplying by mu and by sigma.
        weight = torch.addcmul(self.weight, self.weight_sigma, torch.outer(noise_out, noise_in))
        return functional.linear(inputs, weight, torch.addcmul(self.bias, self.bias_sigma, noise_out))

    def _noise(self) -> tuple[Tensor, Tensor]:
        """Draw the noise of the outputs and of the inputs, `[outputs]` and `[inputs]`, in one operation."""
        outputs, inputs = self.weight.shape
        normal = torch.randn(outputs + inputs, dtype=self.weight.dtype, device=self.weight.device)
        noise = normal.abs().sqrt_().copysign_(normal)
        return noise[:outputs], noise[outputs:]


def hidden_layers(
    inputs: int, hidden: Sequence[int], config: NetworkConfig, noisy: bool, splitter: Splitter | None
) -> list[nn.Module]:
    """Return fully connected layers, each followed by layer norm if configured (Ba et al. 2016) and by ReLU.

    Args:
        inputs: number of inputs of the first layer.
        hidden: number of units of each layer.
        config: whether layers have layer norm, and the scale of noise.
        noisy: whether the layers are `NoisyLinear`.
        splitter: splits the layers over a group of ranks; None: they are not split.
    """
    layers: list[nn.Module] = []
    for units in hidden:
        layers.append(linear(inputs, units, config, noisy, splitter))
        if config.layer_norm:
            norm = nn.LayerNorm(units)
            layers.append(splitter.normalize(norm) if splitter else norm)
        layers.append(nn.ReLU())
        inputs = units
    return layers


def linear(
    inputs: int, outputs: int, config: NetworkConfig, noisy: bool, splitter: Splitter | None
) -> nn.Module:
    """Return one fully connected layer, or this rank's part of it.

    It is noisy if asked for, computes with oneDNN if it has many weights, and is `nn.Linear` else.
    """
    if noisy:
        return NoisyLinear(inputs, outputs, config.noisy_sigma)
    layer = (WideLinear if inputs * outputs >= WIDE else nn.Linear)(inputs, outputs)
    return layer if splitter is None else splitter.take(layer)


def make_streams(
    features: int,
    hidden: Sequence[int],
    actions: int,
    outputs: tuple[int, ...],
    config: NetworkConfig,
    splitter: Splitter | None,
    dimensions: int = 1,
) -> nn.Module:
    """Return the layers of a head, which map features `[rows, features]` to outputs `[rows, actions, *outputs]`.

    A stream is one sequence of layers. A dueling head has two, for the state's value and for the actions' advantages.

    Args:
        features: number of input features.
        hidden: number of units of each hidden layer; each stream has its own hidden layers.
        actions: number of actions, those of all dimensions together.
        outputs: shape of the output of one action; () for one number.
        config: whether the head is dueling, and whether layers are noisy or have layer norm.
        splitter: splits the layers over a group of ranks; None: they are not split.
        dimensions: number of dimensions of an action.
    """

    def stream(*shape: int) -> nn.Sequential:
        own = splitter.fork() if splitter else None
        layers = hidden_layers(features, hidden, config, config.noisy, own)
        last = linear(hidden[-1] if hidden else features, math.prod(shape), config, config.noisy, own)
        return nn.Sequential(*layers, last, *([nn.Unflatten(1, shape)] if len(shape) > 1 else []))

    advantage = stream(actions, *outputs)
    return Dueling(advantage, stream(1, *outputs), dimensions) if config.dueling else advantage


class Dueling(nn.Module):
    """Combines two streams of layers, for the state's value and the actions' advantages (Wang et al. 2016, eq. 9).

        q(s, a) = v(s) + adv(s, a) - mean_a' adv(s, a')

    With several outputs per action, such as C51's atoms, this holds for each of them (Hessel et al. 2018), and with
    several dimensions of an action for the actions of each dimension (Tavakoli et al. 2018, eq. 1).

    Args:
        advantage: maps `[rows, features]` to `[rows, actions, ...]`.
        value: maps `[rows, features]` to `[rows, 1, ...]`.
        dimensions: number of dimensions of an action.
    """

    def __init__(self, advantage: nn.Module, value: nn.Module, dimensions: int = 1) -> None:
        super().__init__()
        self.advantage = advantage
        self.value = value
        self.dimensions = dimensions

    def forward(self, features: Tensor) -> Tensor:
        """Map features `[rows, features]` to outputs of each action `[rows, actions, ...]`."""
        advantage: Tensor = self.advantage(features)
        value: Tensor = self.value(features)
        if self.dimensions > 1:
            each = torch.unflatten(advantage, 1, (self.dimensions, -1))
            return value + (each - each.mean(dim=2, keepdim=True)).flatten(1, 2)
        return value + advantage - advantage.mean(dim=1, keepdim=True)
