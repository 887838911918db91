"""Weights averaged every K updates, on ranks that are threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hvdqn.trailer import REPORTED

from hvdqn.clock import Clock
from hvdqn.config import LearningConfig, NetworkConfig, ParallelConfig
from hvdqn.errors import NonFiniteError
from hvdqn.learner import Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import make_network
from hvdqn.sync import make_sync
from hvdqn.sync.parameters import UPDATES_BETWEEN_VOTES, Nesterov
from tests.ranks import ThreadComm, run_ranks
from tests.unit.test_learner import make_batch, weighted

NOTHING = (0.0,) * len(REPORTED)
STOP = (1.0, *NOTHING[1:])


one_by_one = threading.Lock()  # torch's generator is that of all threads


def make_learner(comm, settings=(), **parallel):
    with one_by_one:
        torch.manual_seed(comm.rank)  # rank 0's weights are taken by all
        network = make_network(NetworkConfig(hidden=(32,)), "huber", (4,), 1, is_image=False, actions=3)
    network.double()
    config = LearningConfig(**{"lr": 1e-2, "lr_scaling": "none", "max_grad_norm": 0.0, **dict(settings)})
    sync = make_sync(ParallelConfig(**parallel), comm, Clock(1, 1, 1.0, 0))
    return Learner(network, config, comm, sync, 16, PhaseTimer(), torch.device("cpu"))


def train(comm, updates, settings=(), report=NOTHING, **parallel):
    """A learner after some updates, each rank's from minibatches of its own."""
    learner = make_learner(comm, settings, **parallel)
    for update in range(updates):
        learner.begin_update(make_batch(seed=100 * comm.rank + update), report)
        learner.finish_update()
    return learner


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_update_with_sgd_is_gradients(size):
    settings = {"optimizer": "sgd", "lr": 0.1}
    one = run_ranks(size, lambda comm: train(comm, 20, settings, sync="gradients"))[0]
    others = run_ranks(size, lambda comm: train(comm, 20, settings, sync="parameters", sync_every=1))
    began = run_ranks(size, lambda comm: train(comm, 0))[0].parameters
    assert (one.parameters - began).abs().max() > 0.01
    for other in others:
        torch.testing.assert_close(other.parameters, one.parameters, rtol=1e-9, atol=1e-12)
    assert others[0].drain() == pytest.approx(one.drain())


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_weights_and_moments_are_the_mean_of_ranks_that_went_alone(optimizer):
    """Three ranks alone for four updates, averaged by hand; then four more from there."""
    size, every = 3, 4
    parallel = {"sync": "parameters", "sync_every": every}

    def alone(comm):
        """The same without any exchange: rank by rank on its own, its state set to the mean in between."""
        learner = make_learner(comm, {"optimizer": optimizer}, sync="parameters", sync_every=1_000)
        for update in range(2 * every):
            learner.begin_update(make_batch(seed=100 * comm.rank + update), NOTHING)
            learner.finish_update()
            if update % every == every - 1:
                tensors = [learner.parameters, *learner.optimizer.moments().values()]
                for tensor in tensors:
                    tensor.copy_(torch.stack(comm.all_gather_object(tensor.clone())).mean(dim=0))
        return learner

    expected = run_ranks(size, alone)
    learners = run_ranks(size, lambda comm: train(comm, 2 * every, {"optimizer": optimizer}, **parallel))
    for learner in learners:
        for name, tensor in expected[0].optimizer.moments().items():
            torch.testing.assert_close(learner.optimizer.moments()[name], tensor, msg=name)
        torch.testing.assert_close(learner.parameters, expected[0].parameters)
        assert learner.sha256() == learners[0].sha256()
        assert learner.sync.agreed


def test_ranks_differ_in_between_and_agree_when_asked():
    def body(comm):
        learner = train(comm, 7, sync="parameters", sync_every=5)
        apart, digest = learner.sync.agreed, learner.sha256()
        learner.agree()
        names = list(comm.names)
        learner.agree()  # nothing is left to average
        assert comm.names == names
        return apart, digest, learner.sync.agreed, learner.sha256(), learner.state()

    before, after = run_ranks(2, body)
    assert not before[0]
    assert before[1] != after[1]
    assert before[2]
    assert before[3] == after[3]
    for name, tensor in before[4].items():
        assert torch.equal(tensor, after[4][name]), name


def test_the_next_average_is_every_updates_after_the_one_that_was_asked_for():
    def body(comm):
        learner = train(comm, 3, sync="parameters", sync_every=5)
        learner.agree()
        names = len(comm.names)
        agreed = []
        for update in range(5):
            learner.begin_update(make_batch(seed=update), NOTHING)
            learner.finish_update()
            agreed.append(learner.sync.agreed)
        assert len(comm.names) == names + 1
        return agreed

    assert run_ranks(2, body) == [[False] * 4 + [True]] * 2


def test_a_target_that_follows_is_averaged_too():
    settings = {"target_tau": 0.1}
    learners = run_ranks(2, lambda comm: train(comm, 4, settings, sync="parameters", sync_every=4))
    apart = run_ranks(2, lambda comm: train(comm, 4, settings, sync="parameters", sync_every=5))
    mean = (apart[0].target_parameters + apart[1].target_parameters) / 2
    for learner in learners:
        torch.testing.assert_close(learner.target_parameters, mean)
        assert torch.equal(learner.target_parameters, learners[0].target_parameters)


# --- the outer optimizer


def test_the_outer_step_by_hand():
    """v = 0.5 v + g, theta = theta - 0.7 (g + 0.5 v), with g = theta - mean."""
    outer = Nesterov(torch.tensor([1.0]), lr=0.7, momentum=0.5)
    # g = 1.0 - 0.0 = 1; v = 1; theta = 1 - 0.7 x 1.5 = -0.05
    assert float(outer.step(torch.tensor([0.0]))) == pytest.approx(-0.05)
    # g = -0.05 - 0.15 = -0.2; v = 0.5 - 0.2 = 0.3; theta = -0.05 - 0.7 x (-0.2 + 0.15) = -0.015
    assert float(outer.step(torch.tensor([0.15]))) == pytest.approx(-0.015)


def test_the_outer_step_is_pytorchs_nesterov():
    rng = torch.Generator().manual_seed(0)
    reference = torch.nn.Parameter(torch.randn(7, generator=rng))
    outer = Nesterov(reference.detach(), lr=0.7, momentum=0.9)
    sgd = torch.optim.SGD([reference], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(5):
        mean = torch.randn(7, generator=rng)
        reference.grad = reference.detach() - mean
        sgd.step()
        torch.testing.assert_close(outer.step(mean), reference.detach())


def test_an_outer_rate_of_1_without_momentum_is_the_average():
    mean = torch.randn(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Nesterov(torch.ones(7), lr=1.0, momentum=0.0).step(mean), mean)
    # Any other rate takes the outer step, 1 does not need it.
    plain = run_ranks(2, lambda comm: train(comm, 12, sync="parameters", sync_every=3))[0]
    stepped = run_ranks(
        2, lambda comm: train(comm, 12, sync="parameters", sync_every=3, outer_lr=1.0 + 1e-12)
    )[0]
    assert plain.sync.outer is None
    assert stepped.sync.outer is not None
    torch.testing.assert_close(stepped.parameters, plain.parameters, rtol=1e-9, atol=1e-9)


def test_the_outer_optimizer_moves_ranks_as_one():
    parallel = {"sync": "parameters", "sync_every": 3, "outer_lr": 0.7, "outer_momentum": 0.9}
    learners = run_ranks(2, lambda comm: train(comm, 12, **parallel))
    plain = run_ranks(2, lambda comm: train(comm, 12, sync="parameters", sync_every=3))
    assert learners[0].sha256() == learners[1].sha256()
    assert not torch.allclose(learners[0].parameters, plain[0].parameters, rtol=1e-3)


# --- what else travels


def test_votes_and_reports_travel_with_the_average_and_sooner_where_it_is_far():
    every = UPDATES_BETWEEN_VOTES + 10

    def body(comm):
        learner = make_learner(comm, sync="parameters", sync_every=every)
        heard = []
        for update in range(every):
            vote = STOP if comm.rank == 1 and update == 3 else (0.0, 1.0, 10.0, 5.0, 0.0, 0.0)
            learner.begin_update(make_batch(seed=update), vote)
            learner.finish_update()
            heard.append(learner.stop_voted)
        return heard.index(True), list(comm.names), learner.drain(), learner.sync.traffic

    for heard_at, names, totals, traffic in run_ranks(2, body):
        assert heard_at == UPDATES_BETWEEN_VOTES - 1
        assert names == ["trailer", "parameters"]
        assert totals["episodes"] == pytest.approx(2 * every - 1)
        assert totals["return_sum"] == pytest.approx(10 * (2 * every - 1))
        assert traffic.messages == 2


def test_reports_without_a_minibatch_are_heard_at_once():
    def body(comm):
        learner = train(comm, 2, sync="parameters", sync_every=50, report=(0.0, 1.0, 10.0, 5.0, 0.0, 0.0))
        learner.exchange(STOP if comm.rank else NOTHING)
        return learner.stop_voted, learner.drain()

    for stopped, totals in run_ranks(2, body):
        assert stopped
        assert totals["episodes"] == pytest.approx(4)
        assert np.isfinite(totals["loss"])


def test_traffic_is_as_expected():
    def body(comm):
        learner = train(comm, 60, sync="parameters", sync_every=20)
        return learner.sync.traffic, learner.sync.expected_traffic(learner), learner.parameters.numel()

    for traffic, (messages, size), parameters in run_ranks(2, body):
        assert traffic.messages / traffic.updates == pytest.approx(messages)
        assert traffic.bytes / traffic.updates == pytest.approx(size)
        assert messages == 2 / 20  # a trailer alone in between
        assert size == pytest.approx(3 * parameters * 8 / 20, rel=0.05)  # weights and two moments, in float64


# --- what is not finite


def spoilt(seed):
    batch = make_batch(seed=seed)
    batch.reward[3] = np.nan
    return batch


def test_a_rank_skips_what_is_not_finite_by_itself_and_all_count_it():
    def body(comm):
        learner = make_learner(comm, sync="parameters", sync_every=4)
        for update in range(4):
            bad = comm.rank == 1 and update in (1, 2)
            learner.begin_update(spoilt(update) if bad else make_batch(seed=update), NOTHING)
            learner.finish_update()
        return learner.skipped_updates, learner.sha256(), learner.drain()["loss"]

    first, second = run_ranks(2, body)
    assert first == second
    assert first[0] == 2
    assert np.isfinite(first[2])


def test_too_many_in_a_row_on_one_rank_end_the_run_on_all_and_name_it():
    def body(comm):
        learner = make_learner(comm, {"max_skipped_updates": 6}, sync="parameters", sync_every=4)
        for update in range(8):
            learner.begin_update(spoilt(update) if comm.rank == 1 else make_batch(seed=update), NOTHING)
            if update < 7:
                learner.finish_update()
        with pytest.raises(NonFiniteError, match=r"8 updates in a row .* rank 1\."):
            learner.finish_update()

    run_ranks(2, body)


def test_ranks_divide_by_the_same_importance_weight_once_they_know_it():
    """Weights of 4 on rank 0 and 1 on rank 1: from the second average on, rank 1's samples count for a quarter."""

    def body(comm):
        learner = make_learner(comm, {"optimizer": "sgd"}, sync="parameters", sync_every=1)
        steps = []
        for update in range(2):
            before = learner.parameters.clone()
            batch = weighted(make_batch(seed=update), 1.0 if comm.rank else 4.0)
            learner.backward(make_batch(seed=update))
            gradient = learner.gradient.clone()
            learner.begin_update(batch, NOTHING)
            steps.append(float((before - learner.parameters).norm() / (1e-2 * gradient.norm())))
            learner.finish_update()
        return steps

    first, second = run_ranks(2, body)
    assert first == pytest.approx([1.0, 1.0])
    assert second == pytest.approx([1.0, 0.25])


# --- resume


@pytest.mark.parametrize("outer", [{}, {"outer_lr": 0.7, "outer_momentum": 0.9}])
def test_a_run_goes_on_from_an_average_as_if_nothing_had_been(outer):
    parallel = {"sync": "parameters", "sync_every": 4, **outer}

    def learn(learner, comm, first, last):
        for update in range(first, last):
            batch = weighted(make_batch(seed=100 * comm.rank + update), 1.0 + comm.rank)
            learner.begin_update(batch, NOTHING)
            learner.finish_update()

    def body(comm: ThreadComm):
        whole = make_learner(comm, **parallel)
        learn(whole, comm, 0, 6)
        whole.agree()
        mine = {name: tensor.clone() for name, tensor in whole.state().items()}  # before others go on
        saved = comm.broadcast_object(mine)
        learn(whole, comm, 6, 13)
        whole.agree()
        resumed = make_learner(comm, **parallel)
        resumed.load_state(saved)
        learn(resumed, comm, 6, 13)
        resumed.agree()
        return whole.sha256(), resumed.sha256()

    digests = run_ranks(2, body)
    assert len({digest for pair in digests for digest in pair}) == 1
