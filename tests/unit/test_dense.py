"""Fully connected networks as one piece: their derivative written out is autograd's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from hvdqn.config import NetworkConfig
from hvdqn.learner import flatten_parameters
from hvdqn.networks import make_network
from hvdqn.networks.dense import Dense
from hvdqn.networks.layers import Dueling

DENSE = {
    "none": {"hidden": ()},
    "one": {"hidden": (16,)},
    "three": {"hidden": (16, 8, 5)},
    "c51": {"hidden": (16,), "head": "c51", "atoms": 7},
    "qr": {"hidden": (16, 8), "head": "qr", "quantiles": 5},
    "layer norm": {"hidden": (16, 8), "layer_norm": True},
    "dueling": {"hidden": (16, 8), "dueling": True},
    "dueling at once": {"hidden": (), "dueling": True},
    "dueling c51": {"hidden": (16, 8), "dueling": True, "head": "c51", "atoms": 7, "layer_norm": True},
}
NOT_DENSE = {"noisy": {"noisy": True}, "iqn": {"head": "iqn"}}


def network(shape=(6,), stack=1, is_image=False, loss="huber", **settings):
    torch.manual_seed(0)
    return make_network(NetworkConfig(**settings), loss, shape, stack, is_image, actions=3).double()


def with_gradients(made):
    for parameter in made.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)  # to be overwritten
    return made


def gradients_of(made, differentiate, observation, slope):
    output, pull_back = differentiate(with_gradients(made), observation)
    pull_back(slope)
    return output, [parameter.grad.clone() for parameter in made.parameters()]


@pytest.mark.parametrize("settings", DENSE.values(), ids=DENSE.keys())
@pytest.mark.parametrize(
    ("shape", "stack"), [((6,), 1), ((6,), 3), ((2, 3), 1)], ids=["flat", "stack", "table"]
)
def test_the_derivative_by_hand_is_that_of_autograd(settings, shape, stack):
    made = network(shape, stack, **settings)
    assert made.dense is not None
    observation = torch.randn(9, *((stack,) if stack > 1 else ()), *shape).double()
    slope = torch.randn(made(observation).shape).double()
    with torch.inference_mode():
        output, by_hand = gradients_of(made, type(made).by_hand, observation, slope)
    expected, by_autograd = gradients_of(made, type(made).by_autograd, observation, slope)
    torch.testing.assert_close(output, expected)  # products of another library: not bit for bit
    torch.testing.assert_close(by_hand, by_autograd)


@pytest.mark.parametrize("settings", [*DENSE.values(), *NOT_DENSE.values()], ids=[*DENSE, *NOT_DENSE])
def test_a_network_as_one_piece_is_its_modules(settings):
    made = network(**settings).eval()
    observation = torch.randn(5, 6).double()
    with torch.no_grad():
        torch.manual_seed(1)
        modules = made.head(made.torso(observation))
        torch.manual_seed(1)
        torch.testing.assert_close(made(observation), modules)
        torch.manual_seed(1)
        actions = made.head.q_values(made.head.act(made.torso(observation)))
        torch.manual_seed(1)
        torch.testing.assert_close(made.q_values(observation), actions)


@pytest.mark.parametrize("settings", NOT_DENSE.values(), ids=NOT_DENSE.keys())
def test_anything_else_is_left_to_autograd(settings):
    made = network(**settings)
    assert made.dense is None
    torch.manual_seed(1)
    output, pull_back = made.by_autograd(torch.randn(5, 6).double())
    with_gradients(made)
    pull_back(torch.ones_like(output))
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())


def test_what_is_no_row_of_linear_layers():
    one, tied = nn.Linear(2, 2), nn.Linear(2, 2)
    tied.weight = one.weight
    for modules in [
        (),
        (nn.ReLU(), one),
        (one, nn.ReLU(), nn.ReLU()),
        (one, nn.Tanh()),
        (one, nn.Flatten()),
        (one, nn.Unflatten(1, (2, 1)), one),
        (nn.Linear(2, 2, bias=False),),
        (type("Own", (nn.Linear,), {})(2, 2),),
        (type("Own", (nn.Sequential,), {"forward": lambda self, x: -x})(one),),
        (nn.Sequential(),),
        (nn.LayerNorm(2), one),
        (one, nn.LayerNorm(2, elementwise_affine=False)),
        (one, nn.LayerNorm(2, bias=False)),
        (type("Own", (Dueling,), {})(one, one),),
        (one, nn.ReLU(), nn.LayerNorm(2)),
        (one, nn.Unflatten(1, (1, 2)), Dueling(one, one)),
        (Dueling(one, nn.Tanh()),),
        (Dueling(one, one),),
        (one, nn.ReLU(), one),
        (one, nn.ReLU(), tied),
    ]:
        assert Dense.of(*modules) is None
    assert Dense.of(nn.Flatten(), nn.Sequential(one, nn.ReLU()), nn.Linear(2, 2)) is not None


@pytest.mark.parametrize(
    "hook",
    [
        lambda layer: torch.nn.utils.spectral_norm(layer),
        lambda layer: layer.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda layer: layer.register_full_backward_hook(lambda module, inner, outer: None),
    ],
    ids=["spectral norm", "forward", "backward"],
)
def test_layers_with_hooks_are_left_to_autograd(hook):
    layers = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    assert Dense.of(layers) is not None
    hook(layers[0])
    assert Dense.of(layers) is None
    whole = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    whole.register_forward_hook(lambda module, inputs, output: None)
    assert Dense.of(whole) is None


def test_a_copy_looks_at_its_own_parameters():
    made = network(hidden=(4,))
    target = made.target_copy()
    mine = [tensor for layer in target.dense.trunk.layers for tensor in (layer.weight, layer.bias)]
    assert all(copied is own for copied, own in zip(mine, target.parameters(), strict=True))


def test_weights_are_found_where_they_were_moved_to():
    made = network(hidden=(4,))
    observation = torch.randn(5, 6).double()
    with torch.inference_mode():
        made.q_values(observation)
    flatten_parameters(made, torch.device("cpu")).mul_(2)
    with torch.inference_mode():
        found = made.q_values(observation)
    torch.testing.assert_close(found, made.head(made.torso(observation)))


def test_what_is_not_finite_comes_out_without_a_warning():
    # Pytest has filters of its own, hence another process.
    code = """
import torch
from tests.unit.test_dense import network, with_gradients
made = with_gradients(network(hidden=(4,)))
with torch.inference_mode():
    output, pull_back = made.by_hand(torch.full((5, 6), torch.inf).double())
    pull_back(torch.full_like(output, torch.nan))
assert all(parameter.grad.isnan().any() for parameter in made.parameters())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_the_slope_of_a_scalar_head_is_that_of_autograd(loss):
    head = network(loss=loss).head
    output, goal = 3 * torch.randn(20, 3).double(), torch.randn(20).double()
    action, weight = torch.randint(3, (20,)), torch.rand(20).double()
    found = head.slope(output, action, goal, weight)
    expected = super(type(head), head).slope(output, action, goal, weight)
    assert (found[1] > 1).any()
    assert (found[1] < 1).any()
    torch.testing.assert_close(found, expected)
