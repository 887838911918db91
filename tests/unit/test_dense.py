"""Passes written out by hand against autograd, and which networks they cover."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from hvdqn.config import NetworkConfig
from hvdqn.learner import flatten_parameters
from hvdqn.losses import TD_LOSSES, TDLoss
from hvdqn.networks import QNetwork, make_network, make_passes
from hvdqn.networks.dense import DenseNetwork
from hvdqn.networks.heads import ScalarHead
from hvdqn.networks.layers import Dueling
from hvdqn.networks.passes import AutogradPasses

DENSE = {
    "none": {"hidden": ()},
    "one": {"hidden": (16,)},
    "three": {"hidden": (16, 8, 5)},
    "c51": {"hidden": (16,), "head": "c51", "atoms": 7},
    "hl-gauss": {"hidden": (16,), "head": "hl-gauss", "atoms": 7},
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
    """Give every parameter a gradient of NaN, which a backward pass must overwrite."""
    for parameter in made.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    return made


def dense_passes_of(*modules):
    """Return the passes by hand of these modules in a row, or None if there are none."""
    return DenseNetwork.of(QNetwork(nn.Sequential(*modules), ScalarHead(nn.Sequential(), "huber")))


@pytest.mark.parametrize("settings", DENSE.values(), ids=DENSE.keys())
@pytest.mark.parametrize(
    ("shape", "stack"), [((6,), 1), ((6,), 3), ((2, 3), 1)], ids=["flat", "stack", "table"]
)
@pytest.mark.parametrize("rows", [9, 5], ids=["all rows", "first rows"])
def test_gradients_by_hand_equal_those_of_autograd(settings, shape, stack, rows):
    """Of all rows of a forward pass or of its first, as Double DQN needs them."""
    made = with_gradients(network(shape, stack, **settings))
    passes = DenseNetwork.of(made)
    observation = torch.randn(9, *((stack,) if stack > 1 else ()), *shape).double()
    slope = torch.randn(made(observation[:rows]).shape).double()
    for _ in range(2):  # the second time in the memory of the first
        with torch.inference_mode():
            output, traces = passes.forward(observation.numpy().reshape(9, -1))
            passes.backward(traces, slope.clone().numpy())
    by_hand = [parameter.grad.clone() for parameter in made.parameters()]
    with_gradients(made)
    autograd = AutogradPasses(made)
    torch.testing.assert_close(torch.from_numpy(output), autograd.output(observation).detach())
    _, tape = autograd.forward(observation[:rows])
    autograd.backward(tape, slope)
    # NumPy and torch multiply with different libraries, so that the last bits differ.
    torch.testing.assert_close(by_hand, [parameter.grad for parameter in made.parameters()])


@pytest.mark.parametrize("settings", [*DENSE.values(), *NOT_DENSE.values()], ids=[*DENSE, *NOT_DENSE])
def test_passes_compute_what_the_modules_compute(settings):
    made = network(**settings).eval()
    autograd, acting = AutogradPasses(made), make_passes(made)
    observation = torch.randn(5, 6).double()
    with torch.inference_mode():
        torch.manual_seed(1)
        modules = made.head(made.torso(observation))
        for output in (made, autograd.output, lambda observation: autograd.forward(observation)[0]):
            torch.manual_seed(1)
            torch.testing.assert_close(output(observation), modules)
        torch.manual_seed(1)
        actions = made.head.q_values(made.head.act(made.torso(observation)))
        for q_values in (made.q_values, autograd.q_values, acting.q_values):
            torch.manual_seed(1)
            torch.testing.assert_close(q_values(observation), actions)


@pytest.mark.parametrize("settings", NOT_DENSE.values(), ids=NOT_DENSE.keys())
def test_all_other_networks_use_autograd(settings):
    made = with_gradients(network(**settings))
    assert DenseNetwork.of(made) is None
    passes = make_passes(made)
    assert isinstance(passes, AutogradPasses)
    torch.manual_seed(1)
    output, tape = passes.forward(torch.randn(5, 6).double())
    passes.backward(tape, torch.ones_like(output))
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())


def test_networks_that_have_no_passes_by_hand():
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
        assert dense_passes_of(*modules) is None
    assert dense_passes_of(nn.Flatten(), nn.Sequential(one, nn.ReLU()), nn.Linear(2, 2)) is not None


@pytest.mark.parametrize(
    "hook",
    [
        lambda layer: torch.nn.utils.spectral_norm(layer),
        lambda layer: layer.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda layer: layer.register_full_backward_hook(lambda module, inner, outer: None),
    ],
    ids=["spectral norm", "forward", "backward"],
)
def test_layers_with_hooks_use_autograd(hook):
    layers = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    assert dense_passes_of(layers) is not None
    hook(layers[0])
    assert dense_passes_of(layers) is None
    whole = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    whole.register_forward_hook(lambda module, inputs, output: None)
    assert dense_passes_of(whole) is None


def test_passes_of_a_copy_use_its_own_parameters():
    made = network(hidden=(4,))
    target = made.target_copy()
    used = [
        tensor
        for layer in DenseNetwork.of(target).trunk.layers
        for tensor in (torch.from_numpy(layer.weight), layer.bias)
    ]
    for tensor, its, other in zip(used, target.parameters(), made.parameters(), strict=True):
        assert tensor.data_ptr() == its.data_ptr() != other.data_ptr()


def test_passes_use_the_parameters_where_they_are_now():
    """Passes made anew after a move find the new memory, and see what is changed there in place."""
    made = network(hidden=(4,))
    observation = torch.randn(5, 6).double()
    with torch.inference_mode():
        before = make_passes(made).q_values(observation)
    flat = flatten_parameters(made, torch.device("cpu"))
    passes = make_passes(made)
    flat.mul_(2)
    with torch.inference_mode():
        found = passes.q_values(observation)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, made.head(made.torso(observation)))
    torch.testing.assert_close(found, made.q_values(observation))


def test_values_that_are_not_finite_cause_no_warning():
    # In a process of its own, because pytest sets warning filters.
    code = """
import numpy as np, torch
from hvdqn.networks.dense import DenseNetwork
from tests.unit.test_dense import network, with_gradients
made = with_gradients(network(hidden=(4,)))
passes = DenseNetwork.of(made)
with torch.inference_mode():
    output, traces = passes.forward(torch.full((5, 6), torch.inf).double().numpy())
    passes.backward(traces, np.full_like(output, np.nan))
assert all(parameter.grad.isnan().any() for parameter in made.parameters())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


LOG_COSH = TDLoss(value=lambda d: torch.log(torch.cosh(d)), derivative=torch.tanh)


@pytest.mark.parametrize("loss", [*TD_LOSSES, "log-cosh"])
def test_loss_and_gradient_of_a_scalar_head_equal_those_of_autograd(loss, monkeypatch):
    """Also for a loss that is added later: the loss that is logged is its own value."""
    monkeypatch.setitem(TD_LOSSES, "log-cosh", LOG_COSH)
    head = network(loss=loss).head
    output, target = 3 * torch.randn(20, 3).double(), torch.randn(20).double()
    action, weight = torch.randint(3, (20,)), torch.rand(20).double()
    given = [tensor.clone() for tensor in (output, action, target, weight)]
    found = head.loss_and_gradient(output, action, target, weight)
    expected = super(type(head), head).loss_and_gradient(output, action, target, weight)
    assert (found[1] > 1).any()
    assert (found[1] < 1).any()
    torch.testing.assert_close(found, expected)
    td_error = output[torch.arange(20), action] - target
    assert found[0].item() == pytest.approx((weight * TD_LOSSES[loss].value(td_error)).mean().item())
    torch.testing.assert_close([output, action, target, weight], given, rtol=0, atol=0)  # unchanged
