"""Rollouts in place of replay: which transitions minibatches hold, with which lambda-returns, against naive loops."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdqn.replay import Batch, Rollout, rollout_rows
from hvdqn.replay.replay import TERMINATED, TRUNCATED
from hvdqn.step import Step
from tests.unit.replay_naive import Moment, ScriptedEnvs, moments

GAMMA, LAMBDA = 0.9, 0.6

SCRIPT = (
    ((5, TERMINATED), (1, TRUNCATED), (7, TRUNCATED), (2, TERMINATED)),
    ((3, TRUNCATED), (40, TERMINATED), (1, TERMINATED)),
    ((1, TERMINATED), (1, TRUNCATED)),
)


def value_of(moment: Moment) -> float:
    """Return V at this moment: any number will do, if it differs between moments."""
    env, episode, time = moment
    return 0.5 + np.sin(3.0 * env + 1.7 * episode + 0.9 * time)


def values(observation: Any, mask: Any) -> np.ndarray:
    return np.array([value_of(moment) for moment in moments(observation)], np.float32)


def make_rollout(
    envs: ScriptedEnvs, steps: int, epochs: int = 1, frame_stack: int = 1, seed: int = 0
) -> Rollout:
    return Rollout(
        steps,
        LAMBDA,
        epochs,
        values,
        envs=envs.envs,
        capacity=rollout_rows(envs.envs, steps, frame_stack),
        observation_shape=(3,),
        observation_dtype=np.float32,
        rng=np.random.default_rng(seed),
        frame_stack=frame_stack,
        gamma=GAMMA,
    )


def step_envs(rollout: Rollout, envs: ScriptedEnvs) -> set[Moment]:
    """Take the steps of a rollout; return the moments at which its transitions begin."""
    before = taken(envs)
    for _ in range(rollout.steps):
        rollout.add(*envs.step())
    return taken(envs) - before


def taken(envs: ScriptedEnvs) -> set[Moment]:
    return {
        (env, number, time)
        for env, episodes in enumerate(envs.record)
        for number, episode in enumerate(episodes)
        for time in range(len(episode.actions))
    }


def naive_return(moment: Moment, rollout: set[Moment], envs: ScriptedEnvs) -> float:
    """Return r + gamma ((1 - lambda) V + lambda G) of the next moment, whose G is V where the rollout ends."""
    env, number, time = moment
    episode, later = envs.record[env][number], (env, number, time + 1)
    reward = episode.rewards[time]
    if episode.end == TERMINATED and time + 1 == episode.length:
        return reward
    following = naive_return(later, rollout, envs) if later in rollout else value_of(later)
    return reward + GAMMA * ((1 - LAMBDA) * value_of(later) + LAMBDA * following)


def check_minibatch(batch: Batch, rollout: set[Moment], envs: ScriptedEnvs) -> None:
    for i, moment in enumerate(moments(batch.observation)):
        assert batch.action[i] == envs.record[moment[0]][moment[1]].actions[moment[2]]
        expected = naive_return(moment, rollout, envs)
        np.testing.assert_allclose(batch.reward[i], expected, rtol=1e-5, atol=1e-5)
    assert len(batch.next_observation) == 0
    assert not batch.discount.any()
    assert (batch.weight == 1).all()


@settings(max_examples=100, deadline=None)
@given(
    autoreset=st.sampled_from(["same_step", "next_step"]),
    steps=st.integers(2, 12),
    epochs=st.integers(1, 3),
    minibatches=st.sampled_from([1, 3]),
    frame_stack=st.integers(1, 4),
    script=st.lists(
        st.lists(
            st.tuples(st.integers(1, 12), st.sampled_from([TERMINATED, TRUNCATED])), min_size=1, max_size=4
        ),
        min_size=3,
        max_size=3,
    ),
)
def test_returns_of_random_streams_equal_those_of_a_naive_loop(
    autoreset: str, steps: int, epochs: int, minibatches: int, frame_stack: int, script: Any
) -> None:
    envs = ScriptedEnvs(script, autoreset)
    rollout = make_rollout(envs, steps, epochs, frame_stack)
    rollout.start(envs.reset())
    size = envs.envs * steps // minibatches
    for _ in range(4):
        begun = step_envs(rollout, envs)
        for _ in range(epochs):
            seen: list[Moment] = []
            for _ in range(minibatches):
                batch = rollout.sample(size)
                check_minibatch(batch, begun, envs)
                seen += moments(batch.observation)
            assert set(seen) == begun, "every transition is learned from once per epoch"
            most = -(-envs.envs * steps // len(begun))  # more than once only where steps were no transitions
            assert max(Counter(seen).values()) <= most


def test_returns_by_hand() -> None:
    """Rewards 1, 2, 4, 8 with V = 10 everywhere: terminated after 2, truncated after 4, cut by the end after 8."""
    one = make_rollout(ScriptedEnvs(SCRIPT[:1], "same_step"), 4)
    one.values = lambda observation, mask: np.full(len(observation), 10.0, np.float32)
    one.start(np.zeros((1, 3), np.float32))
    for time, (reward, terminated, truncated) in enumerate([(1, 0, 0), (2, 1, 0), (4, 0, 1), (8, 0, 0)]):
        done = np.array([bool(terminated or truncated)])
        seen, first = np.full((1, 3), time + 1, np.float32), np.full((1, 3), 100 + time, np.float32)
        step = Step(
            np.array([reward], np.float32),
            np.array([bool(terminated)]),
            np.array([bool(truncated)]),
            seen,
            first if done[0] else seen,
            done,
            np.array([True]),
        )
        one.add(np.array([time]), step)
    batch = one.sample(4)
    returns = dict(zip(batch.action.tolist(), batch.reward.tolist(), strict=True))
    # 1 + 0.9 (0.4 x 10 + 0.6 x 2) = 5.68; 2; 4 + 0.9 x 10 = 13; 8 + 0.9 x 10 = 17
    assert returns == pytest.approx({0: 5.68, 1: 2.0, 2: 13.0, 3: 17.0})


def test_the_rest_of_a_stream_is_the_same_after_a_restore_in_the_middle_of_a_rollout() -> None:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    one, other = make_rollout(envs, 6, epochs=2), make_rollout(envs, 6, epochs=2, seed=9)
    one.start(envs.reset())
    step_envs(one, envs)
    while True:
        one.sample(9)
        if not one._minibatches:
            break
    for _ in range(4):
        one.add(*envs.step())
    other.load_state({name: np.array(array) for name, array in one.state().items()})
    for _ in range(2):
        step = envs.step()
        for rollout in (one, other):
            rollout.add(*step)
    for _ in range(4):
        mine, same = one.sample(9), other.sample(9)
        np.testing.assert_array_equal(mine.observation, same.observation)
        np.testing.assert_array_equal(mine.reward, same.reward)


def test_a_transition_that_is_not_finite_is_left_out_and_ends_the_recursion() -> None:
    envs = ScriptedEnvs((((40, TERMINATED),),), "same_step")
    rollout = make_rollout(envs, 4)
    rollout.start(envs.reset())
    for time in range(4):
        actions, step = envs.step()
        if time == 2:
            step.reward[0] = np.nan
        rollout.add(actions, step)
    batch = rollout.sample(4)
    assert set(moments(batch.observation)) == {(0, 0, 0), (0, 0, 1), (0, 0, 3)}
    known = {(0, 0, 0), (0, 0, 1)}
    for i, moment in enumerate(moments(batch.observation)):
        assert batch.reward[i] == pytest.approx(naive_return(moment, known, envs), rel=1e-5)


def test_a_rollout_of_discarded_transitions_gives_rewards_that_are_not_finite() -> None:
    envs = ScriptedEnvs((((40, TERMINATED),),), "same_step")
    rollout = make_rollout(envs, 2, epochs=2)
    rollout.start(envs.reset())
    for _ in range(2):
        actions, step = envs.step()
        step.reward[0] = np.inf
        rollout.add(actions, step)
    assert np.isnan(rollout.sample(2).reward).all()
    assert np.isnan(rollout.sample(2).reward).all()
    begun = step_envs(rollout, envs)
    assert set(moments(rollout.sample(2).observation)) == begun, "the next rollout is learned from as usual"
