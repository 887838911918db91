"""Gradients pushed to rank 0, on ranks that are threads; real MPI is in tests/distributed/test_sync.py."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hvdqn import parts
from hvdqn.clock import Clock, WorkerClock
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config, parse
from hvdqn.errors import NonFiniteError
from hvdqn.metrics import PhaseTimer
from hvdqn.startup import make_trainer, start_run
from hvdqn.sync.messages import GRADIENT, REPORT, Push
from hvdqn.sync.statistics import LEARNED, REPORTED
from hvdqn.trainer import ServingTrainer, Trainer
from tests.learning_ranks import (
    STOP_VOTE,
    LearningRank,
    make_batch,
    nan_batch,
    small_network,
)
from tests.ranks import run_ranks


def make_rank(comm, settings=(), sync="server", **parallel):
    """Return a rank of a job whose workers have 8 environments and learn from batches of 16."""
    settings = {"lr": 1e-3, "lr_scaling": "none", "batch_per_rank": 16, **dict(settings)}
    config = Config().replace(sync=sync, **settings, **parallel)
    clock = WorkerClock(8, 16, 2.0, 0) if comm.rank else Clock(8 * (comm.size - 1), 16, 2.0, 0)
    return LearningRank(config, comm, small_network(config, seed=3), clock)


def serve(rank, until):
    """Serve until so many updates have been pushed, then synchronize; rank 0's part."""
    while rank.strategy.exchanged_updates < until:
        rank.serve()
    rank.synchronize()
    return rank


def push_all(rank, seeds):
    """Push the gradient of one minibatch for each seed, then synchronize; a worker's part."""
    for seed in seeds:
        rank.update(make_batch(seed=seed))
    rank.synchronize()
    return rank


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_one_worker_that_pulls_at_every_update_learns_as_a_single_process(tau):
    """Nothing is stale, so rank 0 takes the very steps that a single process takes."""
    settings = {"target_tau": tau}
    alone = make_rank(LocalComm(), settings, sync="gradients")
    for seed in range(10):
        alone.update(make_batch(seed=seed))
    ranks = run_ranks(
        2,
        lambda comm: (
            push_all(make_rank(comm, settings), range(10))
            if comm.rank
            else serve(make_rank(comm, settings), 10)
        ),
    )
    for rank in ranks:
        assert torch.equal(rank.learner.parameters, alone.learner.parameters)
    assert torch.equal(ranks[0].learner.target_parameters, alone.learner.target_parameters)
    assert torch.equal(ranks[1].learner.target_parameters, alone.learner.target_parameters)
    assert ranks[0].strategy.staleness == {0: 10}
    assert ranks[0].totals.pop()["loss"] == pytest.approx(alone.totals.pop()["loss"])


def test_a_target_network_that_is_copied_comes_with_the_next_weights():
    def body(comm):
        rank = make_rank(comm)
        if comm.rank:
            return push_all(rank, range(4))
        server = rank.strategy
        while server.exchanged_updates < 4:
            rank.serve()
            if server.exchanged_updates == 2 and server.target_version == 0:
                assert server.update_target() == []
        rank.synchronize()
        return rank

    server, worker = run_ranks(2, body)
    before = make_rank(LocalComm(), sync="gradients").learner.parameters
    assert not torch.equal(server.learner.target_parameters, before)
    assert not torch.equal(server.learner.target_parameters, server.learner.parameters)
    assert torch.equal(worker.learner.target_parameters, server.learner.target_parameters)


@pytest.mark.parametrize("pull_every", [1, 3])
def test_traffic_is_as_expected(pull_every):
    def body(comm):
        rank = make_rank(comm, pull_every=pull_every)
        if comm.rank:
            return push_all(rank, range(30))
        return serve(rank, 60)

    ranks = run_ranks(3, body)
    for rank in ranks:
        strategy = rank.strategy
        messages, size = strategy.expected_traffic()
        # A synchronization costs one exchange more.
        assert strategy.sent_messages / strategy.exchanged_updates == pytest.approx(messages, rel=0.05)
        assert strategy.sent_bytes / strategy.exchanged_updates == pytest.approx(size, rel=0.05)
    staleness = ranks[0].strategy.staleness
    assert sum(staleness.values()) == 60
    assert max(staleness) >= pull_every - 1  # the worker's own pushes since it pulled


# --- what rank 0 does with a push


def make_server(settings=(), **parallel):
    """Return rank 0 of three, without connections to the others."""
    comm = SimpleNamespace(
        rank=0, size=3, local_rank=0, local_size=3, duplicate=lambda: None, broadcast_=lambda tensor: None
    )
    return make_rank(comm, settings, **parallel)


def push(rank, worker=1, kind=GRADIENT, gradient=None, **fields):
    """Let rank 0 receive a push with these header fields."""
    header = Push(
        kind=kind,
        version=rank.strategy.version,
        target_version=0,
        pull=1,
        env_steps=8,
        progress=0.0,
        largest_weight=1.0,
        finite=1.0,
    )
    if gradient is not None:
        rank.learner.gradient.copy_(gradient)
    statistics = np.concatenate((np.zeros(len(REPORTED)), np.ones(len(LEARNED))))
    rank.accumulate(rank.strategy.apply_push(worker, replace(header, **fields), statistics))


def test_env_steps_are_counted_as_they_are_reported():
    rank = make_server()
    push(rank, kind=REPORT, env_steps=80)
    push(rank, 2, env_steps=16, gradient=torch.ones(rank.learner.gradient.shape))
    assert rank.clock.env_steps == 96
    assert rank.clock.last_tick == 16
    assert rank.clock.updates == 1


def test_weights_that_came_with_a_synchronization_are_fresh():
    def body(comm):
        rank = make_rank(comm, pull_every=10)
        for until in (3, 6):
            if comm.rank:
                push_all(rank, range(3))
            else:
                serve(rank, until)
        return rank

    server, _ = run_ranks(2, body)
    assert server.strategy.staleness == {0: 2, 1: 2, 2: 2}


def test_a_gradient_that_is_too_stale_is_dropped_and_counted():
    rank = make_server(max_staleness=2)
    ones = torch.ones(rank.learner.gradient.shape)
    for _ in range(3):
        push(rank, gradient=ones)
    digest = rank.sha256()
    push(rank, 2, gradient=ones, version=0)
    assert rank.sha256() == digest
    push(rank, 2, gradient=ones, version=1)
    assert rank.sha256() != digest
    assert rank.strategy.dropped_updates == 1
    assert rank.strategy.staleness == {0: 3, 3: 1, 2: 1}
    assert rank.strategy.metrics() == {
        "dropped_updates": 1,
        "workers": 2,
        "staleness_mean": 1.0,
        "staleness_max": 3,
    }
    assert rank.clock.updates == 4
    counters = json.loads(json.dumps(rank.strategy.counters()))
    again = make_server().strategy
    again.load_counters(counters)
    assert again.staleness == rank.strategy.staleness
    assert again.dropped_updates == 1


@pytest.mark.parametrize("found_by", ["worker", "server"])
def test_gradients_that_are_not_finite_are_skipped_and_counted(found_by):
    rank = make_server({"max_skipped_updates": 3})
    digest = rank.sha256()
    gradient = torch.full(rank.learner.gradient.shape, 1.0 if found_by == "worker" else float("nan"))
    for skipped in range(2):
        push(rank, gradient=gradient, finite=found_by == "server")
        assert rank.totals.skipped_updates == skipped + 1
    assert rank.sha256() == digest
    assert rank.strategy.failed == (0, 0)
    # Another worker's finite gradient does not reset the count.
    push(rank, 2, gradient=torch.ones(rank.learner.gradient.shape))
    push(rank, gradient=gradient, finite=found_by == "server")
    assert rank.strategy.failed == (3, 1)


def test_the_gradients_of_all_workers_are_divided_by_one_importance_weight():
    rank = make_server({"optimizer": "sgd", "max_grad_norm": 0.0})
    parameters, steps = rank.learner.parameters, []
    ones = torch.ones(rank.learner.gradient.shape)
    for worker, largest in ((1, 4.0), (2, 1.0), (1, 1.0), (2, 1.0)):
        before = parameters.clone()
        push(rank, worker, gradient=ones, largest_weight=largest)
        steps.append(float((before - parameters).mean() / 1e-3))
    assert steps == pytest.approx([1 / 4, 1 / 4, 1, 1], rel=1e-3)


def test_all_ranks_end_together_if_the_gradients_of_one_worker_stay_not_finite():
    def body(comm):
        rank = make_rank(comm, {"max_skipped_updates": 3})
        with pytest.raises(NonFiniteError, match=r"3 updates in a row .* rank 2\."):
            push_or_serve(rank, comm.rank)

    def push_or_serve(rank, number):
        batch = nan_batch(seed=0) if number == 2 else make_batch()
        while number:
            rank.update(batch)
        serve(rank, 1_000_000)

    run_ranks(3, body)


# --- workers that die

STALL_TIMEOUT_SECONDS = 1.0


def lose_rank_2(comm, **parallel):
    """Run four ranks, of which rank 2 falls silent after five pushes."""
    rank = make_rank(comm, stall_timeout=STALL_TIMEOUT_SECONDS, **parallel)
    if comm.rank == 0:
        while len(rank.strategy.workers) == 3:  # the others push meanwhile
            rank.serve()
        rank.exchange_stats(STOP_VOTE)
        rank.synchronize()
    else:
        pushes = 0
        while not rank.stop_voted and (comm.rank != 2 or pushes < 5):
            rank.update(make_batch())
            pushes += 1
        if comm.rank != 2:
            rank.synchronize()
    return rank


def test_a_dead_worker_is_dropped_if_that_is_tolerated(capsys):
    ranks = run_ranks(4, lambda comm: lose_rank_2(comm, tolerate_dead_workers=True))
    assert "rank 2 has been silent for" in capsys.readouterr().err
    living = [ranks[0], ranks[1], ranks[3]]
    assert [rank.comm.rank for rank in living] == [0, 1, 2]
    assert [rank.comm.size for rank in living] == [3, 3, 3]
    assert len({rank.sha256() for rank in living}) == 1
    assert ranks[0].strategy.workers == {1, 3}


def test_a_dead_worker_ends_the_job_if_that_is_not_tolerated(capsys):
    with pytest.raises(SystemExit) as ended:
        run_ranks(4, lose_rank_2)
    assert ended.value.code == 1
    assert "rank 2 has been silent for" in capsys.readouterr().err


# --- whole runs

SMALL = """--preset smoke --sync server --comm mpi --total-env-steps 1500 --envs-per-rank 4 --eval-every 600
    --checkpoint-every 500 --eval-episodes 3 --stall-timeout 0"""


def train(run_dir, size, *flags):
    """Train on threads; return each rank's trainer."""
    config = parse([*SMALL.split(), "--run-dir", str(run_dir), *flags])
    run_dir.mkdir(exist_ok=True)

    def body(comm):
        stop = SimpleNamespace(requested=False)
        trainer = start_run(config, comm, run_dir, stop, PhaseTimer(), make_trainer)
        trainer.complete()
        return trainer

    return run_ranks(size, body)


def test_rank_0_builds_no_environments_and_no_replay(monkeypatch):
    config = parse(SMALL.split())
    built = []
    for name in ("make_environments", "make_replay", "make_actor"):
        make = getattr(parts, name)
        # Appending to a list is safe from several threads.
        monkeypatch.setattr(
            parts, name, lambda *args, make=make, name=name: built.append(name) or make(*args)
        )
    made = run_ranks(3, lambda comm: parts.build_parts(config, comm, PhaseTimer()))
    assert sorted(built) == ["make_actor"] * 2 + ["make_environments"] * 2 + ["make_replay"] * 2
    assert [rank.acting is None for rank in made] == [True, False, False]
    assert [rank.role.acts for rank in made] == [False, True, True]
    assert len({rank.learner.sha256() for rank in made}) == 1, "rank 0 has another network than the workers"
    for rank in made[1:]:
        rank.acting.envs.close()


def test_a_whole_run(tmp_path):
    trainers = train(tmp_path, 3)
    server, workers = trainers[0], trainers[1:]
    assert [type(trainer) for trainer in trainers] == [ServingTrainer, Trainer, Trainer]
    assert server.clock.env_steps >= 1500
    for worker in workers:
        assert worker.clock.env_steps == server.clock.env_steps
        assert worker.learner.sha256() == server.learner.sha256()
        assert worker.clock.own_env_steps > 100
    reported = sum(worker.clock.own_env_steps for worker in workers)
    assert reported == server.clock.env_steps
    # Each worker owes its own updates. It may have begun later than the job, and not have taken its last update.
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


def test_a_run_resumes_with_its_counters_and_weights(tmp_path):
    first = train(tmp_path, 3)
    second = train(tmp_path, 3, "--total-env-steps", "2000")
    assert second[0].clock.env_steps >= 2000
    before, after = first[0].strategy.staleness, second[0].strategy.staleness
    dropped = second[0].strategy.dropped_updates
    assert sum(after.values()) == second[0].clock.updates + dropped
    assert all(after[key] >= count for key, count in before.items())
    new = second[0].clock.env_steps - first[0].clock.env_steps
    assert abs(second[0].clock.updates + dropped - first[0].clock.updates - new / 4) < 4
    other = train(tmp_path, 2, "--total-env-steps", "2200")  # one worker has the replay of both
    assert other[0].clock.env_steps >= 2200
    assert len(other[1].acting.replay) > len(second[1].acting.replay)
    assert other[0].parts.acting is None  # or it would take a share of the replay
