"""When updates and periodic work are due."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdqn.clock import Clock, WorkerClock


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
    while c.updates_due() > 0:
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
def test_each_multiple_that_is_passed_is_due_once(envs, every, ticks):
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
    assert b.updates_due() == 0
    assert b.updates_owed(600) - 100 == 50


def test_the_updates_of_a_rollout_are_due_at_once():
    """Rollouts of 4 steps of 8 environments, learned from 3 times in minibatches of 8: 12 updates each."""
    c = clock(global_batch=8, replay_ratio=3.0, learning_starts=0, rollout_steps=4)
    due = []
    for _ in range(9):
        c.tick()
        due.append(c.updates_due())
        c.updates += due[-1]
    assert due == [0, 0, 0, 12, 0, 0, 0, 12, 0]


def test_a_dropped_rollout_begins_anew():
    a = clock(global_batch=8, replay_ratio=3.0, learning_starts=0, rollout_steps=4)
    for _ in range(6):
        a.tick()
    a.updates = 12
    b = clock(envs=16, global_batch=16, replay_ratio=3.0, learning_starts=0, rollout_steps=4)
    b.resume(a.state(), refill=True)
    due = []
    for _ in range(5):
        due.append(b.updates_due())
        b.tick()
    assert due == [0, 0, 0, 0, 12]


# --- clocks of workers


def test_the_updates_of_a_workers_rollout_are_due_at_once():
    clock = WorkerClock(4, global_batch=8, replay_ratio=2.0, learning_starts=0, rollout_steps=4)
    due = []
    for _ in range(8):
        due.append(clock.updates_due())
        clock.own_updates += due[-1]
        clock.tick()
    assert due == [0, 0, 0, 0, 4, 0, 0, 0]


def make_worker_clock(**settings):
    """4 environments, batches of 32 at replay ratio 8: an update every 4 own env steps, one every iteration."""
    return WorkerClock(
        4, replay_ratio=8.0, **{"global_batch": 32, "learning_starts": 100, "own_earliest": 16, **settings}
    )


def test_own_env_steps_decide_when_the_next_update_is_due():
    clock = make_worker_clock()
    for _ in range(10):
        clock.tick()
    assert clock.updates_due() == 0  # the job has not begun to learn
    clock.set_job(env_steps=100, updates=0, last_tick=0)
    taken = []
    for _ in range(5):
        clock.tick()
        while clock.updates_due() > 0:
            clock.count_update()
        taken.append(clock.own_updates)
    assert taken == [0, 1, 2, 3, 4]  # no updates are owed for the env steps before
    assert clock.updates == 0  # of the job; `set_job` sets them


def test_a_rank_that_joins_late_fills_its_own_replay_first():
    clock = make_worker_clock()
    clock.set_job(env_steps=1_000_000, updates=9, last_tick=0)
    ticks = 0
    while clock.updates_due() == 0:
        clock.tick()
        ticks += 1
    assert ticks == 4 + 1


def test_what_all_ranks_do_together_is_due_right_after_they_synchronized_and_no_later():
    clock = make_worker_clock()
    clock.tick()
    assert not clock.due(10)
    clock.set_job(env_steps=1_003, updates=5, last_tick=9)  # between 994 and 1003
    assert clock.due(1_000)
    assert not clock.due(400)
    clock.tick()
    assert clock.due(1_000), "it has not synchronized with the others yet"
    clock.synchronized = True
    assert clock.due(1_000)
    clock.tick()
    assert not clock.due(1_000)


def test_polls_are_due_by_own_iterations():
    clock = make_worker_clock(learning_since=0)
    due = []
    for _ in range(8):
        clock.tick()
        due.append(clock.poll_due(4))
    assert due == [False, False, False, True] * 2


def test_before_learning_a_poll_is_due_at_every_iteration():
    clock = make_worker_clock()
    clock.tick()
    assert clock.poll_due(4)


@pytest.mark.parametrize(("batch", "updates"), [(32, 10), (16, 20), (64, 5)])
def test_a_rank_that_resumes_with_another_batch_owes_nothing_for_the_past(batch, updates):
    before = make_worker_clock(learning_since=0)
    for _ in range(100):
        before.tick()
        before.count_update()
    clock = make_worker_clock(global_batch=batch)
    clock.load_own_state(before.own_state())
    assert clock.updates_due() == 0
    taken = 0
    for _ in range(10):
        clock.tick()
        while clock.updates_due() > 0:
            clock.count_update()
            taken += 1
    assert taken == updates


def test_a_checkpoint_without_a_rate_was_counted_at_the_present_one():
    clock = make_worker_clock()
    clock.load_own_state({"own_env_steps": 400, "own_updates": 90, "learning_since": 0})
    assert (clock.own_updates, clock.learning_since, clock.reported_env_steps) == (90, 0, 400)
    make_worker_clock().load_own_state({})


def test_own_env_steps_survive_a_resume_and_are_not_reported_twice():
    clock, again = make_worker_clock(), make_worker_clock()
    for _ in range(3):
        clock.tick()
    assert clock.pop_unreported() == 12
    again.load_own_state(clock.own_state())
    assert again.own_env_steps == 12
    assert again.pop_unreported() == 0
    again.tick()
    assert again.pop_unreported() == 4


def test_a_resumed_rank_takes_no_update_until_its_replay_is_refilled():
    clock = make_worker_clock(own_earliest=0)
    state = make_worker_clock().state() | {"env_steps": 5_000, "updates": 7}
    clock.resume(state, refill=True)
    clock.tick()
    assert clock.updates_due() == 0
    clock.set_job(5_100, 7, 0)
    for _ in range(2):
        clock.updates_due()
        clock.tick()
    assert clock.updates_due() > 0
