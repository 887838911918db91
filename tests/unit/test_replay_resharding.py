from __future__ import annotations

import numpy as np
import pytest

from hvdqn.replay import PrioritizedReplay, reshard
from hvdqn.replay.replay import TERMINATED, TRUNCATED
from tests.unit.replay_naive import Moment, ScriptedEnvs, check_batch, make_replay, moments

SCRIPT = (
    ((5, TERMINATED), (1, TRUNCATED), (7, TRUNCATED), (2, TERMINATED)),
    ((3, TRUNCATED), (40, TERMINATED), (1, TERMINATED)),
)
FRAME_STACK, N_STEP = 3, 2
CAPACITY = 240  # of the whole job


def run(size: int, steps: int) -> tuple[ScriptedEnvs, list[PrioritizedReplay]]:
    """Run a job of `size` ranks with two environments each; return the record of all and every rank's replay."""
    envs = ScriptedEnvs(SCRIPT * size, "same_step")
    replays = [empty(size, rank) for rank in range(size)]
    observation = envs.reset()
    shares = [slice(2 * rank, 2 * rank + 2) for rank in range(size)]
    for replay, mine in zip(replays, shares, strict=True):
        replay.start(observation[mine])
    for _ in range(steps):
        action, step = envs.step()
        for replay, mine in zip(replays, shares, strict=True):
            names = (name for name in step.__dataclass_fields__ if "mask" not in name)
            part = type(step)(*(getattr(step, name)[mine] for name in names))
            replay.add(action[mine], part)
    return envs, replays


def empty(size: int, rank: int) -> PrioritizedReplay:
    rng = np.random.default_rng(rank)
    return PrioritizedReplay(2, CAPACITY // size, (3,), np.float32, rng, FRAME_STACK, N_STEP, gamma=0.9)


def held(replay: PrioritizedReplay) -> list[Moment]:
    return moments(replay.build_batch(replay.sampleable_rows()).observation)


@pytest.mark.parametrize("steps", [4, 30, 500])
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3), (4, 2), (2, 2)])
def test_resharded_transitions_are_right_unique_and_few_are_lost(before: int, after: int, steps: int) -> None:
    envs, old = run(before, steps)
    states = [replay.state() for replay in old]
    resharded, rows_in_use = [], []
    for rank in range(after):
        replay = empty(after, rank)
        replay.load_state(reshard(states, replay, rank, after))
        check_batch(replay.build_batch(replay.sampleable_rows()), envs, replay)
        np.testing.assert_array_equal(np.flatnonzero(replay._tree.priorities), replay.sampleable_rows())
        resharded += held(replay)
        rows_in_use += [rows.stop - rows.start for _, rows in replay.rows_in_use()]
    was = [moment for replay in old for moment in held(replay)]
    assert len(set(resharded)) == len(resharded)
    assert set(resharded) <= set(was)
    # Each cut loses the frame stacks and n-step returns that cross it.
    pieces = 2 * (before + after)
    assert len(was) - len(resharded) <= pieces * (FRAME_STACK + N_STEP)
    assert max(rows_in_use) - min(rows_in_use) <= 1


def test_a_resharded_replay_can_be_filled_further() -> None:
    envs, old = run(2, 100)
    replay = empty(1, 0)
    replay.load_state(reshard([one.state() for one in old], replay, 0, 1))
    resharded = set(held(replay))
    later = ScriptedEnvs(SCRIPT, "same_step", seed=1)
    later.record = envs.record[:2]
    replay.start(later.reset())
    for _ in range(15):
        replay.add(*later.step())
    envs.record[:2] = later.record
    check_batch(replay.sample(64), envs, replay)
    now = set(held(replay))
    assert len(now - resharded) >= 10
    assert len(now & resharded) >= 10


def test_priorities_stay_with_their_transitions() -> None:
    _, old = run(2, 100)
    priority: dict[Moment, float] = {}
    for replay in old:
        rows = replay.sampleable_rows()
        td_errors = np.random.default_rng(0).random(rows.size)
        replay.update_priorities(replay.row_ids(rows), td_errors)
        priorities = replay._tree.priorities[rows]
        priority.update(zip(held(replay), priorities.tolist(), strict=True))
    for rank in range(3):
        replay = empty(3, rank)
        replay.load_state(reshard([one.state() for one in old], replay, rank, 3))
        priorities = replay._tree.priorities[replay.sampleable_rows()]
        assert priorities.tolist() == [priority[moment] for moment in held(replay)]


def test_empty_replays_can_be_resharded() -> None:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    old, replay = make_replay(envs, 60), make_replay(envs, 60)
    replay.load_state(reshard([old.state()], replay, 0, 1))
    replay.start(envs.reset())
    replay.add(*envs.step())
    assert len(replay) == 2
