"""Gradients pushed to rank 0, on ranks that are threads; real MPI is in tests/distributed/test_sync.py."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hvdqn.trailer import LEARNED, REPORTED

from hvdqn.clock import Clock, ReportedClock
from hvdqn.config import LearningConfig, NetworkConfig, ParallelConfig, parse
from hvdqn.errors import NonFiniteError
from hvdqn.learner import Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import make_network
from hvdqn.sync import make_sync
from hvdqn.sync.server import GRADIENT, REPORT, Push
from hvdqn.train import Training, start
from tests.ranks import run_ranks
from tests.unit.test_learner import make_batch
from tests.unit.test_learner import make_learner as make_plain_learner

NOTHING = (0.0,) * len(REPORTED)
one_by_one = threading.Lock()  # torch's generator is that of all threads


def make_learner(comm, settings=(), **parallel):
    with one_by_one:
        torch.manual_seed(3)
        network = make_network(NetworkConfig(hidden=(32,)), "huber", (4,), 1, is_image=False, actions=3)
    config = LearningConfig(**{"lr": 1e-3, "lr_scaling": "none", **dict(settings)})
    clock = ReportedClock(8, 16, 2.0, 0) if comm.rank else Clock(8 * (comm.size - 1), 16, 2.0, 0)
    sync = make_sync(ParallelConfig(sync="server", **parallel), comm, clock)
    return Learner(network, config, comm, sync, 16, PhaseTimer(), torch.device("cpu"))


def serve(learner, until):
    """Rank 0's loop, until it has taken so many pushes, and the meeting after."""
    server, taken = learner.sync, server_pushes(learner.sync)
    while taken() < until:
        server.turn(learner, None, lambda: NOTHING)
    learner.agree()
    return learner


def server_pushes(server):
    return lambda: server.traffic.updates


def push_all(learner, seeds):
    for seed in seeds:
        learner.begin_update(make_batch(seed=seed), NOTHING)
        learner.finish_update()
    learner.agree()
    return learner


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_one_worker_that_always_pulls_is_one_process(tau):
    """Nothing is stale, so rank 0 takes the very steps that a single process takes."""
    settings = {"target_tau": tau}
    alone = make_plain_learner(**settings)
    for seed in range(10):
        alone.begin_update(make_batch(seed=seed), NOTHING)
        alone.finish_update()
    learners = run_ranks(
        2,
        lambda comm: (
            push_all(make_learner(comm, settings), range(10))
            if comm.rank
            else serve(make_learner(comm, settings), 10)
        ),
    )
    for learner in learners:
        assert torch.equal(learner.parameters, alone.parameters)
    assert torch.equal(learners[0].target_parameters, alone.target_parameters)
    assert torch.equal(learners[1].target_parameters, alone.target_parameters)
    assert learners[0].sync.staleness == {0: 10}
    assert learners[0].drain()["loss"] == pytest.approx(alone.drain()["loss"])


def test_a_target_that_is_copied_comes_with_the_next_weights():
    def body(comm):
        learner = make_learner(comm)
        if comm.rank:
            push_all(learner, range(4))
            return learner
        server = learner.sync
        while server.traffic.updates < 4:
            server.turn(learner, None, lambda: NOTHING)
            if server.traffic.updates == 2 and server.target_version == 0:
                assert learner.sync_target() == []
        learner.agree()
        return learner

    server, worker = run_ranks(2, body)
    began = make_plain_learner().parameters
    assert not torch.equal(server.target_parameters, began)
    assert not torch.equal(server.target_parameters, server.parameters)
    assert torch.equal(worker.target_parameters, server.target_parameters)


@pytest.mark.parametrize("pull_every", [1, 3])
def test_traffic_is_as_expected(pull_every):
    def body(comm):
        learner = make_learner(comm, pull_every=pull_every)
        if comm.rank:
            return push_all(learner, range(30))
        return serve(learner, 60)

    learners = run_ranks(3, body)
    for learner in learners:
        traffic, (messages, size) = learner.sync.traffic, learner.sync.expected_traffic(learner)
        # A meeting costs one exchange more.
        assert traffic.messages / traffic.updates == pytest.approx(messages, rel=0.05)
        assert traffic.bytes / traffic.updates == pytest.approx(size, rel=0.05)
    staleness = learners[0].sync.staleness
    assert sum(staleness.values()) == 60
    assert max(staleness) >= pull_every - 1  # a worker's own pushes since it pulled


# --- what rank 0 does with a push


def make_server(settings=(), **parallel):
    """Rank 0 of three, with nobody to talk to."""
    comm = SimpleNamespace(
        rank=0, size=3, local_rank=0, local_size=3, duplicate=lambda: None, broadcast_=lambda tensor: None
    )
    return make_learner(comm, settings, **parallel)


def push(learner, worker=1, kind=GRADIENT, gradient=None, **fields):
    says = Push(kind, learner.sync.version, 0, 1, 8, 0.0, 1.0, finite=1.0)
    if gradient is not None:
        learner.gradient.copy_(gradient)
    learner.sync.take(
        learner, worker, replace(says, **fields), np.zeros(len(REPORTED)), np.ones(len(LEARNED))
    )


def test_env_steps_are_counted_as_they_are_reported():
    learner = make_server()
    push(learner, kind=REPORT, env_steps=80)
    push(learner, 2, env_steps=16, gradient=torch.ones(learner.gradient.shape))
    assert learner.sync.clock.env_steps == 96
    assert learner.sync.clock.last_tick == 16
    assert learner.sync.clock.updates == 1


def test_weights_that_came_with_a_meeting_are_fresh():
    def body(comm):
        learner = make_learner(comm, pull_every=10)
        for until in (3, 6):
            if comm.rank:
                push_all(learner, range(3))
            else:
                serve(learner, until)
        return learner

    server, _ = run_ranks(2, body)
    assert server.sync.staleness == {0: 2, 1: 2, 2: 2}


def test_too_stale_a_gradient_is_dropped_and_counted():
    learner = make_server(max_staleness=2)
    ones = torch.ones(learner.gradient.shape)
    for _ in range(3):
        push(learner, gradient=ones)
    digest = learner.sha256()
    push(learner, 2, gradient=ones, version=0)
    assert learner.sha256() == digest
    push(learner, 2, gradient=ones, version=1)
    assert learner.sha256() != digest
    assert learner.sync.dropped_updates == 1
    assert learner.sync.staleness == {0: 3, 3: 1, 2: 1}
    assert learner.sync.measures() == {
        "dropped_updates": 1,
        "workers": 2,
        "staleness_mean": 1.0,
        "staleness_max": 3,
    }
    assert learner.sync.clock.updates == 4
    counters = json.loads(json.dumps(learner.sync.counters()))
    again = make_server().sync
    again.load_counters(counters)
    assert again.staleness == learner.sync.staleness
    assert again.dropped_updates == 1


@pytest.mark.parametrize("how", ["told", "seen"])
def test_what_is_not_finite_is_dropped_and_counted(how):
    learner = make_server({"max_skipped_updates": 3})
    digest = learner.sha256()
    gradient = torch.full(learner.gradient.shape, 1.0 if how == "told" else float("nan"))
    for skipped in range(2):
        push(learner, gradient=gradient, finite=how == "seen")
        assert learner.skipped_updates == skipped + 1
    assert learner.sha256() == digest
    assert learner.sync.failed == (0, 0)
    push(learner, 2, gradient=torch.ones(learner.gradient.shape))  # another worker is well: that is no excuse
    push(learner, gradient=gradient, finite=how == "seen")
    assert learner.sync.failed == (3, 1)


def test_all_workers_divide_by_one_importance_weight():
    learner = make_server({"optimizer": "sgd", "max_grad_norm": 0.0})
    ones, steps = torch.ones(learner.gradient.shape), []
    for worker, largest in ((1, 4.0), (2, 1.0), (1, 1.0), (2, 1.0)):
        before = learner.parameters.clone()
        push(learner, worker, gradient=ones, largest_weight=largest)
        steps.append(float((before - learner.parameters).mean() / 1e-3))
    assert steps == pytest.approx([1 / 4, 1 / 4, 1, 1], rel=1e-3)


def test_all_end_together_where_one_worker_stays_not_finite():
    def body(comm):
        learner = make_learner(comm, {"max_skipped_updates": 3})
        with pytest.raises(NonFiniteError, match=r"3 updates in a row .* rank 2\."):
            push_or_serve(learner, comm.rank)

    def push_or_serve(learner, rank):
        batch = make_batch()
        if rank == 2:
            batch.reward[0] = np.nan
        while rank:
            learner.begin_update(batch, NOTHING)
            learner.finish_update()
        serve(learner, 1_000_000)

    run_ranks(3, body)


# --- workers that die

STALL_TIMEOUT_SECONDS = 1.0


def lose_rank_2(comm, **parallel):
    """Rank 2 of four is gone after five pushes, without a word."""
    learner = make_learner(comm, stall_timeout=STALL_TIMEOUT_SECONDS, **parallel)
    if comm.rank == 0:
        while len(learner.sync.workers) == 3:  # noticed while the others are busy
            learner.sync.turn(learner, None, lambda: NOTHING)
        learner.stop_voted = True
        learner.agree()
    else:
        pushes = 0
        while not learner.stop_voted and (comm.rank != 2 or pushes < 5):
            learner.begin_update(make_batch(), NOTHING)
            learner.finish_update()
            pushes += 1
        if comm.rank != 2:
            learner.agree()
    return learner


def test_a_dead_worker_is_left_out_if_that_is_tolerated(capsys):
    learners = run_ranks(4, lambda comm: lose_rank_2(comm, tolerate_dead_workers=True))
    assert "rank 2 has not been heard of for" in capsys.readouterr().err
    living = [learners[0], learners[1], learners[3]]
    assert [learner.comm.rank for learner in living] == [0, 1, 2]
    assert [learner.comm.size for learner in living] == [3, 3, 3]
    assert len({learner.sha256() for learner in living}) == 1
    assert learners[0].sync.workers == {1, 3}


def test_a_dead_worker_ends_the_job_if_it_is_not(capsys):
    with pytest.raises(SystemExit) as ended:
        run_ranks(4, lose_rank_2)
    assert ended.value.code == 1
    assert "rank 2 has not been heard of for" in capsys.readouterr().err


# --- whole runs

SMALL = """--preset smoke --sync server --comm mpi --total-env-steps 1500 --envs-per-rank 4 --eval-every 600
    --checkpoint-every 500 --eval-episodes 3 --stall-timeout 0"""


def train(run_dir, size, *flags):
    """Train on threads; each rank's training."""
    config = parse([*SMALL.split(), "--run-dir", str(run_dir), *flags])
    run_dir.mkdir(exist_ok=True)

    def body(comm):
        training = start(Training, config, comm, run_dir, SimpleNamespace(requested=False), PhaseTimer())
        training.complete()
        return training

    return run_ranks(size, body)


def test_a_whole_run(tmp_path):
    trainings = train(tmp_path, 3)
    server, workers = trainings[0], trainings[1:]
    assert server.clock.env_steps >= 1500
    for worker in workers:
        assert worker.clock.env_steps == server.clock.env_steps
        assert worker.learner.sha256() == server.learner.sha256()
        assert worker.clock.own_env_steps > 100
    told = sum(worker.clock.own_env_steps for worker in workers)
    assert told == server.clock.env_steps
    # Every worker owes its own; it may have begun a little later than the job, and not have got to its last.
    owed = (server.clock.env_steps - 200) * 8 / 32
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["updates"] == server.clock.updates
    assert owed - 8 <= summary["updates"] + summary["dropped_updates"] <= owed
    assert sum(summary["staleness"].values()) == summary["updates"] + summary["dropped_updates"]
    assert summary["eval_episodes"] == 3
    serving, *acting = summary["rank_env_steps_per_second"]
    assert serving == 0
    assert min(acting) > 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("staleness_mean" in line for line in lines)
    assert sum("eval_return_mean" in line for line in lines) == 3  # at 600, 1200 and the end
    assert len(list((tmp_path / "checkpoints").glob("0*"))) == 3


def test_a_run_goes_on_with_its_counters_and_weights(tmp_path):
    first = train(tmp_path, 3)
    second = train(tmp_path, 3, "--total-env-steps", "2000")
    assert second[0].clock.env_steps >= 2000
    before, after = first[0].learner.sync.staleness, second[0].learner.sync.staleness
    dropped = second[0].learner.sync.dropped_updates
    assert sum(after.values()) == second[0].clock.updates + dropped
    assert all(after[key] >= count for key, count in before.items())
    new = second[0].clock.env_steps - first[0].clock.env_steps
    assert abs(second[0].clock.updates + dropped - first[0].clock.updates - new / 4) < 4
    other = train(tmp_path, 2, "--total-env-steps", "2200")  # one worker has the replay of both
    assert other[0].clock.env_steps >= 2200
    assert len(other[1].replay) > len(second[1].replay)
    assert len(other[0].replay) == 0  # or it would be dealt to the workers once more
