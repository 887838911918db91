"""When updates and periodic work are due."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdqn.clock import Clock, ReportedClock


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


# --- ranks that step by themselves


def make_reported(**settings):
    """4 environments, batches of 32 at replay ratio 8: an update every 4 own env steps, one every iteration."""
    return ReportedClock(
        4, replay_ratio=8.0, **{"global_batch": 32, "learning_starts": 100, "own_earliest": 16, **settings}
    )


def test_own_env_steps_decide_when_the_next_update_is_due():
    clock = make_reported()
    for _ in range(10):
        clock.tick()
    assert not clock.update_due()  # the job has not begun to learn
    clock.hear(env_steps=100, updates=0, last_tick=0)
    taken = []
    for _ in range(5):
        clock.tick()
        while clock.update_due():
            clock.count_update()
        taken.append(clock.own_updates)
    assert taken == [0, 1, 2, 3, 4]  # what had passed before is not made up for
    assert clock.updates == 0  # of the job: it is told


def test_a_rank_that_comes_late_fills_its_own_replay_first():
    clock = make_reported()
    clock.hear(env_steps=1_000_000, updates=9, last_tick=0)
    ticks = 0
    while not clock.update_due():
        clock.tick()
        ticks += 1
    assert ticks == 4 + 1


def test_what_all_do_together_is_due_at_a_meeting_and_no_later():
    clock = make_reported()
    clock.tick()
    assert not clock.due(10)
    clock.hear(env_steps=1_003, updates=5, last_tick=9)  # between 994 and 1003
    assert clock.due(1_000)
    assert not clock.due(400)
    clock.tick()
    assert clock.due(1_000), "it has not met the others yet"
    clock.met = True
    assert clock.due(1_000)
    clock.tick()
    assert not clock.due(1_000)


def test_polls_come_by_own_iterations():
    clock = make_reported(learning_since=0)
    due = []
    for _ in range(8):
        clock.tick()
        due.append(clock.poll_due(4))
    assert due == [False, False, False, True] * 2


def test_before_learning_it_asks_at_every_turn_how_far_the_job_is():
    clock = make_reported()
    clock.tick()
    assert clock.poll_due(4)


@pytest.mark.parametrize(("batch", "updates"), [(32, 10), (16, 20), (64, 5)])
def test_a_rank_that_resumes_with_another_batch_owes_nothing_for_the_past(batch, updates):
    before = make_reported(learning_since=0)
    for _ in range(100):
        before.tick()
        before.count_update()
    clock = make_reported(global_batch=batch)
    clock.load_own_state(before.own_state())
    assert not clock.update_due()
    taken = 0
    for _ in range(10):
        clock.tick()
        while clock.update_due():
            clock.count_update()
            taken += 1
    assert taken == updates


def test_a_checkpoint_that_names_no_rate_was_counted_at_this_one():
    clock = make_reported()
    clock.load_own_state({"own_env_steps": 400, "own_updates": 90, "learning_since": 0})
    assert (clock.own_updates, clock.learning_since, clock.told_env_steps) == (90, 0, 400)
    make_reported().load_own_state({})


def test_what_is_a_ranks_own_goes_on_and_is_not_reported_twice():
    clock, again = make_reported(), make_reported()
    for _ in range(3):
        clock.tick()
    assert clock.unreported() == 12
    again.load_own_state(clock.own_state())
    assert again.own_env_steps == 12
    assert again.unreported() == 0
    again.tick()
    assert again.unreported() == 4


def test_a_resumed_rank_waits_where_replay_is_refilled():
    clock = make_reported(own_earliest=0)
    state = make_reported().state() | {"env_steps": 5_000, "updates": 7}
    clock.resume(state, refill=True)
    clock.tick()
    assert not clock.update_due()
    clock.hear(5_100, 7, 0)
    for _ in range(2):
        clock.update_due()
        clock.tick()
    assert clock.update_due()
