"""The update in two halves, on one process."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from hvdqn.clock import Clock
from hvdqn.comm import connect
from hvdqn.comm.local import LocalComm
from hvdqn.config import LearningConfig, NetworkConfig, ParallelConfig
from hvdqn.errors import NonFiniteError
from hvdqn.learner import LEARNED, REPORTED, Learner, learning_rate
from hvdqn.losses import select
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import make_network
from hvdqn.replay import Batch
from hvdqn.sync import make_sync

REPORT = (0.0, 2.0, 30.0, 12.0, 1.0, 20.0)


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
    dtype=torch.float32, comm=None, network=None, autocast=False, record=None, device="cpu", **settings
):
    torch.manual_seed(3)
    parts = network or NetworkConfig(hidden=(32,))
    loss = settings.get("loss", "huber")
    made = make_network(parts, loss, (4,), 1, is_image=False, actions=3).to(dtype)
    config = LearningConfig(**{"lr": 1e-3, "lr_scaling": "none", **settings})
    comm = comm or connect("local")
    return Learner(
        made,
        config,
        comm,
        make_sync(ParallelConfig(), comm, Clock(1, 1, 1.0, 0)),
        16,
        PhaseTimer(),
        torch.device(device),
        autocast,
        record,
    )


class Together(LocalComm):
    """Ranks in one process: an exchange is done when the last of them has joined it."""

    def __init__(self, rank, peers):
        super().__init__()
        self.rank, self.size, self.peers, self.sent = rank, len(peers), peers, None
        peers[rank] = self

    def allreduce_sum_async(self, tensor, name):
        self.sent = tensor
        if all(peer.sent is not None for peer in self.peers):
            total = torch.stack([peer.sent for peer in self.peers]).sum(dim=0)
            for peer in self.peers:
                peer.sent.copy_(total)
                peer.sent = None
        return super().allreduce_sum_async(tensor, name)


def make_ranks(size, **settings):
    peers = [None] * size
    return [make_learner(comm=Together(rank, peers), **settings) for rank in range(size)]


def weighted(batch, weight):
    return dataclasses.replace(batch, weight=np.full(len(batch.reward), weight, np.float32))


def update(learner, batch):
    learner.begin_update(batch, REPORT)
    learner.finish_update()


def test_parameters_and_gradients_are_views_of_flat_tensors():
    learner = make_learner()
    learner.parameters.fill_(0.5)
    assert all((p == 0.5).all() for p in learner.online.parameters())
    learner.backward(make_batch())
    flat = torch.cat([p.grad.reshape(-1) for p in learner.online.parameters()])
    assert torch.equal(flat, learner.gradient)
    assert learner.gradient.data_ptr() == learner.message.data_ptr()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "sgd"])
def test_updates_equal_plain_pytorch(double, optimizer):
    """The flat, in-place learner against textbook code on an ordinary network."""
    learner = make_learner(double=double, optimizer=optimizer, max_grad_norm=0.5, loss="mse")
    learner.online.head.loss_of = lambda d: 0.5 * d * d
    plain, target = copy.deepcopy(learner.online), copy.deepcopy(learner.target)
    kinds = {
        "adam": lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-8),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, alpha=0.95, eps=1e-8, centered=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    }
    reference = kinds[optimizer](plain.parameters())
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


def test_learning_lowers_the_loss_on_one_batch():
    learner, batch = make_learner(lr=1e-2), make_batch()
    update(learner, batch)
    first = learner.drain()["loss"]
    for _ in range(100):
        update(learner, batch)
    learner.drain()
    update(learner, batch)
    assert learner.drain()["loss"] < first / 10


@pytest.mark.parametrize("head", ["scalar", "c51", "qr", "iqn"])
def test_an_infinite_reward_is_skipped_whatever_the_head(head):
    """C51's projection would clip it to the last atom."""
    learner = make_learner(network=NetworkConfig(hidden=(32,), **{**SMALL_HEADS, "head": head}))
    before, batch = learner.parameters.clone(), make_batch()
    batch.reward[3] = np.inf
    update(learner, batch)
    assert learner.skipped_updates == 1
    assert torch.equal(learner.parameters, before)


def test_a_non_finite_gradient_skips_the_update_and_leaves_everything_as_it_was():
    learner = make_learner(max_skipped_updates=3)
    update(learner, make_batch())
    before, learned = learner.sha256(), learner.drain()["loss"]
    assert math.isfinite(learned)
    spoilt = make_batch()
    spoilt.reward[3] = np.nan
    update(learner, spoilt)
    assert learner.sha256() == before
    assert learner.skipped_updates == 1
    assert math.isnan(learner.drain()["loss"])  # no update, no mean
    update(learner, make_batch())
    assert learner.sha256() != before
    assert learner.skipped_in_a_row == 0
    for _ in range(2):
        update(learner, spoilt)
    with pytest.raises(NonFiniteError, match=r"3 updates in a row .* rank 0"):
        update(learner, spoilt)


def test_trailer_sums_reports_and_averages_learning():
    learner = make_learner()
    for _ in range(2):
        update(learner, make_batch())
    learner.exchange(REPORT)
    values = learner.drain()
    assert [values[name] for name in REPORTED] == pytest.approx([0.0, 6.0, 90.0, 36.0, 3.0, 60.0])
    assert all(math.isfinite(values[name]) for name in LEARNED)


def test_a_vote_to_stop_is_heard_in_the_update_that_carries_it():
    learner = make_learner()
    learner.begin_update(make_batch(), (1.0, *REPORT[1:]))
    assert not learner.stop_voted
    learner.finish_update()
    assert learner.stop_voted


def test_hard_sync_copies_and_tau_follows():
    hard = make_learner()
    began = hard.target_parameters.clone()
    update(hard, make_batch())
    assert torch.equal(hard.target_parameters, began)
    assert hard.sync_target() == []
    assert torch.equal(hard.target_parameters, hard.parameters)

    soft = make_learner(target_tau=0.25)
    began = soft.target_parameters.clone()
    update(soft, make_batch())
    torch.testing.assert_close(soft.target_parameters, 0.75 * began + 0.25 * soft.parameters)

    # Twice the batch, half the updates: one of them does what two would have done, 1 - 0.75^2.
    assert make_learner(target_tau=0.25, lr_reference_batch=8).target_tau == pytest.approx(0.4375)


def test_state_round_trip_continues_bit_for_bit():
    first, second = make_learner(), make_learner()
    for seed in range(5):
        update(first, make_batch(seed=seed))
    second.load_state({name: value.clone() for name, value in first.state().items()})
    for seed in range(5, 10):
        update(first, make_batch(seed=seed))
        update(second, make_batch(seed=seed))
    assert first.sha256() == second.sha256()


def test_importance_weights_are_divided_by_the_largest_of_all_ranks():
    """Two ranks, one with weights of 4 and one with weights of 1: the second counts for a quarter of the first."""
    ranks = make_ranks(2, dtype=torch.float64, max_grad_norm=0.0)
    batches = [make_batch(seed=0), make_batch(seed=1)]
    alone = make_learner(torch.float64)
    gradients, losses = [], []
    for batch in batches:
        losses.append(alone.backward(batch)[0])
        gradients.append(alone.gradient.clone())
    for learner, batch, weight in zip(ranks, batches, (4.0, 1.0), strict=True):
        learner.begin_update(weighted(batch, weight), REPORT)
    for learner in ranks:
        learner.finish_update()
        torch.testing.assert_close(learner.gradient, (gradients[0] + gradients[1] / 4) / 2)
        assert learner.drain()["loss"] == pytest.approx(float(losses[0] + losses[1] / 4) / 2)
    assert ranks[0].sha256() == ranks[1].sha256()


def test_the_norm_is_clipped_after_weights_are_normalised():
    plain, heavy = (make_learner(torch.float64, max_grad_norm=0.1) for _ in range(2))
    update(plain, make_batch())
    update(heavy, weighted(make_batch(), 50.0))
    assert plain.grad_norm > 0.1
    assert heavy.grad_norm == pytest.approx(plain.grad_norm)
    torch.testing.assert_close(heavy.gradient, plain.gradient)
    assert float(plain.gradient.norm()) == pytest.approx(0.1)


def test_a_rank_without_a_minibatch_leaves_weights_and_average_to_the_others():
    ranks = make_ranks(3, dtype=torch.float64, max_grad_norm=0.0)
    alone = make_learner(torch.float64)
    alone.backward(make_batch())
    for learner, batch in zip(ranks, (make_batch(), None, make_batch()), strict=True):
        learner.begin_update(weighted(batch, 7.0) if batch else None, REPORT)
    told = [learner.finish_update() for learner in ranks]
    for learner in ranks:
        torch.testing.assert_close(learner.gradient, alone.gradient)
    assert [len(rows) for rows, _ in told] == [16, 0, 16]
    assert [len(td_errors) for _, td_errors in told] == [16, 0, 16]


def test_an_update_says_how_wrong_each_sample_was():
    learner = make_learner(torch.float64, double=False)
    batch = make_batch()
    q = learner.online.q_values(torch.from_numpy(batch.observation)).detach().numpy()
    next_q = learner.target.q_values(torch.from_numpy(batch.next_observation)).numpy()
    expected = np.abs(batch.reward + batch.discount * next_q.max(axis=1) - q[np.arange(16), batch.action])
    learner.begin_update(batch, REPORT)
    rows, td_errors = learner.finish_update()
    assert (rows == batch.row_ids).all()
    np.testing.assert_allclose(td_errors, expected, rtol=1e-6)


def test_munchausen_goal_by_loop():
    """r + alpha [tau log pi(a|s)]_clip + discount sum_a' pi(a'|s') (q(s', a') - tau log pi(a'|s'))."""
    learner = make_learner(
        torch.float64, munchausen=True, double=False, munchausen_temperature=0.2, munchausen_clip=-0.3
    )
    batch = make_batch()
    q = learner.target.q_values(torch.from_numpy(batch.observation)).numpy()
    next_q = learner.target.q_values(torch.from_numpy(batch.next_observation)).numpy()
    online = learner.online.q_values(torch.from_numpy(batch.observation)).detach().numpy()
    learner.begin_update(batch, REPORT)
    _, td_errors = learner.finish_update()
    clipped = 0
    for row in range(16):
        pi, next_pi = (np.exp(x[row] / 0.2) / np.exp(x[row] / 0.2).sum() for x in (q, next_q))
        log_pi = 0.2 * math.log(pi[batch.action[row]])
        clipped += log_pi < -0.3
        goal = batch.reward[row] + 0.9 * max(log_pi, -0.3)
        goal += batch.discount[row] * (next_pi * (next_q[row] - 0.2 * np.log(next_pi))).sum()
        assert td_errors[row] == pytest.approx(abs(goal - online[row, batch.action[row]]), rel=1e-5)
    assert 0 < clipped < 16


SMALL_HEADS = {
    "v_min": -2.0,
    "v_max": 2.0,
    "atoms": 11,
    "quantiles": 5,
    "iqn_samples": 4,
    "iqn_target_samples": 6,
}


@pytest.mark.parametrize("head", ["scalar", "c51", "qr", "iqn"])
def test_double_lets_the_online_network_choose_and_the_target_value(head):
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
    torch.manual_seed(1)  # of the fractions that IQN draws
    next_output = target(next_observation)
    chosen = learner.online.q_values(next_observation).argmax(dim=1)
    best = target.head.q_values(next_output).argmax(dim=1)
    assert 0 < (chosen != best).sum() < 64
    for one, action in ((learner, chosen), (plain, best)):
        torch.manual_seed(1)
        goal = one._goal(*tensors)
        assert torch.equal(goal, target.head.goal(select(next_output, action), reward, discount))


@pytest.mark.parametrize("munchausen", [False, True])
@pytest.mark.parametrize("dueling", [False, True])
def test_bf16_is_for_forward_passes_alone(munchausen, dueling):
    """Goals and losses in bf16 would be off by 1%, and autocast takes every matrix product in it."""
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
        watch(network, "forward")
        for name in ("goal", "slope"):
            watch(network.head, name)
    loss, _, _ = learner.backward(make_batch())
    assert casting == {"forward": {True}, "goal": {False}, "slope": {False}}
    assert loss.dtype == learner.gradient.dtype == torch.float32


def test_epsilon_of_the_optimizer_follows_the_global_batch():
    """0.01 / 16 on one rank with a batch of 16 is 0.01 / 64 on four."""
    settings = {"optimizer_eps": 0.01 / 16, "lr_reference_batch": 16}
    fixed, follows = (
        make_ranks(4, **settings, optimizer_eps_scaling=scaling)[0] for scaling in ("none", "inverse")
    )
    assert fixed.optimizer.eps == pytest.approx(0.01 / 16)
    assert follows.optimizer.eps == pytest.approx(0.01 / 64)


@pytest.mark.parametrize(
    ("scaling", "global_batch", "done", "expected"),
    [
        ("none", 256, 1.0, 1.0),
        ("sqrt", 128, 1.0, 2.0),
        ("sqrt", 3200, 1.0, 3.0),  # capped
        ("linear", 128, 1.0, 4.0),
        ("linear", 128, 0.05, 2.5),  # half-way through the warm-up
        ("sqrt", 32, 0.0, 1.0),  # one rank: nothing to scale, nothing to warm up
    ],
)
def test_learning_rate_by_hand(scaling, global_batch, done, expected):
    config = LearningConfig(lr=1.0, lr_scaling=scaling, lr_warmup=0.1)
    assert learning_rate(config, global_batch, 32, done) == pytest.approx(expected)


def test_learning_rate_falls_to_its_final_share():
    config = LearningConfig(lr=1.0, lr_final=0.1)
    assert [learning_rate(config, 32, 32, done) for done in (0.0, 0.5, 1.0)] == pytest.approx(
        [1.0, 0.55, 0.1]
    )


@pytest.mark.parametrize("hidden", [(), (32, 16)])
@pytest.mark.parametrize("head", ["scalar", "c51", "qr"])
@pytest.mark.parametrize("munchausen", [False, True])
def test_gradients_by_hand_are_those_of_autograd(head, hidden, munchausen):
    settings = {
        "network": NetworkConfig(hidden=hidden, head=head, **SMALL_HEADS),
        "munchausen": munchausen,
        "double": not munchausen,
    }
    by_hand, by_autograd = make_learner(torch.float64, **settings), make_learner(torch.float64, **settings)
    assert by_hand.differentiable == by_hand.online.by_hand
    by_autograd.differentiable, by_autograd.no_grad = by_autograd.online.by_autograd, torch.no_grad
    batch = weighted(make_batch(), 0.7)
    found, expected = by_hand.backward(batch), by_autograd.backward(batch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(by_hand.gradient, by_autograd.gradient)
    by_hand.begin_update(batch, REPORT)
    by_hand.finish_update()


@pytest.mark.parametrize("network", [{}, {"dueling": True}, {"noisy": True}, {"head": "iqn"}])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_gradient_is_that_of_the_loss_alone_however_it_is_made(network, autocast):
    """What was there before, such as the average of the ranks, is overwritten."""
    learner = make_learner(
        network=NetworkConfig(hidden=(32,), **{**SMALL_HEADS, **network}), autocast=autocast
    )
    gradients = []
    for before in (0.0, 5.0):
        learner.gradient.fill_(before)
        torch.manual_seed(1)
        learner.backward(make_batch())
        gradients.append(learner.gradient.clone())
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)
