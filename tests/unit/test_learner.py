"""The update in two halves, on one process."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from hvdqn.comm import connect
from hvdqn.config import LearningConfig, NetworkConfig
from hvdqn.learner import LEARNED, REPORTED, Learner, NonFiniteError, learning_rate
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import make_network
from hvdqn.replay import Batch
from hvdqn.sync import make_sync

REPORT = (0.0, 2.0, 30.0, 12.0)


def make_batch(size=16, inputs=4, actions=3, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return Batch(
        observation=rng.normal(size=(size, inputs)).astype(dtype),
        action=rng.integers(actions, size=size),
        reward=rng.normal(size=size).astype(np.float32),
        next_observation=rng.normal(size=(size, inputs)).astype(dtype),
        discount=np.where(rng.random(size) < 0.2, 0, 0.99).astype(np.float32),
        weight=np.ones(size, np.float32),
        rows=np.arange(size),
    )


def make_learner(dtype=torch.float32, **settings):
    torch.manual_seed(3)
    network = make_network(NetworkConfig(hidden=(32,)), "huber", (4,), 1, is_image=False, actions=3).to(dtype)
    config = LearningConfig(**{"lr": 1e-3, "lr_scaling": "none", **settings})
    comm = connect("local")
    return Learner(
        network, config, comm, make_sync("gradients", comm), 16, PhaseTimer(), torch.device("cpu")
    )


def update(learner, batch):
    learner.begin_update(batch, REPORT)
    learner.finish_update()


def test_parameters_and_gradients_are_views_of_flat_tensors():
    learner = make_learner()
    learner.parameters.data.fill_(0.5)
    assert all((p == 0.5).all() for p in learner.online.parameters())
    learner.backward(make_batch())
    flat = torch.cat([p.grad.reshape(-1) for p in learner.online.parameters()])
    assert torch.equal(flat, learner.gradient)
    assert learner.gradient.data_ptr() == learner.message.data_ptr()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_updates_equal_plain_pytorch(double, optimizer):
    """The flat, in-place learner against textbook code on an ordinary network."""
    learner = make_learner(double=double, optimizer=optimizer, max_grad_norm=0.5, loss="mse")
    learner.online.head.loss_of = lambda d: 0.5 * d * d
    plain, target = copy.deepcopy(learner.online), copy.deepcopy(learner.target)
    kinds = {
        "adam": lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-8),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, alpha=0.95, eps=1e-8, centered=True),
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
    torch.testing.assert_close(learner.parameters.data, expected, rtol=1e-4, atol=1e-6)


def test_learning_lowers_the_loss_on_one_batch():
    learner, batch = make_learner(lr=1e-2), make_batch()
    update(learner, batch)
    first = learner.drain()["loss"]
    for _ in range(100):
        update(learner, batch)
    learner.drain()
    update(learner, batch)
    assert learner.drain()["loss"] < first / 10


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
    with pytest.raises(NonFiniteError, match="3 updates in a row .* rank 0"):
        for _ in range(3):
            update(learner, spoilt)


def test_trailer_sums_reports_and_averages_learning():
    learner = make_learner()
    for _ in range(2):
        update(learner, make_batch())
    learner.exchange(REPORT)
    values = learner.drain()
    assert [values[name] for name in REPORTED] == pytest.approx([0.0, 6.0, 90.0, 36.0])
    assert all(math.isfinite(values[name]) for name in LEARNED)


def test_a_vote_to_stop_is_heard_in_the_update_that_carries_it():
    learner = make_learner()
    learner.begin_update(make_batch(), (1.0, 0.0, 0.0, 0.0))
    assert not learner.stop_voted
    learner.finish_update()
    assert learner.stop_voted


def test_hard_sync_copies_and_tau_follows():
    hard = make_learner()
    began = hard.target_parameters.clone()
    update(hard, make_batch())
    assert torch.equal(hard.target_parameters, began)
    assert hard.sync_target() == []
    assert torch.equal(hard.target_parameters, hard.parameters.data)

    soft = make_learner(target_tau=0.25)
    began = soft.target_parameters.clone()
    update(soft, make_batch())
    torch.testing.assert_close(soft.target_parameters, 0.75 * began + 0.25 * soft.parameters.data)


def test_state_round_trip_continues_bit_for_bit():
    first, second = make_learner(), make_learner()
    for seed in range(5):
        update(first, make_batch(seed=seed))
    second.load_state({name: value.clone() for name, value in first.state().items()})
    for seed in range(5, 10):
        update(first, make_batch(seed=seed))
        update(second, make_batch(seed=seed))
    assert first.sha256() == second.sha256()


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
    assert [learning_rate(config, 32, 32, done) for done in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1])
