"""Weights averaged every K updates, on ranks that are threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hvdqn.config import Config
from hvdqn.errors import NonFiniteError
from hvdqn.sync.parameters import UPDATES_BETWEEN_VOTES, Nesterov
from tests.learning_ranks import (
    NO_REPORT,
    STOP_VOTE,
    LearningRank,
    make_batch,
    nan_batch,
    small_network,
    weighted,
)
from tests.ranks import ThreadComm, run_ranks


def make_rank(comm, settings=(), **parallel):
    """Return a rank with weights in float64; all ranks begin with those of rank 0."""
    settings = {"lr": 1e-2, "lr_scaling": "none", "max_grad_norm": 0.0, **dict(settings)}
    config = Config().replace(**settings, **parallel)
    return LearningRank(config, comm, small_network(config, seed=comm.rank).double())


def train(comm, updates, settings=(), report=NO_REPORT, **parallel):
    """Return a rank after some updates, each rank's from minibatches of its own."""
    rank = make_rank(comm, settings, **parallel)
    for update in range(updates):
        rank.update(make_batch(seed=100 * comm.rank + update), report)
    return rank


def averaged(rank):
    """Return True if no update has been taken since the last average."""
    return rank.strategy.updates_since_average == 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_with_sgd_an_average_at_every_update_equals_averaged_gradients(size):
    settings = {"optimizer": "sgd", "lr": 0.1}
    one = run_ranks(size, lambda comm: train(comm, 20, settings, sync="gradients"))[0]
    others = run_ranks(size, lambda comm: train(comm, 20, settings, sync="parameters", sync_every=1))
    before = run_ranks(size, lambda comm: train(comm, 0))[0].learner.parameters
    assert (one.learner.parameters - before).abs().max() > 0.01
    for other in others:
        torch.testing.assert_close(other.learner.parameters, one.learner.parameters, rtol=1e-9, atol=1e-12)
    assert others[0].totals.pop() == pytest.approx(one.totals.pop())


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_weights_and_moments_are_the_mean_over_ranks(optimizer):
    """Three ranks take four updates alone and are averaged by hand; then the same once more."""
    size, every = 3, 4
    parallel = {"sync": "parameters", "sync_every": every}

    def alone(comm):
        """Exchange nothing; set each rank's state to the mean by hand."""
        rank = make_rank(comm, {"optimizer": optimizer}, sync="parameters", sync_every=1_000)
        for update in range(2 * every):
            rank.update(make_batch(seed=100 * comm.rank + update))
            if update % every == every - 1:
                for tensor in (rank.learner.parameters, *rank.learner.optimizer.moments().values()):
                    tensor.copy_(torch.stack(comm.all_gather_object(tensor.clone())).mean(dim=0))
        return rank

    expected = run_ranks(size, alone)[0].learner
    ranks = run_ranks(size, lambda comm: train(comm, 2 * every, {"optimizer": optimizer}, **parallel))
    for rank in ranks:
        for name, tensor in expected.optimizer.moments().items():
            torch.testing.assert_close(rank.learner.optimizer.moments()[name], tensor, msg=name)
        torch.testing.assert_close(rank.learner.parameters, expected.parameters)
        assert rank.sha256() == ranks[0].sha256()
        assert averaged(rank)


def test_ranks_differ_between_averages_and_are_equal_after_synchronize():
    def body(comm):
        rank = train(comm, 7, sync="parameters", sync_every=5)
        was_averaged, digest = averaged(rank), rank.sha256()
        rank.synchronize()
        names = list(comm.names)
        rank.synchronize()  # nothing is left to average
        assert comm.names == names
        return was_averaged, digest, averaged(rank), rank.sha256(), rank.state()

    first, second = run_ranks(2, body)
    assert not first[0]
    assert first[1] != second[1]
    assert first[2]
    assert first[3] == second[3]
    for name, tensor in first[4].items():
        assert torch.equal(tensor, second[4][name]), name


def test_the_next_average_comes_sync_every_updates_after_synchronize():
    def body(comm):
        rank = train(comm, 3, sync="parameters", sync_every=5)
        rank.synchronize()
        names = len(comm.names)
        was_averaged = []
        for update in range(5):
            rank.update(make_batch(seed=update))
            was_averaged.append(averaged(rank))
        assert len(comm.names) == names + 1
        return was_averaged

    assert run_ranks(2, body) == [[False] * 4 + [True]] * 2


def test_a_target_network_that_follows_the_online_network_is_averaged_too():
    settings = {"target_tau": 0.1}
    ranks = run_ranks(2, lambda comm: train(comm, 4, settings, sync="parameters", sync_every=4))
    apart = run_ranks(2, lambda comm: train(comm, 4, settings, sync="parameters", sync_every=5))
    mean = (apart[0].learner.target_parameters + apart[1].learner.target_parameters) / 2
    for rank in ranks:
        torch.testing.assert_close(rank.learner.target_parameters, mean)
        assert torch.equal(rank.learner.target_parameters, ranks[0].learner.target_parameters)


def test_the_target_network_is_copied_only_right_after_an_average():
    def body(comm):
        rank = train(comm, 3, sync="parameters", sync_every=5)
        target = rank.learner.target_parameters.clone()
        assert rank.strategy.update_target() is None
        assert torch.equal(rank.learner.target_parameters, target)
        rank.synchronize()
        assert rank.strategy.update_target() == []
        assert torch.equal(rank.learner.target_parameters, rank.learner.parameters)
        assert not torch.equal(rank.learner.target_parameters, target)

    run_ranks(2, body)


# --- the outer optimizer


def test_the_outer_step_by_hand():
    """v = 0.5 v + g, theta = theta - 0.7 (g + 0.5 v), with g = theta - mean."""
    outer = Nesterov(torch.tensor([1.0]), lr=0.7, momentum=0.5)
    # g = 1.0 - 0.0 = 1; v = 1; theta = 1 - 0.7 x 1.5 = -0.05
    assert float(outer.step(torch.tensor([0.0]))) == pytest.approx(-0.05)
    # g = -0.05 - 0.15 = -0.2; v = 0.5 - 0.2 = 0.3; theta = -0.05 - 0.7 x (-0.2 + 0.15) = -0.015
    assert float(outer.step(torch.tensor([0.15]))) == pytest.approx(-0.015)


def test_the_outer_step_equals_nesterov_momentum_of_pytorch():
    rng = torch.Generator().manual_seed(0)
    reference = torch.nn.Parameter(torch.randn(7, generator=rng))
    outer = Nesterov(reference.detach(), lr=0.7, momentum=0.9)
    sgd = torch.optim.SGD([reference], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(5):
        mean = torch.randn(7, generator=rng)
        reference.grad = reference.detach() - mean
        sgd.step()
        torch.testing.assert_close(outer.step(mean), reference.detach())


def test_an_outer_lr_of_1_without_momentum_gives_the_average():
    mean = torch.randn(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Nesterov(torch.ones(7), lr=1.0, momentum=0.0).step(mean), mean)
    # With any other lr there is an outer optimizer, with 1 it is not needed.
    plain = run_ranks(2, lambda comm: train(comm, 12, sync="parameters", sync_every=3))[0]
    stepped = run_ranks(
        2, lambda comm: train(comm, 12, sync="parameters", sync_every=3, outer_lr=1.0 + 1e-12)
    )[0]
    assert plain.strategy.outer is None
    assert stepped.strategy.outer is not None
    torch.testing.assert_close(stepped.learner.parameters, plain.learner.parameters, rtol=1e-9, atol=1e-9)


def test_the_outer_optimizer_keeps_ranks_equal():
    parallel = {"sync": "parameters", "sync_every": 3, "outer_lr": 0.7, "outer_momentum": 0.9}
    ranks = run_ranks(2, lambda comm: train(comm, 12, **parallel))
    plain = run_ranks(2, lambda comm: train(comm, 12, sync="parameters", sync_every=3))
    assert ranks[0].sha256() == ranks[1].sha256()
    assert not torch.allclose(ranks[0].learner.parameters, plain[0].learner.parameters, rtol=1e-3)


# --- statistics and votes


def test_votes_and_statistics_travel_with_the_average_and_earlier_where_averages_are_rare():
    every = UPDATES_BETWEEN_VOTES + 10

    def body(comm):
        rank = make_rank(comm, sync="parameters", sync_every=every)
        voted = []
        for update in range(every):
            vote = STOP_VOTE if comm.rank == 1 and update == 3 else (0.0, 1.0, 10.0, 5.0, 0.0, 0.0)
            rank.update(make_batch(seed=update), vote)
            voted.append(rank.stop_voted)
        return voted.index(True), list(comm.names), rank.totals.pop(), rank.strategy.sent_messages

    for voted_at, names, totals, messages in run_ranks(2, body):
        assert voted_at == UPDATES_BETWEEN_VOTES - 1
        assert names == ["trailer", "parameters"]
        assert totals["episodes"] == pytest.approx(2 * every - 1)
        assert totals["episode_return_mean"] * totals["episodes"] == pytest.approx(10 * (2 * every - 1))
        assert messages == 2


def test_exchanged_statistics_arrive_at_once():
    def body(comm):
        rank = train(comm, 2, sync="parameters", sync_every=50, report=(0.0, 1.0, 10.0, 5.0, 0.0, 0.0))
        rank.exchange_stats(STOP_VOTE if comm.rank else NO_REPORT)
        return rank.stop_voted, rank.totals.pop()

    for stopped, totals in run_ranks(2, body):
        assert stopped
        assert totals["episodes"] == pytest.approx(4)
        assert np.isfinite(totals["loss"])


def test_traffic_is_as_expected():
    def body(comm):
        rank = train(comm, 60, sync="parameters", sync_every=20)
        return rank.strategy, rank.learner.parameters.numel()

    for strategy, parameters in run_ranks(2, body):
        messages, size = strategy.expected_traffic()
        assert strategy.exchanged_updates == 60
        assert strategy.sent_messages / strategy.exchanged_updates == pytest.approx(messages)
        assert strategy.sent_bytes / strategy.exchanged_updates == pytest.approx(size)
        assert messages == 2 / 20  # one trailer alone between two averages
        assert size == pytest.approx(3 * parameters * 8 / 20, rel=0.05)  # weights and two moments, in float64


# --- gradients that are not finite


def test_a_rank_skips_its_own_gradients_that_are_not_finite_and_all_ranks_count_them():
    def body(comm):
        rank = make_rank(comm, sync="parameters", sync_every=4)
        for update in range(4):
            bad = comm.rank == 1 and update in (1, 2)
            rank.update(nan_batch(update) if bad else make_batch(seed=update))
        return rank.totals.skipped_updates, rank.sha256(), rank.totals.pop()["loss"]

    first, second = run_ranks(2, body)
    assert first == second
    assert first[0] == 2
    assert np.isfinite(first[2])


def test_too_many_skipped_updates_in_a_row_on_one_rank_end_the_run_on_all_and_name_it():
    def body(comm):
        rank = make_rank(comm, {"max_skipped_updates": 6}, sync="parameters", sync_every=4)
        for update in range(8):
            rank.launch(nan_batch(update) if comm.rank == 1 else make_batch(seed=update))
            if update < 7:
                rank.wait()
        with pytest.raises(NonFiniteError, match=r"8 updates in a row .* rank 1\."):
            rank.wait()

    run_ranks(2, body)


def test_ranks_divide_by_the_same_importance_weight_once_they_have_exchanged_it():
    """Weights of 4 on rank 0 and 1 on rank 1: from the second average on, rank 1's samples count for a quarter."""

    def body(comm):
        rank = make_rank(comm, {"optimizer": "sgd"}, sync="parameters", sync_every=1)
        learner, steps = rank.learner, []
        for update in range(2):
            before = learner.parameters.clone()
            learner.compute_gradient(make_batch(seed=update))
            gradient = learner.gradient.clone()
            rank.launch(weighted(make_batch(seed=update), 1.0 if comm.rank else 4.0))
            steps.append(float((before - learner.parameters).norm() / (1e-2 * gradient.norm())))
            rank.wait()
        return steps

    first, second = run_ranks(2, body)
    assert first == pytest.approx([1.0, 1.0])
    assert second == pytest.approx([1.0, 0.25])


# --- resume


@pytest.mark.parametrize("outer", [{}, {"outer_lr": 0.7, "outer_momentum": 0.9}])
def test_a_run_that_resumes_after_an_average_ends_with_the_same_weights(outer):
    parallel = {"sync": "parameters", "sync_every": 4, **outer}

    def learn(rank, first, last):
        for update in range(first, last):
            rank.update(weighted(make_batch(seed=100 * rank.comm.rank + update), 1.0 + rank.comm.rank))

    def body(comm: ThreadComm):
        whole = make_rank(comm, **parallel)
        learn(whole, 0, 6)
        whole.synchronize()
        mine = {name: tensor.clone() for name, tensor in whole.state().items()}  # before others go on
        saved = comm.broadcast_object(mine)
        learn(whole, 6, 13)
        whole.synchronize()
        resumed = make_rank(comm, **parallel)
        resumed.load_state(saved)
        learn(resumed, 6, 13)
        resumed.synchronize()
        return whole.sha256(), resumed.sha256()

    digests = run_ranks(2, body)
    assert len({digest for pair in digests for digest in pair}) == 1
