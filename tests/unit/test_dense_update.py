"""The gradient of small networks worked out by hand, against autograd and against numbers by hand."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from hvdqn.config import NetworkConfig
from hvdqn.dense_update import DenseCategorical, DenseHLGauss, DenseQuantile, DenseScalar
from hvdqn.networks import make_network
from hvdqn.networks.heads import CategoricalHead, HLGaussHead, QuantileHead, ScalarHead
from tests.unit.test_learner import SMALL_HEADS, make_batch, make_learner, returns_of, update

TARGETS = {
    "dqn": {"double": False},
    "double": {"double": True},
    "munchausen": {
        "double": False,
        "munchausen": True,
        "munchausen_temperature": 0.2,
        "munchausen_clip": -0.3,
    },
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread, as training does for small networks; more would wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1, user_api="blas"):
        yield
    torch.set_num_threads(threads)


def by_autograd(learner):
    """Return the learner, made to compute its gradients by autograd."""
    assert learner.dense is not None
    learner.dense = None
    return learner


def make_pair(dtype, **settings):
    """Return two equal learners, the first by hand, the second by autograd; their target networks differ from them."""
    pair = [make_learner(dtype, **settings) for _ in range(2)]
    torch.manual_seed(5)
    moved = pair[0].parameters + 0.1 * torch.randn(len(pair[0].parameters)).to(dtype)
    for learner in pair:
        learner.parameters.copy_(moved)
    return pair[0], by_autograd(pair[1])


def weighted_batch(seed=0, size=16):
    batch = make_batch(size, seed=seed)
    batch.weight[:] = np.random.default_rng(seed).random(size) + 0.1
    return batch


@pytest.mark.parametrize("hidden", [(), (8,), (8, 6)], ids=["linear", "one hidden", "two hidden"])
@pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "layer norm"])
@pytest.mark.parametrize("dueling", [False, True], ids=["single", "dueling"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("head", "loss"),
    [("scalar", "huber"), ("scalar", "mse"), ("c51", "huber"), ("hl-gauss", "huber"), ("qr", "huber")],
)
def test_it_equals_autograd(head, loss, target, dueling, layer_norm, hidden):
    """Loss, mean Q-value, TD errors and every number of the gradient, in float64; again after a step."""
    network = NetworkConfig(hidden=hidden, head=head, dueling=dueling, layer_norm=layer_norm, **SMALL_HEADS)
    pair = make_pair(torch.float64, network=network, loss=loss, **TARGETS[target])
    for learner in pair:
        learner.allocate_gradient(trailing=3, scale=1 / 3)
        learner.gradient.fill_(torch.nan)
    by_autograd(pair[1])
    for seed in range(2):
        batch = weighted_batch(seed)
        found, expected = (learner.compute_gradient(batch) for learner in pair)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(pair[0].td_errors, pair[1].td_errors)
        torch.testing.assert_close(pair[0].gradient, pair[1].gradient)
        for learner in pair:
            assert learner.apply_gradient(progress=0.5, largest_weight=float(batch.weight.max()))
        torch.testing.assert_close(pair[0].parameters, pair[1].parameters)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head", ["scalar", "c51", "hl-gauss", "qr"])
def test_it_equals_autograd_with_whole_returns(head, target):
    network = NetworkConfig(hidden=(8,), head=head, dueling=True, layer_norm=True, **SMALL_HEADS)
    pair = make_pair(torch.float64, network=network, **TARGETS[target])
    for seed in range(2):
        batch = returns_of(weighted_batch(seed))
        found, expected = (learner.compute_gradient(batch) for learner in pair)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(pair[0].td_errors, pair[1].td_errors)
        torch.testing.assert_close(pair[0].gradient, pair[1].gradient)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head", ["scalar", "c51", "hl-gauss", "qr"])
def test_after_100_updates_parameters_equal_those_of_autograd(head, target):
    """In float32: the order of additions differs, so that the last bits do."""
    network = NetworkConfig(hidden=(32, 16), head=head, dueling=True, layer_norm=True, **SMALL_HEADS)
    pair = make_pair(torch.float32, network=network, target_tau=0.05, optimizer_eps=1e-4, **TARGETS[target])
    before = pair[0].parameters.clone()
    for seed in range(100):
        for learner in pair:
            update(learner, make_batch(32, seed=seed))
    moved = (pair[1].parameters - before).norm()
    assert (pair[0].parameters - pair[1].parameters).norm() < 1e-4 * moved
    torch.testing.assert_close(pair[0].target_parameters, pair[1].target_parameters, rtol=1e-4, atol=1e-5)


def test_two_runs_have_the_same_bits():
    digests = []
    for _ in range(2):
        learner = make_learner(network=NetworkConfig(hidden=(32, 16), dueling=True, layer_norm=True))
        for seed in range(20):
            update(learner, make_batch(64, seed=seed))
        digests.append(learner.sha256())
    assert digests[0] == digests[1]


def test_bytes_are_scaled_and_minibatches_may_change_their_size():
    pair = make_pair(torch.float64)
    for size in (16, 5, 16):
        batch = make_batch(size, seed=size, dtype=np.uint8)
        found, expected = (learner.compute_gradient(batch) for learner in pair)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(pair[0].gradient, pair[1].gradient)


def test_results_are_not_overwritten_by_the_next_minibatch():
    learner = make_learner()
    first = learner.compute_gradient(make_batch()), learner.td_errors
    before = [tensor.clone() for tensor in first]
    learner.compute_gradient(make_batch(seed=1))
    assert all(map(torch.equal, first, before))


@pytest.mark.parametrize(
    ("network", "autocast"),
    [({"noisy": True}, False), ({"head": "iqn"}, False), ({}, True)],
    ids=["noisy", "iqn", "bf16"],
)
def test_other_networks_use_autograd(network, autocast):
    learner = make_learner(
        network=NetworkConfig(hidden=(8,), **{**SMALL_HEADS, **network}), autocast=autocast
    )
    assert learner.dense is None


def test_a_head_of_another_class_uses_autograd():
    network = make_network(NetworkConfig(hidden=(8,)), "huber", (4,), 1, is_image=False, actions=3)
    network.head.__class__ = type("Own", (ScalarHead,), {})
    learner = make_learner()
    learner.online = network
    learner.allocate_gradient()
    assert learner.dense is None


def test_a_scalar_head_by_hand():
    head = DenseScalar(ScalarHead(torch.nn.Sequential(), "huber"))
    reward, discount = np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.5, 0.0])
    target = head.target(np.array([4.0, 6.0, 8.0]), reward, discount)
    assert target.tolist() == [3.0, 5.0, 3.0]
    losses, priorities, derivative = head.losses(np.array([3.5, 3.0, 3.0]), target)
    assert losses.tolist() == [0.125, 1.5, 0.0]  # 1/2 d^2 within 1, |d| - 1/2 beyond
    assert priorities.tolist() == [0.5, 2.0, 0.0]
    assert derivative.tolist() == [0.5, -1.0, 0.0]


def test_a_categorical_head_by_hand():
    """Atoms -1, 0, 1 and equal probabilities, moved by 0.5, by 0 with a termination, and beyond both ends."""
    head = DenseCategorical(CategoricalHead(torch.nn.Sequential(), torch.tensor([-1.0, 0.0, 1.0]).double()))
    reward, discount = np.array([0.5, 0.25, 9.0, -9.0]), np.array([1.0, 0.0, 1.0, 1.0])
    target = head.target(np.zeros((4, 3)), reward, discount)
    # Of -0.5, 0.5 and 1.5: halves of two thirds, and all of the last. Of 0.25: three quarters stay at 0.
    expected = [[1 / 6, 1 / 3, 1 / 2], [0, 3 / 4, 1 / 4], [0, 0, 1], [1, 0, 0]]
    np.testing.assert_allclose(target, expected, atol=1e-12)
    losses, priorities, derivative = head.losses(np.zeros((1, 3)), np.array([[0.0, 0.75, 0.25]]))
    assert losses == pytest.approx([0.75 * np.log(0.75 * 3) + 0.25 * np.log(0.25 * 3)])
    assert priorities == pytest.approx(losses)
    np.testing.assert_allclose(derivative, [[1 / 3, 1 / 3 - 3 / 4, 1 / 3 - 1 / 4]])
    assert head.q_values(np.zeros((1, 2, 3))).tolist() == [[0.0, 0.0]]


def test_an_hl_gauss_head_by_hand():
    """Two bins, of centers -0.5 and 0.5, sigma 1: the Gaussian around 0.5 * 0.25 - 0.125 = 0 has a half in each."""
    head = DenseHLGauss(HLGaussHead(torch.nn.Sequential(), torch.tensor([-1.0, 0.0, 1.0]).double(), 1.0))
    values = head.next_values(np.log([[0.25, 0.75], [0.5, 0.5]]))
    assert values == pytest.approx([0.25, 0.0])
    target = head.target(values, np.array([-0.125, 1.0]), np.array([0.5, 0.5]))
    assert target[0] == pytest.approx([0.5, 0.5])
    # Around 1: Phi(0) - Phi(-1) of Phi(0) - Phi(-2).
    assert target[1, 1] == pytest.approx(0.341345 / 0.477250, rel=1e-5)


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("head", ["c51", "hl-gauss"])
def test_a_reward_that_is_not_finite_makes_its_categorical_target_nan(head, reward):
    if head == "c51":
        head = DenseCategorical(CategoricalHead(torch.nn.Sequential(), torch.linspace(-1, 1, 3).double()))
    else:
        head = DenseHLGauss(HLGaussHead(torch.nn.Sequential(), torch.linspace(-1, 1, 4).double(), 1.0))
    next_values = head.next_values(np.zeros((2, 3)))
    target = head.target(next_values, np.array([reward, 0.0]), np.ones(2))
    assert np.isnan(target[0]).all()
    assert np.isfinite(target[1]).all()


def test_a_quantile_head_by_hand():
    """Two quantiles, at 1/4 and 3/4, predicted 0 and 2; targets 0.5 and 4."""
    head = DenseQuantile(QuantileHead(torch.nn.Sequential(), 2))
    assert head.q_values(np.array([[[0.0, 2.0]]], np.float32)).tolist() == [[1.0]]
    target = head.target(np.array([[1.0, 8.0]]), np.zeros(1), np.full(1, 0.5))
    assert target.tolist() == [[0.5, 4.0]]
    losses, priorities, derivative = head.losses(np.array([[0.0, 2.0]]), target)
    # d of 0: 0.5, 4, weight 1/4 each. d of 2: -1.5 with weight 1/4, 2 with weight 3/4.
    first, second = (0.25 * 0.125 + 0.25 * 3.5) / 2, (0.25 * 1.0 + 0.75 * 1.5) / 2
    assert losses == pytest.approx([first + second])
    assert priorities == pytest.approx([(0.5 + 4 + 1.5 + 2) / 4])
    np.testing.assert_allclose(derivative, [[-(0.25 * 0.5 + 0.25) / 2, -(-0.25 + 0.75) / 2]])


def test_values_that_are_not_finite_cause_no_warning():
    # In a process of its own, because pytest sets warning filters.
    code = """
import numpy as np
from hvdqn.config import NetworkConfig
from tests.unit.test_learner import SMALL_HEADS, make_batch, make_learner
for head in ("scalar", "c51", "hl-gauss", "qr"):
    for munchausen in (False, True):
        network = NetworkConfig(hidden=(4,), head=head, dueling=True, **SMALL_HEADS)
        learner = make_learner(network=network, munchausen=munchausen, double=not munchausen)
        batch = make_batch()
        batch.reward[:2] = np.inf, -np.inf
        assert not learner.compute_gradient(batch)[3].isfinite()
        batch.observation[:] = np.inf
        assert not learner.compute_gradient(batch)[3].isfinite()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
