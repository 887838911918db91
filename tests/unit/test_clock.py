"""When updates and periodic work are due."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdqn.clock import Clock


def clock(**changes):
    return Clock(**{"envs": 8, "global_batch": 32, "replay_ratio": 8.0, "learning_starts": 100, **changes})


def test_updates_owed_by_hand():
    """(env_steps - learning_starts) x replay_ratio // global batch: one update every 4 env steps."""
    c = clock()
    assert [c.updates_owed(n) for n in (0, 100, 103, 104, 108, 500)] == [0, 0, 0, 1, 2, 100]


def test_a_ratio_below_one_is_exact():
    assert clock(replay_ratio=0.1, learning_starts=0).updates_owed(3_200_000) == 10_000


def test_updates_become_due_one_by_one():
    c = clock(learning_starts=0)
    c.tick()
    taken = 0
    while c.update_due():
        c.updates += 1
        taken += 1
    assert taken == 2


@pytest.mark.parametrize(
    ("env_steps", "every", "due"), [(16, 16, True), (24, 16, False), (32, 16, True), (16, 0, False)]
)
def test_due(env_steps, every, due):
    c = clock()
    for _ in range(env_steps // 8):
        c.tick()
    assert c.due(every) is due


@given(envs=st.integers(1, 40), every=st.integers(1, 100), ticks=st.integers(1, 200))
def test_each_multiple_passed_makes_it_due_once(envs, every, ticks):
    c = clock(envs=envs)
    fired = 0
    for _ in range(ticks):
        c.tick()
        fired += c.due(every)
    passed = {n // every for n in range(envs, envs * ticks + 1, envs)} - {0}
    assert fired == len(passed)


def test_resume_with_the_same_batch_owes_the_same():
    a = clock()
    a.env_steps, a.updates = 500, 100
    b = clock()
    b.resume(a.state())
    assert [b.updates_owed(n) for n in range(500, 600)] == [a.updates_owed(n) for n in range(500, 600)]


def test_resume_with_a_smaller_batch_owes_nothing_for_the_past():
    """Half the ranks take twice the updates from here on, and do not catch up on the past."""
    a = clock()
    a.env_steps, a.updates = 500, 100
    b = clock(global_batch=16, envs=4)
    b.resume(a.state())
    assert not b.update_due()
    assert b.updates_owed(600) - 100 == 50
