"""Heads, and the dueling and noisy layers in them, against the equations of their papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hvdqn.config import NetworkConfig
from hvdqn.networks import make_network
from hvdqn.networks.heads import HLGaussHead, ImplicitQuantileHead, midpoints
from hvdqn.networks.layers import NoisyLinear

HEADS = ("scalar", "c51", "hl-gauss", "qr", "iqn")
SMALL = {"v_min": -1.0, "v_max": 3.0, "atoms": 5, "quantiles": 7, "iqn_samples": 4, "iqn_target_samples": 6}
OUTPUTS = {"scalar": (), "c51": (5,), "hl-gauss": (5,), "qr": (7,), "iqn": (4, 2)}


def network(head="scalar", inputs=6, actions=3, hidden=(16, 8), **settings):
    torch.manual_seed(0)
    config = NetworkConfig(head=head, hidden=hidden, **{**SMALL, **settings})
    return make_network(config, "huber", (inputs,), 1, is_image=False, actions=actions)


@pytest.mark.parametrize("actions", [1, 3])
@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_has_outputs_targets_losses_and_gradients(head, dueling, actions):
    made = network(head, actions=actions, dueling=dueling)
    observation = torch.randn(5, 6)
    output = made(observation)
    assert output.shape == (5, actions, *OUTPUTS[head])
    assert made.head.q_values(output).shape == (5, actions)
    assert made.q_values(observation).shape == (5, actions)
    next_values = made.head.next_values(made.target_copy()(observation))[:, 0]
    target = made.head.target(next_values, torch.ones(5), torch.full((5,), 0.9))
    losses, priorities = made.head.loss(output[:, 0], target)
    assert losses.shape == priorities.shape == (5,)
    assert (priorities >= 0).all()
    assert not priorities.requires_grad
    losses.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_the_target_after_a_termination_is_the_reward(head):
    """The next state's value does not enter. The reward lies within the support, and far from the ends for hl-gauss."""
    made = network(head, v_min=-4.0, v_max=6.0, atoms=41)
    reward = torch.tensor([0.0, 2.0])
    next_values = made.head.next_values(made(torch.randn(2, 6)))[:, 0]
    target = made.head.target(next_values, reward, torch.zeros(2))
    has_atoms = head in ("c51", "hl-gauss")
    mean = target @ made.head.support if has_atoms else target.view(2, -1).mean(dim=1)
    torch.testing.assert_close(mean, reward)


def test_q_values_of_a_distribution_are_its_mean():
    """Atoms -1, 0, 1, 2, 3; and quantiles 0 to 6."""
    output = torch.log(torch.tensor([[[0.1, 0.2, 0.3, 0.4, 1e-30]]]))
    assert network("c51").head.q_values(output).item() == pytest.approx(-0.1 + 0.3 + 0.8)
    assert network("qr").head.q_values(torch.arange(7.0).view(1, 1, 7)).item() == pytest.approx(3.0)


@pytest.mark.parametrize("head", HEADS)
def test_greedy_returns_the_entry_of_the_largest_q_value(head):
    made = network(head).head
    output = made(torch.randn(5, 16))
    greedy, q_values = made.greedy(output), made.q_values(output)
    for row, q in enumerate(q_values):
        entries = q_values if head == "hl-gauss" else output
        assert torch.equal(greedy[row], entries[row, int(q.argmax())])


def test_fractions_are_the_midpoints_of_equal_parts():
    assert midpoints(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    torch.testing.assert_close(network("qr").head.fraction, (torch.arange(7) + 0.5) / 7)


def test_priorities_by_hand():
    scalar, quantile, c51 = (network(head).head for head in ("scalar", "qr", "c51"))
    assert scalar.loss(torch.tensor([1.0]), torch.tensor([-2.0]))[1].tolist() == [3.0]
    # Pairs of 0..6 with themselves: the mean distance is (n^2 - 1) / 3n.
    numbers = torch.arange(7.0)[None]
    assert quantile.loss(numbers, numbers)[1].item() == pytest.approx(48 / 21)
    logits = torch.randn(1, 5)
    assert c51.loss(logits, torch.softmax(logits, 1))[1].item() == pytest.approx(0.0, abs=1e-6)


# HL-Gauss


def test_hl_gauss_by_hand():
    """Bins of width 1 between -1 and 3, sigma 0.5: y = 1 + 0.5 * 1 = 1.5, the center of the third of four bins.

    Phi(1) - Phi(-1) = 0.682689, Phi(3) - Phi(1) = 0.157305, Phi(5) - Phi(3) = 0.001350 around it, of 0.998650 in all.
    """
    made = network("hl-gauss", atoms=4, hl_gauss_sigma=0.5)
    head = made.head
    assert made.head.support.tolist() == [-0.5, 0.5, 1.5, 2.5]
    target = head.target(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([0.5]))
    expected = np.array([0.00134990, 0.15730536, 0.68268949, 0.15730536])
    assert target[0].tolist() == pytest.approx(expected / expected.sum(), abs=1e-6)
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    assert made.head.q_values(logits[:, None]).item() == pytest.approx(-0.05 + 0.1 + 0.45 + 1.0)
    loss, priority = made.head.loss(logits, target)
    by_hand = sum(p * math.log(p / q) for p, q in zip(target[0].tolist(), (0.1, 0.2, 0.3, 0.4), strict=True))
    assert loss.item() == priority.item() == pytest.approx(by_hand, rel=1e-5)


def test_the_default_sigma_of_hl_gauss_is_that_of_the_paper():
    head = network("hl-gauss", v_min=-10.0, v_max=10.0, atoms=50).head
    assert isinstance(head, HLGaussHead)
    assert head.sigma == pytest.approx(0.75 * 20 / 50)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_target_of_hl_gauss_that_is_not_finite_is_nan(reward):
    head = network("hl-gauss").head
    target = head.target(torch.tensor([0.5, 0.5]), torch.tensor([reward, 1.0]), torch.ones(2))
    assert target[0].isnan().all()
    assert target[1].isfinite().all()


def test_the_gradient_of_hl_gauss_is_softmax_minus_target():
    """Of the logits of the actions taken, divided by the size of the minibatch and times the importance weights."""
    head = network("hl-gauss").head
    output, action, weight = torch.randn(6, 3, 5), torch.tensor([0, 1, 2, 2, 1, 0]), torch.rand(6)
    target = torch.softmax(torch.randn(6, 5), dim=1)
    _, _, gradient = head.loss_and_gradient(output, action, target, weight)
    expected = torch.zeros(6, 3, 5)
    expected[range(6), action] = (
        weight[:, None] / 6 * (torch.softmax(output[range(6), action], dim=1) - target)
    )
    torch.testing.assert_close(gradient, expected)


def test_each_dimension_of_an_action_learns_the_same_target_with_hl_gauss():
    """The loss is the mean over dimensions of the loss of each by itself; so are the priorities."""
    head = network("hl-gauss").head
    output, action = torch.randn(4, 2 * 3, 5), torch.tensor([[0, 2], [1, 1], [2, 0], [0, 0]])
    target, weight = torch.softmax(torch.randn(4, 5), dim=1), torch.rand(4)
    both = head.loss_and_gradient(output, action, target, weight)
    each = [
        head.loss_and_gradient(output[:, 3 * d : 3 * d + 3], action[:, d], target, weight) for d in range(2)
    ]
    torch.testing.assert_close(both[0], (each[0][0] + each[1][0]) / 2)
    torch.testing.assert_close(both[1], (each[0][1] + each[1][1]) / 2)
    torch.testing.assert_close(both[2], torch.cat([each[0][2], each[1][2]], dim=1) / 2)


# IQN


def test_iqn_draws_fractions_uniformly_and_anew_for_each_sample():
    made = network("iqn", iqn_samples=8)
    fraction = made(torch.randn(500, 6))[:, 0, :, 1].detach()
    assert fraction.shape == (500, 8)
    assert fraction.unique().numel() > 3_990
    assert abs(fraction.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 4_000)
    assert np.histogram(fraction, bins=10, range=(0, 1))[0].min() > 400 - 4 * 20
    assert not torch.equal(made(torch.zeros(3, 6))[..., 1], made(torch.zeros(3, 6))[..., 1])


def test_iqn_has_its_own_number_of_fractions_for_each_use():
    made = network("iqn", iqn_samples=4, iqn_target_samples=6, iqn_policy_samples=9)
    observation = torch.randn(5, 6)
    assert made(observation).shape[2] == 4
    assert made.target_copy()(observation).shape[2] == 6
    assert made(observation).shape[2] == 4, "a target copy changed the online network"
    assert made.head.act(made.torso(observation)).shape == (5, 3, 9, 2)


def test_iqn_acts_on_the_same_q_values_every_time():
    made = network("iqn")
    observation = torch.randn(5, 6)
    assert torch.equal(made.q_values(observation), made.q_values(observation))


def test_iqn_embedding_by_loop():
    """phi_j = ReLU(sum_i cos(pi i fraction) w_ij + b_j), multiplied into the features (eq. 4)."""
    made = network("iqn", iqn_embedding=5, hidden=(16,))
    head = made.head
    assert isinstance(head, ImplicitQuantileHead)
    features, fraction = torch.randn(2, 16), torch.rand(2, 3)
    output = head._at(features, fraction)
    weight, bias = head.embedding.weight, head.embedding.bias
    for row in range(2):
        for k in range(3):
            cosines = [math.cos(math.pi * i * fraction[row, k].item()) for i in range(5)]
            phi = [
                max(0.0, sum(cosines[i] * weight[j, i].item() for i in range(5)) + bias[j].item())
                for j in range(16)
            ]
            z = head.streams(features[row] * torch.tensor(phi))
            torch.testing.assert_close(output[row, :, k, 0], z)
            assert (output[row, :, k, 1] == fraction[row, k]).all()


def test_the_mean_over_even_fractions_equals_the_mean_over_many_draws():
    made = network("iqn", iqn_samples=20_000)
    observation = torch.randn(2, 6)
    drawn = made.head.q_values(made(observation))
    torch.testing.assert_close(made.q_values(observation), drawn, atol=5e-3, rtol=0)


# Dueling


@pytest.mark.parametrize("head", HEADS)
def test_only_differences_of_advantages_count(head):
    """A constant added to all advantages changes nothing; one added to the value is added to every action."""
    made = network(head, dueling=True)
    observation = torch.randn(5, 6)

    def output():
        torch.manual_seed(1)
        return made(observation)

    before = output()
    streams = made.head.streams
    outputs = {"c51": 5, "hl-gauss": 5, "qr": 7}.get(head, 1)
    with torch.no_grad():
        bias = next(m for m in reversed(streams.advantage) if hasattr(m, "bias")).bias
        bias.add_(torch.randn(outputs).repeat(3))
    torch.testing.assert_close(output(), before)
    with torch.no_grad():
        next(m for m in reversed(streams.value) if hasattr(m, "bias")).bias.add_(2.0)
    shifted = output()
    if head == "iqn":
        shifted, before = shifted[..., 0], before[..., 0]
    torch.testing.assert_close(shifted, before + 2.0)


def test_dueling_by_hand():
    made = network(dueling=True)
    features = made.torso(torch.randn(5, 6))
    value, advantage = made.head.streams.value(features), made.head.streams.advantage(features)
    for row in range(5):
        mean = sum(advantage[row].tolist()) / 3
        expected = [value[row].item() + a - mean for a in advantage[row].tolist()]
        assert made.head(features)[row].tolist() == pytest.approx(expected, abs=1e-6)


def test_each_stream_has_its_own_hidden_layer():
    """6-16 shared, then 16-8-1 and 16-8-3."""
    made = network(dueling=True)
    assert sum(p.numel() for p in made.torso.parameters()) == 6 * 16 + 16
    assert sum(p.numel() for p in made.head.parameters()) == 2 * (16 * 8 + 8) + (8 + 1) + (8 * 3 + 3)


# Noise


def test_noise_is_drawn_at_each_pass_in_training_and_is_absent_in_evaluation():
    made = network(noisy=True)
    observation = torch.randn(5, 6)
    assert not torch.equal(made(observation), made(observation))
    made.eval()
    assert torch.equal(made(observation), made(observation))


def test_noisy_layer_by_its_equations():
    """Weights mu + sigma e_out e_in^T, bias mu + sigma e_out, e = sgn(n) sqrt|n|."""
    layer = NoisyLinear(4, 3, 0.5)
    with torch.no_grad():
        layer.weight_sigma.uniform_(-1, 1)
        layer.bias_sigma.uniform_(-1, 1)
    inputs = torch.randn(7, 4)
    torch.manual_seed(5)
    output = layer(inputs)
    torch.manual_seed(5)
    out, into = ([math.copysign(math.sqrt(abs(n)), n) for n in torch.randn(k).tolist()] for k in (3, 4))
    for i in range(3):
        weight = [layer.weight[i, j] + layer.weight_sigma[i, j] * out[i] * into[j] for j in range(4)]
        bias = layer.bias[i] + layer.bias_sigma[i] * out[i]
        expected = sum(inputs[:, j] * weight[j] for j in range(4)) + bias
        torch.testing.assert_close(output[:, i], expected)


def test_noisy_layer_is_initialized_as_in_the_paper():
    layer = NoisyLinear(100, 50, 0.4)
    assert layer.weight_sigma.unique().item() == pytest.approx(0.04)
    assert layer.bias_sigma.unique().item() == pytest.approx(0.04)
    assert 0.09 < layer.weight.abs().max() <= 0.1
    assert layer.bias.abs().max() <= 0.1


def test_only_the_layers_of_the_head_are_noisy():
    made = network(noisy=True, dueling=True)
    names = [name for name, module in made.named_modules() if isinstance(module, NoisyLinear)]
    assert len(names) == 4
    assert all(name.startswith("head.streams") for name in names)
    made(torch.randn(5, 6)).sum().backward()
    assert all(
        p.grad.abs().sum() > 0 for name, p in made.named_parameters() if "sigma" in name and "value" in name
    )


def test_layer_norm_comes_before_every_relu():
    made = network(layer_norm=True, dueling=True)
    kinds = [type(module).__name__ for module in made.modules()]
    assert kinds.count("LayerNorm") == kinds.count("ReLU") == 3
    huge = made(1e4 * torch.randn(5, 6))
    assert huge.abs().max() < 100


@pytest.mark.parametrize("head", HEADS)
def test_a_target_is_a_copy_without_gradients(head):
    made = network(head, dueling=True, noisy=True)
    target = made.target_copy()
    for mine, its in zip(made.parameters(), target.parameters(), strict=True):
        assert torch.equal(mine, its)
        assert mine.data_ptr() != its.data_ptr()
        assert not its.requires_grad


@pytest.mark.parametrize("head", HEADS)
def test_bf16_forward_passes_return_the_dtype_of_the_parameters(head):
    made = network(head, noisy=True, dueling=True)
    observation = torch.randn(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, q = made(observation), made.q_values(observation)
    assert output.dtype == q.dtype == torch.float32
    if head == "iqn":
        assert output[..., 1].unique().numel() > 15  # fractions keep their digits: bf16 has 8 bits of them
