"""The learner on one rank: the gradient, the targets, the optimizer step and the target network."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from hvdqn.config import Config, LearningConfig, NetworkConfig
from hvdqn.learner import Learner, learning_rate
from hvdqn.losses import select
from hvdqn.networks import make_network
from hvdqn.optimizers import RAdam
from hvdqn.parts import batch_factor
from hvdqn.replay import Batch


def make_batch(size=16, inputs=4, actions=3, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return Batch(
        observation=rng.normal(size=(size, inputs)).astype(dtype),
        action=rng.integers(actions, size=size),
        reward=rng.normal(size=size).astype(np.float32),
        next_observation=rng.normal(size=(size, inputs)).astype(dtype),
        discount=np.where(rng.random(size) < 0.2, 0, 0.99).astype(np.float32),
        weight=np.ones(size, np.float32),
        row_ids=np.arange(size),
    )


def make_learner(
    dtype=torch.float32, network=None, autocast=False, device="cpu", batch_factor=1.0, **settings
):
    torch.manual_seed(3)
    network_config = network or NetworkConfig(hidden=(32,))
    loss = settings.get("loss", "huber")
    made = make_network(network_config, loss, (4,), 1, is_image=False, actions=3).to(dtype)
    config = LearningConfig(**{"lr": 1e-3, "lr_scaling": "none", **settings})
    return Learner(made, config, torch.device(device), batch_factor, autocast)


def returns_of(batch):
    """Return the minibatch as `Rollout` makes them: rewards are whole returns, and there is no next observation."""
    none = batch.next_observation[:0]
    return dataclasses.replace(batch, next_observation=none, discount=np.zeros_like(batch.discount))


def weighted(batch, weight):
    """Return the minibatch with this importance weight for every transition."""
    return dataclasses.replace(batch, weight=np.full(len(batch.reward), weight, np.float32))


def update(learner, batch):
    """Take a step; return the statistics of the minibatch."""
    statistics = learner.compute_gradient(batch)
    assert learner.apply_gradient(progress=1.0, largest_weight=float(batch.weight.max()))
    return statistics


def test_parameters_and_gradients_are_views_of_flat_tensors():
    learner = make_learner()
    message = learner.allocate_gradient(trailing=5)
    learner.parameters.fill_(0.5)
    assert all((p == 0.5).all() for p in learner.online.parameters())
    learner.compute_gradient(make_batch())
    flat = torch.cat([p.grad.reshape(-1) for p in learner.online.parameters()])
    assert torch.equal(flat, learner.gradient)
    assert learner.gradient.data_ptr() == message.data_ptr()
    assert len(message) == len(learner.gradient) + 5
    assert (message[-5:] == 0).all()


def test_the_gradient_is_scaled_where_ranks_sum_it():
    plain, scaled = make_learner(torch.float64), make_learner(torch.float64)
    scaled.allocate_gradient(scale=0.25)
    statistics = plain.compute_gradient(make_batch()), scaled.compute_gradient(make_batch())
    torch.testing.assert_close(scaled.gradient, plain.gradient / 4)
    assert torch.equal(statistics[0][:3], statistics[1][:3])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "radam", "rmsprop", "sgd"])
def test_updates_equal_plain_pytorch(double, optimizer):
    """The flat, in-place learner against textbook code on a separate copy of the network."""
    learner = make_learner(double=double, optimizer=optimizer, max_grad_norm=0.5, loss="mse")
    plain, target = copy.deepcopy(learner.online), copy.deepcopy(learner.target)
    optimizers = {
        "adam": lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-8),
        "radam": lambda p: torch.optim.RAdam(p, lr=1e-3, eps=1e-8),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, alpha=0.95, eps=1e-8, centered=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    }
    reference = optimizers[optimizer](plain.parameters())
    for seed in range(20):
        batch = make_batch(seed=seed)
        update(learner, batch)
        obs, next_obs = torch.from_numpy(batch.observation), torch.from_numpy(batch.next_observation)
        with torch.no_grad():
            best = (plain if double else target)(next_obs).argmax(1, keepdim=True)
            goal = torch.from_numpy(batch.reward) + torch.from_numpy(batch.discount) * target(
                next_obs
            ).gather(1, best).squeeze(1)
        d = goal - plain(obs).gather(1, torch.from_numpy(batch.action)[:, None]).squeeze(1)
        reference.zero_grad()
        (0.5 * d * d).mean().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        reference.step()
    expected = torch.nn.utils.parameters_to_vector(plain.parameters())
    torch.testing.assert_close(learner.parameters, expected, rtol=1e-4, atol=1e-6)


def test_radam_skips_steps_on_the_device_and_else_equals_pytorch():
    """Among the first steps, which leave out the second moment, and among the later ones."""
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(50, generator=generator)
    plain = parameters.clone().requires_grad_()
    optimizer, reference = RAdam(parameters, 1e-8), torch.optim.RAdam([plain], lr=1e-2, eps=1e-8)
    for step in range(30):
        gradient, skipped = torch.randn(50, generator=generator), step in (0, 3, 12)
        before = [tensor.clone() for tensor in (parameters, *optimizer.moments().values())]
        optimizer.step(gradient, torch.tensor(1e-2), torch.tensor(float(skipped)))
        if skipped:
            assert all(map(torch.equal, before, (parameters, *optimizer.moments().values())))
        else:
            plain.grad = gradient
            reference.step()
        torch.testing.assert_close(parameters, plain.detach(), rtol=1e-5, atol=1e-6)


def test_whole_returns_are_learned_without_target_network_and_next_observations():
    """The gradient is that of 1/2 (Q(s, a) - G)^2, whatever the target network says."""
    learner = make_learner(torch.float64, loss="mse")
    learner.target_parameters.fill_(torch.nan)
    batch = returns_of(make_batch())
    for dense in (learner.dense, None):
        learner.dense = dense
        learner.compute_gradient(batch)
        q = learner.online(torch.from_numpy(batch.observation).double())
        d = q.gather(1, torch.from_numpy(batch.action)[:, None]).squeeze(1) - torch.from_numpy(batch.reward)
        expected = torch.autograd.grad((0.5 * d * d).mean(), list(learner.online.parameters()))
        flat = torch.cat([g.reshape(-1) for g in expected])
        torch.testing.assert_close(learner.gradient, flat)
        torch.testing.assert_close(learner.td_errors, d.detach().abs())


def test_learning_lowers_the_loss_on_one_batch():
    learner, batch = make_learner(lr=1e-2), make_batch()
    first = float(update(learner, batch)[0])
    for _ in range(100):
        update(learner, batch)
    assert float(update(learner, batch)[0]) < first / 10


@pytest.mark.parametrize("reward", [np.nan, np.inf])
@pytest.mark.parametrize("head", ["scalar", "c51", "hl-gauss", "qr", "iqn"])
def test_the_fourth_statistic_shows_a_reward_that_is_not_finite(head, reward):
    learner = make_learner(network=NetworkConfig(hidden=(32,), **{**SMALL_HEADS, "head": head}))
    batch = make_batch()
    assert learner.compute_gradient(batch)[3].isfinite()
    batch.reward[3] = reward
    assert not learner.compute_gradient(batch)[3].isfinite()


def test_a_gradient_that_is_not_finite_is_not_applied():
    learner = make_learner(target_tau=0.25)
    update(learner, make_batch())
    before = {name: tensor.clone() for name, tensor in learner.state().items()}
    norm = learner.grad_norm
    learner.compute_gradient(make_batch())
    learner.gradient[7] = torch.nan
    assert not learner.apply_gradient(progress=1.0)
    for name, tensor in learner.state().items():
        assert torch.equal(tensor, before[name]), name
    assert learner.grad_norm == norm


def test_the_target_is_copied_or_follows_the_online_network():
    hard = make_learner()
    before = hard.target_parameters.clone()
    update(hard, make_batch())
    assert torch.equal(hard.target_parameters, before)
    hard.update_target()
    assert torch.equal(hard.target_parameters, hard.parameters)
    hard.update_target(before)
    assert torch.equal(hard.target_parameters, before)

    soft = make_learner(target_tau=0.25)
    before = soft.target_parameters.clone()
    update(soft, make_batch())
    torch.testing.assert_close(soft.target_parameters, 0.75 * before + 0.25 * soft.parameters)

    # With twice the batch there are half the updates, and one moves the target as far as two would: 1 - 0.75^2.
    factor = batch_factor(Config().replace(batch_per_rank=16, lr_reference_batch=8), size=1)
    assert make_learner(target_tau=0.25, batch_factor=factor).target_tau == pytest.approx(0.4375)


def test_state_round_trip_continues_bit_for_bit():
    first, second = make_learner(), make_learner()
    for seed in range(5):
        update(first, make_batch(seed=seed))
    second.load_state({name: value.clone() for name, value in first.state().items()})
    for seed in range(5, 10):
        update(first, make_batch(seed=seed))
        update(second, make_batch(seed=seed))
    assert first.sha256() == second.sha256()


def test_the_norm_is_clipped_after_weights_are_normalised():
    plain, heavy = (make_learner(torch.float64, max_grad_norm=0.1) for _ in range(2))
    update(plain, make_batch())
    update(heavy, weighted(make_batch(), 50.0))
    assert plain.grad_norm > 0.1
    assert heavy.grad_norm == pytest.approx(plain.grad_norm)
    torch.testing.assert_close(heavy.gradient, plain.gradient)
    assert float(plain.gradient.norm()) == pytest.approx(0.1)


def test_td_errors_and_statistics_by_hand():
    """Q-values of the separate networks, put together in NumPy."""
    learner = make_learner(torch.float64, double=False, loss="mse")
    batch = weighted(make_batch(), 3.0)
    q = learner.online.q_values(torch.from_numpy(batch.observation).double()).detach().numpy()
    next_q = learner.target.q_values(torch.from_numpy(batch.next_observation).double()).numpy()
    expected = np.abs(batch.reward + batch.discount * next_q.max(axis=1) - q[np.arange(16), batch.action])
    loss, td_error, q_mean, _ = learner.compute_gradient(batch).tolist()
    np.testing.assert_allclose(learner.td_errors.numpy(), expected, rtol=1e-6)
    assert td_error == pytest.approx(expected.mean())
    assert q_mean == pytest.approx(q.mean())
    assert loss == pytest.approx(3 * (expected**2).mean() / 2)


def test_munchausen_target_by_loop():
    """r + alpha [tau log pi(a|s)]_clip + discount sum_a' pi(a'|s') (q(s', a') - tau log pi(a'|s'))."""
    learner = make_learner(
        torch.float64, munchausen=True, double=False, munchausen_temperature=0.2, munchausen_clip=-0.3
    )
    batch = make_batch()
    q = learner.target.q_values(torch.from_numpy(batch.observation)).numpy()
    next_q = learner.target.q_values(torch.from_numpy(batch.next_observation)).numpy()
    online = learner.online.q_values(torch.from_numpy(batch.observation)).detach().numpy()
    learner.compute_gradient(batch)
    td_errors = learner.td_errors.numpy()
    clipped = 0
    for row in range(16):
        pi, next_pi = (np.exp(x[row] / 0.2) / np.exp(x[row] / 0.2).sum() for x in (q, next_q))
        log_pi = 0.2 * math.log(pi[batch.action[row]])
        clipped += log_pi < -0.3
        expected = batch.reward[row] + 0.9 * max(log_pi, -0.3)
        expected += batch.discount[row] * (next_pi * (next_q[row] - 0.2 * np.log(next_pi))).sum()
        assert td_errors[row] == pytest.approx(abs(expected - online[row, batch.action[row]]), rel=1e-5)
    assert 0 < clipped < 16


SMALL_HEADS = {
    "v_min": -2.0,
    "v_max": 2.0,
    "atoms": 11,
    "quantiles": 5,
    "iqn_samples": 4,
    "iqn_target_samples": 6,
}


@pytest.mark.parametrize("head", ["scalar", "c51", "hl-gauss", "qr", "iqn"])
def test_double_chooses_by_the_online_network_and_evaluates_by_the_target(head):
    learner = make_learner(network=NetworkConfig(hidden=(32,), head=head, **SMALL_HEADS), double=True)
    plain = make_learner(network=NetworkConfig(hidden=(32,), head=head, **SMALL_HEADS), double=False)
    assert torch.equal(plain.target_parameters, learner.target_parameters)
    learner.parameters.add_(0.3 * torch.randn(learner.parameters.shape))
    batch = make_batch(64)
    tensors = [
        torch.from_numpy(getattr(batch, name))
        for name in ("observation", "action", "reward", "next_observation", "discount")
    ]
    target, reward, next_observation, discount = learner.target, *tensors[2:]
    torch.manual_seed(1)  # IQN draws fractions
    next_output = target(next_observation)
    chosen = learner.online.q_values(next_observation).argmax(dim=1)
    best = target.head.q_values(next_output).argmax(dim=1)
    next_values = target.head.next_values(next_output)
    assert 0 < (chosen != best).sum() < 64
    for one, action in ((learner, chosen), (plain, best)):
        torch.manual_seed(1)
        found = one.td_target(*tensors)
        assert torch.equal(found, target.head.target(select(next_values, action), reward, discount))


@pytest.mark.parametrize("munchausen", [False, True])
@pytest.mark.parametrize("dueling", [False, True])
def test_only_forward_passes_compute_in_bf16(munchausen, dueling):
    """Targets and losses in bf16 would be off by 1%, and autocast would compute every matrix product in it."""
    network = NetworkConfig(hidden=(32,), dueling=dueling)
    learner = make_learner(network=network, double=not munchausen, munchausen=munchausen, autocast=True)
    casting = {}

    def watch(owner, name):
        method = getattr(owner, name)

        def watched(*args):
            casting.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
            return method(*args)

        setattr(owner, name, watched)

    for network in (learner.online, learner.target):
        for name in ("forward", "q_values"):
            watch(network, name)
        for name in ("target", "loss_and_gradient"):
            watch(network.head, name)
    statistics = learner.compute_gradient(make_batch())
    assert casting == {
        "forward": {True},
        "q_values": {True},
        "target": {False},
        "loss_and_gradient": {False},
    }
    assert statistics.dtype == learner.gradient.dtype == torch.float32


def test_batch_factor_by_hand():
    """The global batch over the reference batch; a server takes a step for each minibatch of one worker."""
    config = Config().replace(batch_per_rank=32)
    assert batch_factor(config, size=4) == 4.0
    assert batch_factor(config.replace(lr_reference_batch=16), size=4) == 8.0
    assert batch_factor(config.replace(lr_reference_batch=64), size=1) == 0.5
    assert batch_factor(config.replace(sync="parameters"), size=4) == 4.0
    assert batch_factor(config.replace(sync="server"), size=4) == 1.0


def test_epsilon_of_the_optimizer_depends_on_the_global_batch():
    """0.01 / 16 on one rank with a batch of 16 becomes 0.01 / 64 on four."""
    settings = {"optimizer_eps": 0.01 / 16, "lr_reference_batch": 16}
    factor = batch_factor(Config().replace(batch_per_rank=16, **settings), size=4)
    fixed, scaled = (
        make_learner(batch_factor=factor, **settings, optimizer_eps_scaling=scaling)
        for scaling in ("none", "inverse")
    )
    assert fixed.optimizer.eps == pytest.approx(0.01 / 16)
    assert scaled.optimizer.eps == pytest.approx(0.01 / 64)


@pytest.mark.parametrize(
    ("scaling", "ranks", "progress", "expected"),
    [
        ("none", 8, 1.0, 1.0),
        ("sqrt", 4, 1.0, 2.0),
        ("sqrt", 100, 1.0, 3.0),  # capped
        ("linear", 4, 1.0, 4.0),
        ("linear", 4, 0.05, 2.5),  # half-way through the warm-up
        ("sqrt", 1, 0.0, 1.0),  # one rank: nothing to scale, nothing to warm up
    ],
)
def test_learning_rate_by_hand(scaling, ranks, progress, expected):
    config = Config().replace(lr=1.0, lr_scaling=scaling, lr_warmup=0.1, batch_per_rank=32)
    factor = batch_factor(config, ranks)
    assert learning_rate(config.learning, factor, progress) == pytest.approx(expected)


def test_learning_rate_falls_to_its_final_share():
    config = LearningConfig(lr=1.0, lr_final=0.1)
    rates = [learning_rate(config, 1.0, progress) for progress in (0.0, 0.5, 1.0, 1.5)]
    assert rates == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_a_step_uses_the_learning_rate_at_this_progress():
    learner = make_learner(torch.float64, optimizer="sgd", lr=1.0, lr_final=0.1, max_grad_norm=0.0)
    before = learner.parameters.clone()
    learner.compute_gradient(make_batch())
    assert learner.apply_gradient(progress=0.5)
    assert learner.lr == pytest.approx(0.55)
    torch.testing.assert_close(learner.parameters, before - 0.55 * learner.gradient)


@pytest.mark.parametrize("network", [{}, {"dueling": True}, {"noisy": True}, {"head": "iqn"}])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_gradient_overwrites_the_one_before(network, autocast):
    """Such as the average of the ranks, which the last exchange left there."""
    learner = make_learner(
        network=NetworkConfig(hidden=(32,), **{**SMALL_HEADS, **network}), autocast=autocast
    )
    gradients = []
    for before in (0.0, 5.0):
        learner.gradient.fill_(before)
        torch.manual_seed(1)
        learner.compute_gradient(make_batch())
        gradients.append(learner.gradient.clone())
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)
