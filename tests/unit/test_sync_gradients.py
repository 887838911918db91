"""Gradients averaged at every update, on ranks that share one process."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hvdqn.clock import Clock
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config, NetworkConfig, parse
from hvdqn.errors import NonFiniteError
from hvdqn.graphs import Recorded
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import batch_factor, build_parts
from hvdqn.sync import Outcome, Totals, make_strategy
from hvdqn.sync.statistics import LEARNED, REPORTED, STATISTICS
from hvdqn.trainer import Trainer
from tests.learning_ranks import share
from tests.ranks import run_ranks
from tests.unit.test_learner import SMALL_HEADS, make_batch, make_learner, weighted

REPORT = (0.0, 2.0, 30.0, 12.0, 1.0, 20.0)


class JoinedComm(LocalComm):
    """One of several ranks in one thread: an allreduce is complete once all of them have launched it."""

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


class Rank:
    """A learner, the strategy that averages its gradients, and the totals of the strategy's outcomes.

    Args:
        comm: of this rank; by default it is the only one.
        record: how to record functions, as CUDA graphs are; None: not at all.
        max_skipped_updates: as the setting.
        autograd: compute the gradient as on a GPU, where functions are recorded.
        made: arguments of `make_learner`.
    """

    def __init__(self, comm=None, record=None, max_skipped_updates=10, autograd=False, **made):
        comm = comm or LocalComm()
        config = Config().replace(
            batch_per_rank=16,
            lr_reference_batch=made.get("lr_reference_batch", 0),
            max_skipped_updates=max_skipped_updates,
        )
        self.learner = learner = make_learner(**made, batch_factor=batch_factor(config, comm.size))
        if record:
            learner.differentiate = Recorded(learner.differentiate, record, learner.device)
        clock = Clock(1, 16, 1.0, 0)
        self.strategy = make_strategy(config, learner, comm, PhaseTimer(), clock, record)
        if autograd:
            learner.dense = None
        self.totals = Totals()

    def launch(self, batch, reported=REPORT):
        """Compute the gradient of a minibatch, if there is one, and launch the exchange."""
        learned, largest_weight = None, 0.0
        if batch is not None:
            learned, largest_weight = self.learner.compute_gradient(batch), float(batch.weight.max())
        self.strategy.launch(reported, learned, largest_weight, progress=1.0)

    def wait(self):
        """Finish the exchange and add up its outcome."""
        outcome = self.strategy.wait()
        self.totals.add(outcome)
        return outcome

    def update(self, batch, reported=REPORT):
        self.launch(batch, reported)
        return self.wait()


def make_ranks(size, **made):
    peers = [None] * size
    return [Rank(JoinedComm(rank, peers), **made) for rank in range(size)]


def with_reward(batch, value):
    """Return the minibatch with one reward replaced."""
    batch.reward[3] = value
    return batch


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_learn_as_one_learner_with_the_global_batch(size):
    ranks = make_ranks(size, dtype=torch.float64, optimizer="sgd", lr=0.1)
    alone = Rank(dtype=torch.float64, optimizer="sgd", lr=0.1)
    for seed in range(5):
        whole = make_batch(16 * size, seed=seed)
        for index, rank in enumerate(ranks):
            rank.launch(share(whole, index, size))
        assert [rank.wait().updates for rank in ranks] == [1] * size
        alone.update(whole)
    for rank in ranks:
        torch.testing.assert_close(rank.learner.parameters, alone.learner.parameters)
        assert rank.learner.sha256() == ranks[0].learner.sha256()
        assert rank.learner.grad_norm == pytest.approx(alone.learner.grad_norm)
    expected = alone.totals.pop()
    found = ranks[0].totals.pop()
    assert {name: found[name] for name in LEARNED} == pytest.approx(
        {name: expected[name] for name in LEARNED}
    )


@pytest.mark.parametrize("head", ["scalar", "c51", "hl-gauss", "qr", "iqn"])
def test_an_infinite_reward_is_skipped_whatever_the_head(head):
    """Also for C51, whose projection clips it to the last atom."""
    rank = Rank(network=NetworkConfig(hidden=(32,), **{**SMALL_HEADS, "head": head}))
    before = rank.learner.parameters.clone()
    outcome = rank.update(with_reward(make_batch(), np.inf))
    assert (outcome.updates, outcome.skipped) == (0, 1)
    assert rank.totals.skipped_updates == 1
    assert torch.equal(rank.learner.parameters, before)


def test_a_gradient_that_is_not_finite_skips_the_update_and_changes_nothing():
    rank = Rank(max_skipped_updates=3)
    learner = rank.learner
    rank.update(make_batch())
    before, loss = learner.sha256(), rank.totals.pop()["loss"]
    assert math.isfinite(loss)
    rank.update(with_reward(make_batch(), np.nan))
    assert learner.sha256() == before
    assert rank.totals.skipped_updates == 1
    assert math.isnan(rank.totals.pop()["loss"])  # the mean of no update
    rank.update(make_batch())
    assert learner.sha256() != before
    assert rank.strategy.skipped_in_a_row == 0
    for _ in range(2):
        rank.update(with_reward(make_batch(), np.nan))
    with pytest.raises(NonFiniteError, match=r"3 updates in a row .* rank 0"):
        rank.update(with_reward(make_batch(), np.nan))


def test_the_error_names_the_ranks_whose_gradient_is_not_finite():
    ranks = make_ranks(3, max_skipped_updates=1)
    for rank, reward in zip(ranks, (0.0, np.nan, np.inf), strict=True):
        rank.launch(with_reward(make_batch(), reward))
    for rank in ranks:
        with pytest.raises(NonFiniteError, match=r"1 updates in a row .* rank 1, 2\."):
            rank.wait()


def test_skipped_updates_are_left_out_of_the_mean_loss():
    """The episodes that a skipped update reports count."""
    rank, expected = Rank(), Rank()
    rank.update(make_batch())
    expected.update(make_batch())
    rank.update(with_reward(make_batch(), np.nan))
    rank.update(make_batch(seed=1))
    expected.update(make_batch(seed=1))
    found, without = rank.totals.pop(), expected.totals.pop()
    assert {name: found[name] for name in LEARNED} == {name: without[name] for name in LEARNED}
    assert (found["episodes"], without["episodes"]) == (6.0, 4.0)
    assert (found["skipped_updates"], without["skipped_updates"]) == (1, 0)


def test_reports_are_summed_and_learning_is_averaged():
    rank = Rank()
    for _ in range(2):
        rank.update(make_batch())
    rank.totals.add(rank.strategy.exchange_stats(REPORT))
    sums = dict(zip(STATISTICS, rank.totals.counters()["totals"].tolist(), strict=True))
    assert [sums[name] for name in REPORTED] == pytest.approx([0.0, 6.0, 90.0, 36.0, 3.0, 60.0])
    values = rank.totals.pop()
    assert all(math.isfinite(values[name]) for name in LEARNED)
    assert values["loss"] == pytest.approx(sums["loss"] / 2)
    means = ("episode_return_mean", "episode_length_mean", "greediest_return_mean")
    assert [values[name] for name in means] == pytest.approx([15.0, 6.0, 20.0])
    assert rank.totals.pop()["episodes"] == 0.0


def test_the_outcome_of_an_update_holds_the_votes_that_it_carried():
    stop = (1.0, *REPORT[1:])
    ranks = make_ranks(2)
    for votes, expected in (((REPORT, REPORT), False), ((REPORT, stop), True), ((stop, stop), True)):
        for rank, vote in zip(ranks, votes, strict=True):
            rank.launch(make_batch(), vote)
        assert [rank.wait().stop for rank in ranks] == [expected] * 2
    alone = Rank()
    assert not alone.strategy.exchange_stats(REPORT).stop
    assert alone.strategy.exchange_stats(stop).stop


def test_the_target_is_copied_unless_it_follows():
    hard = Rank()
    hard.update(make_batch())
    assert hard.strategy.update_target() == []
    assert torch.equal(hard.learner.target_parameters, hard.learner.parameters)

    soft = Rank(target_tau=0.25)
    soft.update(make_batch())
    before = soft.learner.target_parameters.clone()
    assert soft.strategy.update_target() == []
    assert torch.equal(soft.learner.target_parameters, before)


@pytest.mark.parametrize(
    ("changed", "expected"), [(None, []), (0, [0]), (2, [2])], ids=["none", "rank 0", "rank 2"]
)
@pytest.mark.parametrize("value", [1.0, -0.0, math.nan])
def test_update_target_returns_the_ranks_whose_weights_differ(changed, expected, value):
    """Bit for bit: 0.0 and -0.0 differ, and a NaN equals itself. All targets become rank 0's weights."""
    learners = [make_learner() for _ in range(3)]
    for learner in learners:
        learner.parameters[5] = value if changed is None else 0.0
    if changed is not None:
        learners[changed].parameters[5] = value

    def body(comm):
        config = Config().replace(batch_per_rank=16)
        learner = learners[comm.rank]
        return make_strategy(config, learner, comm, PhaseTimer(), Clock(1, 16, 1.0, 0)).update_target()

    assert run_ranks(3, body) == [expected] * 3
    copied = learners[0].parameters.view(torch.uint8)
    for learner in learners:
        assert torch.equal(learner.target_parameters.view(torch.uint8), copied)


def test_importance_weights_are_divided_by_the_largest_of_all_ranks():
    """Two ranks, one with weights of 4 and one with weights of 1: the second counts for a quarter of the first."""
    ranks = make_ranks(2, dtype=torch.float64, max_grad_norm=0.0)
    batches = [make_batch(seed=0), make_batch(seed=1)]
    alone = make_learner(torch.float64)
    gradients, losses = [], []
    for batch in batches:
        losses.append(alone.compute_gradient(batch)[0])
        gradients.append(alone.gradient.clone())
    for rank, batch, weight in zip(ranks, batches, (4.0, 1.0), strict=True):
        rank.launch(weighted(batch, weight))
    for rank in ranks:
        rank.wait()
        torch.testing.assert_close(rank.learner.gradient, (gradients[0] + gradients[1] / 4) / 2)
        assert rank.totals.pop()["loss"] == pytest.approx(float(losses[0] + losses[1] / 4) / 2)
    assert ranks[0].learner.sha256() == ranks[1].learner.sha256()


def test_the_norm_is_clipped_after_weights_are_normalised():
    plain, heavy = (Rank(dtype=torch.float64, max_grad_norm=0.1) for _ in range(2))
    plain.update(make_batch())
    heavy.update(weighted(make_batch(), 50.0))
    assert plain.learner.grad_norm > 0.1
    assert heavy.learner.grad_norm == pytest.approx(plain.learner.grad_norm)
    torch.testing.assert_close(heavy.learner.gradient, plain.learner.gradient)
    assert float(plain.learner.gradient.norm()) == pytest.approx(0.1)


def test_a_rank_without_a_minibatch_is_left_out_of_the_average():
    ranks = make_ranks(3, dtype=torch.float64, max_grad_norm=0.0)
    alone = make_learner(torch.float64)
    loss, td_error, q_mean, _ = alone.compute_gradient(make_batch()).tolist()
    for rank, batch in zip(ranks, (make_batch(), None, make_batch()), strict=True):
        rank.launch(weighted(batch, 7.0) if batch else None)
    for rank in ranks:
        assert rank.wait().updates == 1
        torch.testing.assert_close(rank.learner.gradient, alone.gradient)
        values = rank.totals.pop()
        assert [values[name] for name in LEARNED] == pytest.approx([loss, td_error, q_mean])
        assert values["episodes"] == 6.0
    assert [len(rank.learner.td_errors) for rank in ranks] == [16, 0, 16]


@pytest.mark.parametrize("has_batch", [True, False])
def test_priorities_are_updated_only_by_a_rank_with_a_minibatch(has_batch, monkeypatch):
    config = parse(["--preset", "smoke", "--replay", "prioritized", "--device", "cpu"])
    parts = build_parts(config, LocalComm(), PhaseTimer())
    stop = SimpleNamespace(requested=False)
    recorder = SimpleNamespace(totals=Totals(), end_episodes=lambda episodes: None)
    trainer = Trainer(config, LocalComm(), stop, parts, recorder)
    replay, learner = parts.acting.replay, parts.learner
    replay.start(parts.acting.actor.start())
    for _ in range(50):
        actions = parts.acting.actor.choose(1.0)
        replay.add(actions, parts.acting.actor.step(actions))
    batch = replay.sample(config.replay.batch_per_rank) if has_batch else None
    monkeypatch.setattr(trainer, "sample", lambda: batch)
    if not has_batch:  # another rank's gradient counts then, and there is none here
        monkeypatch.setattr(parts.strategy, "wait", Outcome)
    calls = []
    monkeypatch.setattr(replay, "update_priorities", lambda *arguments: calls.append(arguments))
    trainer.update()
    parts.acting.envs.close()
    assert len(calls) == has_batch
    for row_ids, td_errors in calls:
        np.testing.assert_array_equal(row_ids, batch.row_ids)
        np.testing.assert_array_equal(td_errors, learner.td_errors.numpy())


def test_traffic_is_counted_as_expected():
    rank = make_ranks(2)[0]
    for _ in range(3):
        rank.launch(make_batch())
        rank.strategy.handle = None
    messages, sent_bytes = rank.strategy.expected_traffic()
    assert rank.strategy.exchanged_updates == 3
    assert (rank.strategy.sent_messages, rank.strategy.sent_bytes) == (3 * messages, 3 * sent_bytes)
