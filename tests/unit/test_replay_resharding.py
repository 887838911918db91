from __future__ import annotations

import numpy as np
import pytest

from hvdqn.replay import PrioritizedSampler, Replay, Ring, reshard
from hvdqn.replay.sampling import Assembler
from hvdqn.replay.storage import TERMINATED, TRUNCATED
from tests.unit.replay_naive import Moment, ScriptedEnvs, check_batch, moments, ring_for

SCRIPT = (
    ((5, TERMINATED), (1, TRUNCATED), (7, TRUNCATED), (2, TERMINATED)),
    ((3, TRUNCATED), (40, TERMINATED), (1, TERMINATED)),
)
FRAME_STACK, N_STEP = 3, 2
CAPACITY = 240  # of the whole job


def run(size: int, steps: int) -> tuple[ScriptedEnvs, list[Replay]]:
    """A job of `size` ranks with two envs each; one record of all envs."""
    envs = ScriptedEnvs(SCRIPT * size, "same_step")
    replays = [empty(size, rank) for rank in range(size)]
    observation = envs.reset()
    shares = [slice(2 * rank, 2 * rank + 2) for rank in range(size)]
    for replay, mine in zip(replays, shares, strict=True):
        replay.start(observation[mine])
    for _ in range(steps):
        action, step = envs.step()
        for replay, mine in zip(replays, shares, strict=True):
            part = type(step)(*(getattr(step, name)[mine] for name in step.__dataclass_fields__))
            replay.add(action[mine], part)
    return envs, replays


def empty(size: int, rank: int) -> Replay:
    ring = Ring(2, CAPACITY // size, (3,), np.float32, FRAME_STACK, N_STEP, gamma=0.9)
    return Replay(ring, PrioritizedSampler(ring, np.random.default_rng(rank)))


def held(replay: Replay) -> list[Moment]:
    return moments(Assembler(replay.ring).build(replay.ring.starts()).observation)


@pytest.mark.parametrize("steps", [4, 30, 500])
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3), (4, 2), (2, 2)])
def test_dealt_transitions_are_true_none_twice_and_few_lost(before: int, after: int, steps: int) -> None:
    envs, old = run(before, steps)
    states = [replay.state() for replay in old]
    dealt, rows_in_use = [], []
    for rank in range(after):
        replay = empty(after, rank)
        replay.load_state(reshard(states, replay.ring, rank, after))
        check_batch(Assembler(replay.ring).build(replay.ring.starts()), envs, replay.ring)
        np.testing.assert_array_equal(
            np.flatnonzero(replay.sampler._tree.mass),  # type: ignore[attr-defined]
            replay.ring.starts(),
        )
        dealt += held(replay)
        rows_in_use += [rows.stop - rows.start for _, rows in replay.ring.in_use()]
    was = [moment for replay in old for moment in held(replay)]
    assert len(set(dealt)) == len(dealt)
    assert set(dealt) <= set(was)
    # Each cut costs what its stacks and n-step paths would have crossed; the new rings have fewer rows to spare.
    pieces = 2 * (before + after)
    assert len(was) - len(dealt) <= pieces * (FRAME_STACK + N_STEP)
    assert max(rows_in_use) - min(rows_in_use) <= 1


def test_a_dealt_replay_goes_on() -> None:
    envs, old = run(2, 100)
    replay = empty(1, 0)
    replay.load_state(reshard([one.state() for one in old], replay.ring, 0, 1))
    dealt = set(held(replay))
    later = ScriptedEnvs(SCRIPT, "same_step", seed=1)
    later.record = envs.record[:2]
    replay.start(later.reset())
    for _ in range(15):
        replay.add(*later.step())
    envs.record[:2] = later.record
    check_batch(replay.sample(64), envs, replay.ring)
    now = set(held(replay))
    assert len(now - dealt) >= 10
    assert len(now & dealt) >= 10


def test_priorities_are_dealt_with_their_transitions() -> None:
    _, old = run(2, 100)
    priority: dict[Moment, float] = {}
    for replay in old:
        rows = replay.ring.starts()
        td_errors = np.random.default_rng(0).random(rows.size)
        replay.update(replay.ring.row_ids(rows), td_errors)
        mass = replay.sampler._tree.mass[rows]  # type: ignore[attr-defined]
        priority.update(zip(held(replay), mass.tolist(), strict=True))
    for rank in range(3):
        replay = empty(3, rank)
        replay.load_state(reshard([one.state() for one in old], replay.ring, rank, 3))
        mass = replay.sampler._tree.mass[replay.ring.starts()]  # type: ignore[attr-defined]
        assert mass.tolist() == [priority[moment] for moment in held(replay)]


def test_shards_that_hold_nothing_yet_are_dealt_too() -> None:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    old, ring = ring_for(envs, 60), ring_for(envs, 60)
    ring.load_state(reshard([old.state()], ring, 0, 1))
    ring.start(envs.reset())
    ring.add(*envs.step())
    assert len(ring) == 2
