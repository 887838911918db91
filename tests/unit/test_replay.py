from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdqn.replay import Replay
from hvdqn.replay import replay as replay_module
from hvdqn.replay.replay import TERMINATED, TRUNCATED
from hvdqn.step import Step
from tests.unit.replay_naive import ScriptedEnvs, check_batch, check_replay, make_replay, moments

# Uneven on purpose: episodes of one step, longer than a ring, and both ways to end.
SCRIPT = (
    ((5, TERMINATED), (1, TRUNCATED), (7, TRUNCATED), (2, TERMINATED)),
    ((3, TRUNCATED), (40, TERMINATED), (1, TERMINATED)),
    ((1, TERMINATED), (1, TRUNCATED)),
)


def fill(replay: Replay, envs: ScriptedEnvs, steps: int) -> None:
    replay.start(envs.reset())
    for _ in range(steps):
        replay.add(*envs.step())


def one_env_replay(**settings: Any) -> Replay:
    return Replay(1, 20, (1,), np.float32, np.random.default_rng(0), **settings)


def one_env_step(reward: float, observation: float, end: int = 0) -> Step:
    terminated, truncated = np.array([end == TERMINATED]), np.array([end == TRUNCATED])
    seen, reset = np.array([[observation]], np.float32), np.array([[-1.0]], np.float32)
    done = terminated | truncated
    return Step(
        np.array([reward], np.float32),
        terminated,
        truncated,
        seen,
        reset if done else seen,
        done,
        np.array([True]),
    )


@pytest.mark.parametrize("autoreset", ["same_step", "next_step"])
@pytest.mark.parametrize("frame_stack", [1, 2, 4])
@pytest.mark.parametrize("n_step", [1, 3, 5])
def test_every_transition_equals_that_of_a_naive_loop(n_step: int, frame_stack: int, autoreset: str) -> None:
    envs = ScriptedEnvs(SCRIPT, autoreset)
    replay = make_replay(envs, 3 * 13, frame_stack, n_step)
    replay.start(envs.reset())
    check_replay(replay, envs)
    for _ in range(70):  # five times round the rings
        replay.add(*envs.step())
        check_replay(replay, envs)


@settings(max_examples=150, deadline=None)
@given(
    script=st.lists(
        st.lists(
            st.tuples(st.integers(1, 12), st.sampled_from([TERMINATED, TRUNCATED])), min_size=1, max_size=4
        ),
        min_size=1,
        max_size=3,
    ),
    autoreset=st.sampled_from(["same_step", "next_step"]),
    frame_stack=st.integers(1, 5),
    n_step=st.integers(1, 5),
    spare=st.integers(0, 12),
    steps=st.integers(0, 50),
    restart=st.integers(0, 50),
    seed=st.integers(0, 1000),
)
def test_random_streams(
    script: Any,
    autoreset: str,
    frame_stack: int,
    n_step: int,
    spare: int,
    steps: int,
    restart: int,
    seed: int,
) -> None:
    envs = ScriptedEnvs(script, autoreset, seed)
    capacity = len(script) * (frame_stack + n_step - 1 + spare)
    replay = make_replay(envs, capacity, frame_stack, n_step, seed=seed)
    replay.start(envs.reset())
    for i in range(steps):
        replay.add(*envs.step())
        if i == restart:  # as after a resume that could not restore the environments
            replay.start(envs.reset())
    check_replay(replay, envs)
    if replay.sampleable_rows().size:
        check_batch(replay.sample(16), envs, replay)


@pytest.mark.parametrize("end", [TERMINATED, TRUNCATED])
def test_n_step_numbers_by_hand(end: int) -> None:
    replay = one_env_replay(n_step=2, gamma=0.5)
    replay.start(np.array([[0.0]], np.float32))
    for reward, observation in ((1.0, 10.0), (2.0, 20.0)):
        replay.add(np.array([3]), one_env_step(reward, observation))
    replay.add(np.array([3]), one_env_step(4.0, 30.0, end))
    batch = replay.build_batch(np.array([0, 1, 2]))
    bootstrap = 0.0 if end == TERMINATED else 1.0
    assert batch.observation.ravel().tolist() == [0.0, 10.0, 20.0]
    assert batch.next_observation.ravel().tolist() == [20.0, 30.0, 30.0]
    assert batch.reward.tolist() == [1.0 + 0.5 * 2.0, 2.0 + 0.5 * 4.0, 4.0]
    assert batch.discount.tolist() == [0.25, bootstrap * 0.25, bootstrap * 0.5]


def test_frame_stacks_by_hand() -> None:
    replay = one_env_replay(frame_stack=3)
    replay.start(np.array([[0.0]], np.float32))
    replay.add(np.array([0]), one_env_step(0.0, 10.0))
    replay.add(np.array([0]), one_env_step(0.0, 20.0, TRUNCATED))
    replay.add(np.array([0]), one_env_step(0.0, 40.0))
    batch = replay.build_batch(replay.sampleable_rows())
    assert batch.observation[..., 0].tolist() == [[0, 0, 0], [0, 0, 10], [-1, -1, -1]]
    assert batch.next_observation[..., 0].tolist() == [[0, 0, 10], [0, 10, 20], [-1, -1, 40]]


def test_a_step_both_terminated_and_truncated_does_not_bootstrap() -> None:
    replay = one_env_replay()
    replay.start(np.zeros((1, 1), np.float32))
    step = one_env_step(1.0, 10.0, TERMINATED)
    step.truncated = np.array([True])
    replay.add(np.array([0]), step)
    assert replay.build_batch(np.array([0])).discount.tolist() == [0.0]


def test_n_step_code_at_n_of_one_equals_the_one_step_code() -> None:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    replay = make_replay(envs, 60)
    fill(replay, envs, 50)
    rows = replay.sampleable_rows()
    one, many = replay.build_batch(rows), replay._allocate_batch(rows.size)
    next_rows = replay._n_step_returns(rows, many)
    np.testing.assert_array_equal(one.next_observation, replay.observation[next_rows])
    np.testing.assert_array_equal(replay.shift(rows, 1), next_rows)
    np.testing.assert_array_equal(one.reward, many.reward)
    np.testing.assert_array_equal(one.discount, many.discount)


def test_rewards_past_the_end_do_not_leak_in() -> None:
    replay = one_env_replay(n_step=5)
    replay.reward[:] = np.nan
    replay.start(np.zeros((1, 1), np.float32))
    replay.add(np.array([0]), one_env_step(1.0, 10.0, TERMINATED))
    assert replay.build_batch(np.array([0])).reward.tolist() == [1.0]


@pytest.mark.parametrize("retries", [replay_module._MAX_DRAWS, 0])
@pytest.mark.parametrize(("steps", "n_step", "frame_stack"), [(9, 1, 1), (200, 1, 4), (200, 3, 2)])
def test_draws_are_uniform_over_all_transitions(
    monkeypatch: pytest.MonkeyPatch, retries: int, steps: int, n_step: int, frame_stack: int
) -> None:
    monkeypatch.setattr(replay_module, "_MAX_DRAWS", retries)  # 0: draw from a list of all transitions
    envs = ScriptedEnvs(SCRIPT, "next_step")
    replay = make_replay(envs, 90, frame_stack, n_step)
    fill(replay, envs, steps)
    counts = dict.fromkeys(envs.sampleable(replay.rows_per_env, frame_stack, n_step), 0)
    for _ in range(100):
        for moment in moments(replay.sample(128).observation):
            counts[moment] += 1  # a KeyError: a row that must not be sampled
    drawn = np.array(list(counts.values()))
    freedom = drawn.size - 1
    chi_square = ((drawn - drawn.mean()) ** 2 / drawn.mean()).sum()
    assert drawn.min() > 0
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_draws_depend_on_the_generator_alone() -> None:
    batches = []
    for seed in (1, 1, 2):
        envs = ScriptedEnvs(SCRIPT, "same_step")
        replay = make_replay(envs, 90, seed=seed)
        fill(replay, envs, 40)
        batches.append(replay.sample(64).row_ids)
    np.testing.assert_array_equal(batches[0], batches[1])
    assert (batches[0] != batches[2]).any()


def test_nothing_to_sample_is_a_clear_error() -> None:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    replay = make_replay(envs, 90)
    with pytest.raises(ValueError, match="no transition to learn from"):
        replay.sample(4)
    replay.start(envs.reset())
    with pytest.raises(ValueError, match="no transition to learn from"):
        replay.sample(4)
    replay.add(*envs.step())
    assert replay.sample(4).reward.shape == (4,)


def test_a_batch_stays_valid_until_the_second_next_sample() -> None:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    replay = make_replay(envs, 90, frame_stack=2)
    fill(replay, envs, 40)
    first = replay.sample(16)
    kept = first.observation.copy(), first.reward.copy(), first.row_ids.copy()
    second = replay.sample(16)
    assert not np.shares_memory(first.observation, second.observation)
    for now, before in zip((first.observation, first.reward, first.row_ids), kept, strict=True):
        np.testing.assert_array_equal(now, before)
    assert replay.sample(16) is first
    assert replay.sample(8).observation.shape == (8, 2, 3)


def test_dtypes_of_a_batch() -> None:
    replay = Replay(2, 20, (5, 4), np.uint8, np.random.default_rng(0), frame_stack=2)
    replay.start(np.full((2, 5, 4), 255, np.uint8))
    step = one_env_step(1.0, 0.0)
    pixels = np.full((2, 5, 4), 7, np.uint8)
    no = np.zeros(2, np.bool_)
    replay.add(np.array([1, 2]), Step(step.reward.repeat(2), no, no, pixels, pixels, no, ~no))
    batch = replay.sample(3)
    assert batch.observation.dtype == np.uint8
    assert batch.observation.shape == batch.next_observation.shape == (3, 2, 5, 4)
    assert (batch.observation == 255).all()
    assert (batch.next_observation[:, 1] == 7).all()
    assert batch.action.dtype == np.int64
    assert {field.dtype for field in (batch.reward, batch.discount, batch.weight)} == {np.dtype(np.float32)}
    assert batch.weight.tolist() == [1.0, 1.0, 1.0]


def atari(capacity: int) -> Replay:
    return Replay(4, capacity, (84, 84), np.uint8, np.random.default_rng(0), frame_stack=4, n_step=3)


def test_an_atari_transition_takes_one_frame() -> None:
    replay = atari(10_000)
    assert replay.nbytes / 10_000 <= 7_100


def test_the_loop_allocates_nothing_large() -> None:
    replay = atari(400)
    frames, no = np.zeros((4, 84, 84), np.uint8), np.zeros(4, np.bool_)
    step = Step(np.zeros(4, np.float32), no, no, frames, frames, no, ~no)
    replay.start(frames)
    for _ in range(10):
        replay.add(np.zeros(4, np.int64), step)
    replay.sample(32)
    tracemalloc.start()
    replay.add(np.zeros(4, np.int64), step)
    batch = replay.sample(32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < batch.observation.nbytes / 10


def test_length_counts_transitions_not_rows() -> None:
    envs = ScriptedEnvs([[(3, TERMINATED)]], "next_step")
    replay = make_replay(envs, 7)
    lengths = []
    replay.start(envs.reset())
    for _ in range(12):
        replay.add(*envs.step())
        lengths.append(len(replay))
    # Four rows per episode, the last a final observation. Resets add nothing. From the eighth call on, the current
    # row replaces the oldest: a transition, or (eleventh call) a final observation.
    assert lengths == [1, 2, 3, 3, 4, 5, 6, 5, 5, 5, 6, 5]


def test_a_resumed_replay_goes_on_bit_for_bit() -> None:
    envs = ScriptedEnvs(SCRIPT, "next_step")
    replay = make_replay(envs, 60, frame_stack=3, n_step=2, seed=3)
    fill(replay, envs, 31)
    state = {name: array.copy() for name, array in replay.state().items()}
    resumed = make_replay(envs, 60, frame_stack=3, n_step=2, seed=99)
    resumed.load_state(state)
    for _ in range(40):
        action, step = envs.step()
        replay.add(action, step)
        resumed.add(action, step)
        one, other = replay.sample(8), resumed.sample(8)
        for name in ("observation", "action", "reward", "next_observation", "discount", "row_ids"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    check_replay(resumed, envs)


def test_the_state_holds_views_of_the_rows_in_use_and_no_more() -> None:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    replay = make_replay(envs, 3000)
    fill(replay, envs, 10)
    state = replay.state()
    fields = ("observation", "action", "reward", "kind", "reach")
    assert set(state) == {
        "serial",
        "bad_stacks",
        "discarded",
        "rng",
        *(f"{env}/{field}" for env in range(3) for field in fields),
    }
    assert max(len(state[f"{env}/{field}"]) for env in range(3) for field in fields) <= 2 * 10 + 1
    assert np.shares_memory(state["1/observation"], replay.observation[:])
    assert all(array.flags.c_contiguous for array in state.values())


def test_a_state_of_another_shape_is_refused() -> None:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    replay = make_replay(envs, 60)
    fill(replay, envs, 50)
    state, rng = replay.state(), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"state of 3 envs cannot fill 2"):
        Replay(2, 60, (3,), np.float32, rng).load_state(state)
    with pytest.raises(
        ValueError, match=r"0/observation is float32\[21, 3\], this ring holds float32\[21, 4\]"
    ):
        Replay(3, 60, (4,), np.float32, rng).load_state(state)
    with pytest.raises(ValueError, match=r"0/observation is float32\[21, 3\], this ring holds"):
        Replay(3, 90, (3,), np.float32, rng).load_state(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"envs": 8, "capacity": 39, "frame_stack": 4, "n_step": 2}, "at least 40 transitions"),
        ({"envs": 0, "capacity": 39}, "must be positive"),
        ({"envs": 1, "capacity": 39, "n_step": 0}, "must be positive"),
        ({"envs": 1, "capacity": 39, "frame_stack": 256}, "at most 255"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Replay(
            observation_shape=(2,),
            observation_dtype=np.float32,
            rng=np.random.default_rng(0),
            **arguments,  # type: ignore[arg-type]
        )
