"""Elastic runs without a launcher: what a rank keeps when another is lost, and its place in the next world."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvdqn import sync
from hvdqn.clock import Clock
from hvdqn.comm.local import LocalComm
from hvdqn.config import parse
from hvdqn.elastic.__main__ import elastic_config, elastic_options
from hvdqn.elastic.worker import ElasticWorker, SoloComm
from hvdqn.elastic.world import ElasticWorld, place_among
from hvdqn.errors import UserError
from hvdqn.faults import StopSignal
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts
from hvdqn.sync.gradients import Gradients


class PeerLostError(Exception):
    """Stands for the exception that Horovod's collectives raise."""


class FragileComm(LocalComm):
    """A rank whose nth call of the collective named `fatal` fails."""

    def __init__(self, fatal="", nth=0):
        super().__init__()
        self.fatal, self.nth, self.used = fatal, nth, Counter()

    def use(self, name):
        self.used[name] += 1
        if (name, self.used[name]) == (self.fatal, self.nth):
            raise PeerLostError

    def allreduce_sum_async(self, tensor, name):
        comm = self
        comm.use(f"launch of {name}")

        class Handle:
            def wait(self):
                comm.use(name)
                return tensor

        return Handle()

    def broadcast_(self, tensor, root=0):
        self.use("broadcast")

    def all_gather_object(self, obj):
        self.use("gather")
        return [obj]


class FragileGradients(Gradients):
    """Uses the collective of a job with several ranks, so that it can fail: a single rank needs none."""

    def launch(self, *arguments):
        super().launch(*arguments)
        self.handle = self.comm.allreduce_sum_async(self.message, name="gradient")


class ScriptedWorld:
    """Stands for `ElasticWorld`: `connect` returns the given comms in turn."""

    peer_lost = (PeerLostError,)

    def __init__(self, *comms, hosts_change=False):
        self.comms, self.hosts_change, self.cuts = list(comms), hosts_change, 0

    def connect(self):
        return self.comms.pop(0)

    def cut(self):
        self.cuts += 1

    def changed(self):
        return self.hosts_change and len(self.comms) > 0


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Return a function that trains through these worlds and returns the summary and the `ElasticWorker`."""

    monkeypatch.setattr(sync, "Gradients", FragileGradients)

    def run(name, world):
        flags = [
            "--preset",
            "smoke",
            "--total-env-steps",
            "1600",
            "--eval-every",
            "400",
            "--target-every",
            "100",
        ]
        config = elastic_config([*flags, "--run-dir", str(tmp_path / name)], max_np=1)
        worker = ElasticWorker(config, 1, world, StopSignal())
        assert worker.run() == 0
        assert not world.comms, "not all worlds were used"
        return json.loads((tmp_path / name / "summary.json").read_text()), worker

    return run


@pytest.mark.parametrize(
    ("fatal", "nth"), [("broadcast", 5), ("gather", 20), ("evaluation", 2), ("trailer", 3)], ids=str
)
def test_a_world_that_ends_between_updates_leaves_no_trace(train, fatal, nth):
    """The run continues with the same parameters, optimizer state, clock, replay and environments, bit for bit."""
    whole, _ = train("whole", ScriptedWorld(FragileComm()))
    broken, _ = train("broken", ScriptedWorld(FragileComm(fatal, nth), FragileComm()))
    assert (whole["world_changes"], broken["world_changes"]) == (0, 1)
    for name in ("param_sha256", "env_steps", "updates", "eval_return_mean"):
        assert broken[name] == whole[name], name


def test_hosts_that_change_leave_no_trace(train):
    whole, _ = train("whole", ScriptedWorld(FragileComm()))
    changed, _ = train("changed", ScriptedWorld(FragileComm(), FragileComm(), hosts_change=True))
    assert changed["world_changes"] == 1
    assert changed["param_sha256"] == whole["param_sha256"]


@pytest.mark.parametrize("nth", [1, 2, 100])
@pytest.mark.parametrize("fatal", ["gradient", "launch of gradient"])
def test_an_update_that_a_lost_rank_broke_is_taken_again(train, fatal, nth):
    whole, _ = train("whole", ScriptedWorld(FragileComm()))
    broken, worker = train("broken", ScriptedWorld(FragileComm(fatal, nth), FragileComm()))
    learner = worker.trainer.learner
    assert broken["updates"] == whole["updates"] == int(learner.optimizer.steps)
    assert broken["env_steps"] == whole["env_steps"]


def test_records_are_written_once(train, tmp_path):
    train("run", ScriptedWorld(FragileComm("evaluation", 2), FragileComm()))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    kinds = Counter((json.loads(line)["env_steps"], "eval_return_mean" in line) for line in lines)
    assert len(kinds) == 8 + 4
    assert set(kinds.values()) == {1}


class FilledElsewhere(LocalComm):
    """Two ranks; the replay of the other one is filled."""

    def all_gather_object(self, obj):
        return [obj, True]


def test_a_new_rank_samples_nothing_until_its_replay_is_filled(train):
    _, worker = train("run", ScriptedWorld(FragileComm()))
    trainer = worker.trainer
    trainer.comm = FilledElsewhere()
    trainer.agree_on_filling(filled=False)
    trainer.clock.updates_due = lambda: 0  # only act
    for _ in range(trainer.clock.learning_starts // trainer.clock.envs):
        assert trainer.sample() is None
        trainer.iterate()
    assert trainer.sample() is not None


def test_a_rank_that_kept_its_replay_continues_to_sample(train):
    _, worker = train("run", ScriptedWorld(FragileComm()))
    worker.trainer.agree_on_filling(filled=True)
    assert worker.trainer.sample() is not None


def world_clock(ranks):
    return Clock(envs=8 * ranks, global_batch=32 * ranks, replay_ratio=8.0, learning_starts=100)


def test_updates_still_owed_when_the_world_changes_are_taken_in_the_next():
    before, after = world_clock(2), world_clock(1)
    before.env_steps, before.updates = 500, 47  # of 50
    after.resume(before.state())
    assert after.updates_owed(500) - after.updates == 3
    assert after.updates_owed(508) - after.updates == 3 + 2


def test_a_change_of_the_world_does_not_cut_a_refill_short():
    before, after = world_clock(2), world_clock(1)
    before.env_steps, before.updates = 500, 50
    before.refill()
    after.resume(before.state())
    assert after.updates_owed(600) == 50
    assert after.updates_owed(604) == 51


def test_events_that_became_due_in_a_larger_world_are_still_due():
    before, after = world_clock(3), world_clock(1)
    before.env_steps = 992
    before.tick()
    after.resume(before.state())
    assert before.due(1_000)
    assert after.due(1_000)
    after.tick()
    assert not after.due(1_000)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_places_are_those_that_horovod_would_give(slots, data):
    hosts = pytest.importorskip(
        "horovod.runner.common.util.hosts", reason="no Horovod: place_among is NOT TESTED"
    )
    # Only some ranks of the plan are present.
    plan = [f"h{number}" for number, count in enumerate(slots) for _ in range(count)]
    there = sorted(data.draw(st.sets(st.sampled_from(range(len(plan))), min_size=1)))
    present = {rank: plan[rank] for rank in there}
    counted = Counter(present.values())
    infos = [hosts.HostInfo(name, counted[name]) for name in sorted(counted)]
    for rank, slot in zip(there, hosts.get_host_assignments(infos, 1), strict=True):
        names = ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size")
        assert place_among(rank, present) == {f"HOROVOD_{n.upper()}": str(getattr(slot, n)) for n in names}


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        ([], "--max-np N is missing"),
        (["--max-np", "0"], "--max-np N is missing"),
        (["--max-np", "x"], "--max-np"),
        (["--max-np", "2", "--join-timeout", "0"], "--join-timeout"),
    ],
)
def test_options_are_checked(flags, wrong):
    with pytest.raises(UserError, match=wrong):
        elastic_options(flags)


@pytest.mark.parametrize(
    "flags",
    [
        ("--comm", "mpi"),
        ("--device", "cuda"),
        ("--sync", "server"),
        ("--sync", "parameters"),
        ("--replay", "none"),
        ("--nonsense", "1"),
    ],
)
def test_settings_that_cannot_be_elastic_are_refused(flags):
    with pytest.raises(UserError, match=flags[0]):
        elastic_config(flags, max_np=2)


def test_a_rank_fills_its_replay_for_long_enough_to_sample_from_it():
    """In a world of any size: for two n-step transitions in each environment."""
    config = elastic_config(["--learning-starts", "10", "--n-step", "3", "--envs-per-rank", "4"], max_np=100)
    assert config.replay.learning_starts == 2 * 4 * 100 * 4


def test_cutting_ends_the_connections_of_a_world_and_no_others():
    (own, peer), (gone, _), (later, later_peer) = (socket.socketpair() for _ in range(3))
    world = object.__new__(ElasticWorld)  # without a launcher
    world._sockets = {(s.fileno(), os.fstat(s.fileno()).st_ino) for s in (own, gone)}
    number = gone.detach()
    os.close(number)  # Horovod's thread may do this
    os.dup2(later.fileno(), number)  # another connection now has the same descriptor
    world.cut()
    peer.settimeout(5)
    assert peer.recv(1) == b"", "the connection was not closed"
    later.send(b"x")
    assert later_peer.recv(1) == b"x"
    os.close(number)
    world.cut()  # a descriptor that is closed is ignored


def test_a_new_rank_builds_its_parts_without_the_others():
    comm = LocalComm()
    comm.rank, comm.size, comm.local_rank, comm.local_size = 2, 3, 0, 1
    parts = build_parts(parse(["--preset", "smoke"]), SoloComm(comm), PhaseTimer())
    parts.acting.envs.close()
    assert parts.device.type == "cpu" or torch.cuda.is_available()
    assert parts.clock.envs == 3 * parts.acting.envs.num_envs
