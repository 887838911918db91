"""Each equation against numbers computed by hand and against a loop."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hvdqn.config.settings import setting
from hvdqn.losses import (
    TD_LOSSES,
    categorical_loss,
    categorical_projection,
    expectation,
    gaussian_histogram,
    huber_loss,
    lambda_returns,
    mse_loss,
    munchausen_bonus,
    pairwise_td_error,
    q_learning_target,
    quantile_huber_loss,
    scaled_log_policy,
    select,
    soft_policy,
)

DOUBLE = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=DOUBLE)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def test_select_takes_each_rows_action():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert select(values, torch.tensor([1, 0, 1])).tolist() == [2.0, 3.0, 6.0]
    assert select(values[..., None], torch.tensor([1, 0, 1])).tolist() == [[2.0], [3.0], [6.0]]


def test_expectation_averages_over_actions():
    values = tensor([1.0, 2.0], [3.0, 5.0])
    policy = tensor([0.25, 0.75], [1.0, 0.0])
    assert expectation(values, policy).tolist() == [1.75, 3.0]
    quantiles = torch.stack([values, 10 * values], dim=2)
    assert expectation(quantiles, policy).tolist() == [[1.75, 17.5], [3.0, 30.0]]


def test_lambda_returns_by_hand():
    """gamma 0.9, lambda 0.5, V = 10: the second step of one environment terminates, of the other is truncated."""
    reward, value = tensor([1.0, 1.0], [2.0, 2.0], [3.0, 3.0]), torch.full((3, 2), 10.0, dtype=DOUBLE)
    discount = tensor([0.9, 0.9], [0.0, 0.9], [0.9, 0.9])
    trace = tensor([0.5, 0.5], [0.0, 0.0], [0.5, 0.5])
    # 3 + 0.9 x 10 = 12; 2, or 2 + 0.9 x 10 = 11; 1 + 0.9 (5 + 0.5 x 2), or 1 + 0.9 (5 + 0.5 x 11)
    expected = tensor([6.4, 10.45], [2.0, 11.0], [12.0, 12.0])
    torch.testing.assert_close(lambda_returns(reward, discount, value, trace), expected)


@pytest.mark.parametrize("td_lambda", [0.0, 0.3, 1.0])
def test_lambda_returns_are_weighted_n_step_returns(td_lambda):
    """G = (1 - lambda) sum_n lambda^(n-1) G^(n), and what is left of the weight goes to the longest n-step return."""
    reward, value, steps = randn(6, 1), randn(6, 1, seed=1), 6
    discount, trace = torch.full_like(reward, 0.9), torch.full_like(reward, td_lambda)
    found = lambda_returns(reward, discount, value, trace)
    for t in range(steps):
        total = 0.0
        for n in range(1, steps - t + 1):
            rewards = sum(0.9**k * float(reward[t + k]) for k in range(n))
            weight = td_lambda ** (n - 1) * (1.0 if n == steps - t else 1 - td_lambda)
            total += weight * (rewards + 0.9**n * float(value[t + n - 1]))
        assert float(found[t]) == pytest.approx(total)


def test_target_by_hand():
    """r + discount V(s'): 1 + 0.9 x 3; a termination has discount 0 and keeps the reward alone."""
    target = q_learning_target(tensor(1.0, -2.0), tensor(0.9, 0.0), next_value=tensor(3.0, 7.0))
    assert target.tolist() == pytest.approx([3.7, -2.0])
    quantiles = q_learning_target(tensor([1.0], [-2.0]), tensor([0.9], [0.0]), tensor([3.0, 4.0], [7.0, 8.0]))
    assert quantiles.flatten().tolist() == pytest.approx([3.7, 4.6, -2.0, -2.0])


@pytest.mark.parametrize(
    ("td_error", "mse", "huber"),
    [(0.0, 0.0, 0.0), (0.5, 0.125, 0.125), (-1.0, 0.5, 0.5), (3.0, 4.5, 2.5), (-4.0, 8.0, 3.5)],
)
def test_mse_and_huber_by_hand(td_error, mse, huber):
    d = torch.tensor([td_error])
    assert mse_loss(d).item() == pytest.approx(mse)
    assert huber_loss(d).item() == pytest.approx(huber)


def naive_huber(d, delta):
    return 0.5 * d * d if abs(d) <= delta else delta * (abs(d) - delta / 2)


def test_huber_agrees_with_a_loop():
    d = torch.linspace(-5, 5, 101, dtype=DOUBLE)
    torch.testing.assert_close(huber_loss(d, delta=2.0), tensor(*(naive_huber(x, 2.0) for x in d.tolist())))


def test_huber_clips_the_derivative_and_not_the_error():
    """Clipping the error itself, a known bug, would leave no gradient beyond 1."""
    d = torch.tensor([0.3, 10.0, -10.0], requires_grad=True)
    huber_loss(d).sum().backward()
    assert d.grad is not None
    assert d.grad.tolist() == pytest.approx([0.3, 1.0, -1.0])


@pytest.mark.parametrize("name", TD_LOSSES)
def test_every_td_loss_has_the_derivative_that_autograd_computes(name):
    """On errors far inside and outside Huber's corner, and at 0."""
    value, derivative = TD_LOSSES[name]
    td_error = torch.linspace(-5, 5, 101, dtype=DOUBLE, requires_grad=True)
    (expected,) = torch.autograd.grad(value(td_error).sum(), td_error)
    torch.testing.assert_close(derivative(td_error.detach()), expected)


def test_the_loss_setting_accepts_the_names_of_all_td_losses():
    assert set(setting("loss").choices) == set(TD_LOSSES)


# C51: atoms 0, 1, 2, 3.
SUPPORT = tensor(0.0, 1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("probabilities", "reward", "discount", "expected"),
    [
        # 0.5 + 0.5 z: atoms land on 0.5, 1, 1.5, 2; the halves are shared by their neighbours.
        ((0.1, 0.2, 0.3, 0.4), 0.5, 0.5, (0.05, 0.05 + 0.2 + 0.15, 0.15 + 0.4, 0.0)),
        # Back on the atoms themselves, each probability is where it was.
        ((0.1, 0.2, 0.3, 0.4), 0.0, 1.0, (0.1, 0.2, 0.3, 0.4)),
        ((0.1, 0.2, 0.3, 0.4), 1.0, 1.0, (0.0, 0.1, 0.2, 0.7)),  # above the support: on its last atom
        ((0.1, 0.2, 0.3, 0.4), -9.0, 1.0, (1.0, 0.0, 0.0, 0.0)),  # below: on its first
        ((0.1, 0.2, 0.3, 0.4), 99.0, 1.0, (0.0, 0.0, 0.0, 1.0)),
        ((0.1, 0.2, 0.3, 0.4), 1.75, 0.0, (0.0, 0.25, 0.75, 0.0)),  # terminated: the reward alone
        ((0.1, 0.2, 0.3, 0.4), 3.0, 0.0, (0.0, 0.0, 0.0, 1.0)),  # exactly the last atom
    ],
)
def test_categorical_projection_by_hand(probabilities, reward, discount, expected):
    projected = categorical_projection(tensor(probabilities), SUPPORT, tensor(reward), tensor(discount))
    assert projected[0].tolist() == pytest.approx(expected)


def naive_projection(probabilities, support, reward, discount):
    """Bellemare et al. 2017, algorithm 1, atom by atom."""
    projected = [0.0] * len(support)
    spacing = support[1] - support[0]
    for p, z in zip(probabilities, support, strict=True):
        backed_up = min(max(reward + discount * z, support[0]), support[-1])
        place = (backed_up - support[0]) / spacing
        lower, upper = math.floor(place + 1e-12), math.ceil(place - 1e-12)
        if lower == upper:
            projected[lower] += p
        else:
            projected[lower] += p * (upper - place)
            projected[upper] += p * (place - lower)
    return projected


def test_categorical_projection_agrees_with_a_loop():
    batch, support = 64, torch.linspace(-10, 10, 51, dtype=DOUBLE)
    probabilities = torch.softmax(3 * randn(batch, 51), dim=1)
    reward, discount = 8 * randn(batch, seed=1), torch.rand(batch, dtype=DOUBLE).round(decimals=1)
    projected = categorical_projection(probabilities, support, reward, discount)
    for row in range(batch):
        args = probabilities[row].tolist(), support.tolist(), reward[row].item(), discount[row].item()
        assert projected[row].tolist() == pytest.approx(naive_projection(*args), abs=1e-9)
    torch.testing.assert_close(projected.sum(dim=1), torch.ones(batch, dtype=DOUBLE))


def test_the_projection_keeps_the_mean_of_what_stays_inside_the_support():
    support = torch.linspace(-10, 10, 21, dtype=DOUBLE)
    probabilities = torch.softmax(randn(32, 21), dim=1)
    reward, discount = torch.rand(32, dtype=DOUBLE), torch.full((32,), 0.9, dtype=DOUBLE)
    mean = categorical_projection(probabilities, support, reward, discount) @ support
    torch.testing.assert_close(mean, reward + discount * (probabilities @ support))


def normal_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize("sigma", [0.1, 0.3, 2.0, 30.0])
def test_gaussian_histogram_agrees_with_a_loop(sigma):
    """Also for means outside of the bins, which count as their nearest edge."""
    edges, means = torch.linspace(-2, 3, 13, dtype=DOUBLE), tensor(-100.0, -2.0, -1.9, 0.3, 2.99, 3.0, 7.5)
    found = gaussian_histogram(means, edges, sigma)
    for row, mean in enumerate(means.tolist()):
        inside = min(max(mean, -2.0), 3.0)
        cdf = [normal_cdf((edge - inside) / sigma) for edge in edges.tolist()]
        expected = [(after - before) / (cdf[-1] - cdf[0]) for before, after in itertools.pairwise(cdf)]
        assert found[row].tolist() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(7, dtype=DOUBLE))


def test_gaussian_histogram_in_single_precision():
    """No bin is negative or NaN, even where the Gaussian is as narrow as a hundredth of a bin."""
    edges, means = torch.linspace(-1, 1, 52), torch.linspace(-3, 3, 601)
    for sigma in (4e-4, 0.03, 1e3):
        found = gaussian_histogram(means, edges, sigma)
        assert (found >= 0).all()
        torch.testing.assert_close(found.sum(dim=1), torch.ones(601))


def test_the_mean_of_a_histogram_far_from_the_ends_is_that_of_its_gaussian():
    """With the paper's sigma, 0.75 widths of a bin; so Q-values are free of a systematic error."""
    edges = torch.linspace(-10, 10, 51, dtype=DOUBLE)
    centers, means = (edges[1:] + edges[:-1]) / 2, torch.linspace(-7, 7, 400, dtype=DOUBLE)
    found = gaussian_histogram(means, edges, 0.75 * 0.4) @ centers
    assert (found - means).abs().max() < 1e-4 * 0.4


def test_categorical_loss_by_hand():
    """Logits 0 and log 3 are probabilities 1/4 and 3/4; the target is a half each."""
    logits, target = tensor([0.0, math.log(3.0)]), tensor([0.5, 0.5])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert categorical_loss(logits, target).item() == pytest.approx(expected)


def test_categorical_loss_is_zero_at_the_target_and_accepts_certain_targets():
    logits = 3 * randn(8, 51)
    assert categorical_loss(logits, torch.softmax(logits, dim=1)).abs().max() < 1e-12
    certain = torch.zeros(8, 51, dtype=DOUBLE)
    certain[:, 7] = 1.0
    logits.requires_grad_()
    losses = categorical_loss(logits, certain)
    torch.testing.assert_close(losses, -torch.log_softmax(logits, dim=1)[:, 7])
    losses.sum().backward()
    torch.testing.assert_close(logits.grad, torch.softmax(logits, dim=1) - certain)  # the cross-entropy's


def test_pairwise_td_error_by_hand():
    assert pairwise_td_error(tensor([1.0, 2.0]), tensor([5.0, 7.0, 9.0])).tolist() == [[[4, 6, 8], [3, 5, 7]]]


def test_quantile_huber_by_hand():
    """Fractions 1/4 and 3/4, predictions 0 and 2, targets 1 and 4.

    d = target - prediction: for prediction 0: 1, 4; for 2: -1, 2. Huber's: 0.5, 3.5; 0.5, 1.5.
    Weights: 1/4, 1/4; |3/4 - 1|, 3/4. Means over targets: (0.125 + 0.875) / 2, (0.125 + 1.125) / 2.
    """
    d = pairwise_td_error(tensor([0.0, 2.0]), tensor([1.0, 4.0]))
    loss = quantile_huber_loss(d, tensor(0.25, 0.75))
    assert loss.tolist() == pytest.approx([0.5 + 0.625])


@pytest.mark.parametrize("kappa", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("sampled", [False, True], ids=["qr", "iqn"])
def test_quantile_huber_agrees_with_a_loop(kappa, sampled):
    batch, predicted, targets = 6, 5, 7
    prediction, target = 2 * randn(batch, predicted), 2 * randn(batch, targets, seed=1)
    fraction = torch.rand(batch, predicted, dtype=DOUBLE) if sampled else (torch.arange(5.0) + 0.5) / 5
    losses = quantile_huber_loss(pairwise_td_error(prediction, target), fraction, kappa)
    for row in range(batch):
        loop = 0.0
        for i in range(predicted):
            f = float(fraction[row, i] if sampled else fraction[i])
            for j in range(targets):
                d = float(target[row, j] - prediction[row, i])
                loop += abs(f - (1.0 if d < 0 else 0.0)) * naive_huber(d, kappa) / kappa / targets
        assert losses[row].item() == pytest.approx(loop)


def test_the_quantile_loss_is_least_at_the_quantiles():
    """Over targets 0..99 its minimum for fraction 0.9 is at 90 (where Huber's corner is small)."""
    targets = torch.arange(100, dtype=DOUBLE).expand(1, -1)

    def loss(prediction):
        return quantile_huber_loss(
            pairwise_td_error(tensor([prediction]), targets), tensor(0.9), kappa=0.01
        ).item()

    assert min(range(100), key=loss) in (89, 90)


def test_all_equal_quantiles_are_pushed_apart_by_their_fractions():
    """Equal predictions in the middle of the targets: each moves in proportion to its fraction's distance from 1/2."""
    prediction = torch.zeros(1, 4, dtype=DOUBLE, requires_grad=True)
    targets = tensor([-10.0, 10.0])
    quantile_huber_loss(
        pairwise_td_error(prediction, targets), tensor(0.125, 0.375, 0.625, 0.875)
    ).sum().backward()
    assert prediction.grad[0].tolist() == pytest.approx([0.375, 0.125, -0.125, -0.375])


def test_equal_quantiles_at_an_equal_target_have_neither_loss_nor_gradient():
    prediction = torch.full((1, 4), 2.0, dtype=DOUBLE, requires_grad=True)
    loss = quantile_huber_loss(
        pairwise_td_error(prediction, torch.full((1, 3), 2.0)), tensor(0.1, 0.4, 0.6, 0.9)
    )
    loss.sum().backward()
    assert loss.item() == 0.0
    assert prediction.grad.abs().max() == 0.0


def test_scaled_log_policy_by_hand():
    """Temperature 2, q 0 and 2 log 3: probabilities 1/4 and 3/4."""
    q = tensor([0.0, 2 * math.log(3.0)])
    assert scaled_log_policy(q, 2.0)[0].tolist() == pytest.approx([2 * math.log(0.25), 2 * math.log(0.75)])
    policy, entropy = soft_policy(q, 2.0)
    assert policy[0].tolist() == pytest.approx([0.25, 0.75])
    assert entropy.item() == pytest.approx(-2 * (0.25 * math.log(0.25) + 0.75 * math.log(0.75)))


def test_log_policies_of_large_values_are_finite():
    """q / temperature is 1e6 here: an exponential would overflow."""
    q = torch.tensor([[3e4, 3e4 - 1.0, -3e4]])
    assert scaled_log_policy(q, 0.03)[0].tolist() == pytest.approx([0.0, -1.0, -6e4], abs=0.01)
    policy, entropy = soft_policy(q, 0.03)
    assert policy[0].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)
    assert entropy.item() == pytest.approx(0.0, abs=1e-6)


def test_munchausen_bonus_by_hand():
    """tau log pi is 0 for a sure action, -0.5 for one that is 0.5 worse, and never below the clip."""
    q = tensor([0.0, 0.5, 9.0], [0.0, 0.5, 9.0], [0.0, 0.5, 0.0])
    bonus = munchausen_bonus(q, torch.tensor([2, 0, 0]), alpha=0.9, temperature=0.01, clip=-1.0)
    assert bonus.tolist() == pytest.approx([0.0, -0.9, -0.45])


def test_munchausen_agrees_with_a_loop():
    q, action = randn(16, 5), torch.arange(16) % 5
    bonus = munchausen_bonus(q, action, alpha=0.7, temperature=0.3, clip=-0.8)
    policy, entropy = soft_policy(q, 0.3)
    for row in range(16):
        exponentials = [math.exp(x / 0.3) for x in q[row].tolist()]
        pi = [x / sum(exponentials) for x in exponentials]
        log_pi = [0.3 * math.log(x) for x in pi]
        assert bonus[row].item() == pytest.approx(0.7 * max(log_pi[action[row]], -0.8))
        assert policy[row].tolist() == pytest.approx(pi)
        assert entropy[row].item() == pytest.approx(-sum(p * x for p, x in zip(pi, log_pi, strict=True)))


def test_a_soft_value_is_the_scaled_logsumexp():
    """Sum of pi (q - tau log pi) = tau log sum exp(q / tau): what Munchausen bootstraps from (alpha 0: soft DQN)."""
    q = randn(16, 5)
    policy, entropy = soft_policy(q, 0.3)
    torch.testing.assert_close(expectation(q, policy) + entropy, 0.3 * torch.logsumexp(q / 0.3, dim=1))


def test_one_action():
    """Nothing to choose: the policy is sure, its log and its entropy are 0."""
    q, action = tensor([2.0], [3.0]), torch.zeros(2, dtype=torch.int64)
    assert q_learning_target(tensor(1.0, 1.0), tensor(1.0, 1.0), select(q, action)).tolist() == [3.0, 4.0]
    policy, entropy = soft_policy(q, 0.03)
    assert policy.tolist() == [[1.0], [1.0]]
    assert entropy.tolist() == [0.0, 0.0]
    assert munchausen_bonus(q, action, 0.9, 0.03, -1.0).tolist() == [0.0, 0.0]
