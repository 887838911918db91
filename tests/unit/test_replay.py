from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdqn.replay import Replay, Ring, UniformSampler, sampling
from hvdqn.replay.sampling import Assembler, Batch
from hvdqn.replay.storage import TERMINATED, TRUNCATED
from tests.unit.replay_naive import FakeStep, ScriptedEnvs, check_batch, check_ring, moments, ring_for

# Uneven on purpose: episodes of one step, longer than a ring, and both ways to end.
SCRIPT = (
    ((5, TERMINATED), (1, TRUNCATED), (7, TRUNCATED), (2, TERMINATED)),
    ((3, TRUNCATED), (40, TERMINATED), (1, TERMINATED)),
    ((1, TERMINATED), (1, TRUNCATED)),
)


def replay_for(ring: Ring, seed: int = 0) -> Replay:
    return Replay(ring, UniformSampler(ring, np.random.default_rng(seed)))


def fill(replay: Replay | Ring, envs: ScriptedEnvs, steps: int) -> None:
    replay.start(envs.reset())
    for _ in range(steps):
        replay.add(*envs.step())


def one_env_step(reward: float, observation: float, end: int = 0) -> FakeStep:
    terminated, truncated = np.array([end == TERMINATED]), np.array([end == TRUNCATED])
    seen, reset = np.array([[observation]], np.float32), np.array([[-1.0]], np.float32)
    done = terminated | truncated
    return FakeStep(
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
def test_every_start_gives_what_a_naive_loop_gives(n_step: int, frame_stack: int, autoreset: str) -> None:
    envs = ScriptedEnvs(SCRIPT, autoreset)
    ring = ring_for(envs, 3 * 13, frame_stack, n_step)
    ring.start(envs.reset())
    check_ring(ring, envs)
    for _ in range(70):  # five times round the rings
        ring.add(*envs.step())
        check_ring(ring, envs)


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
    ring = ring_for(envs, len(script) * (frame_stack + n_step - 1 + spare), frame_stack, n_step)
    replay = replay_for(ring, seed)
    replay.start(envs.reset())
    for i in range(steps):
        replay.add(*envs.step())
        if i == restart:  # as after a resume that could not restore the environments
            replay.start(envs.reset())
    check_ring(ring, envs)
    if ring.starts().size:
        check_batch(replay.sample(16), envs, ring)


@pytest.mark.parametrize("end", [TERMINATED, TRUNCATED])
def test_n_step_numbers_by_hand(end: int) -> None:
    ring = Ring(1, 20, (1,), np.float32, n_step=2, gamma=0.5)
    ring.start(np.array([[0.0]], np.float32))
    for reward, observation in ((1.0, 10.0), (2.0, 20.0)):
        ring.add(np.array([3]), one_env_step(reward, observation))
    ring.add(np.array([3]), one_env_step(4.0, 30.0, end))
    batch = Assembler(ring).build(np.array([0, 1, 2]))
    bootstrap = 0.0 if end == TERMINATED else 1.0
    assert batch.observation.ravel().tolist() == [0.0, 10.0, 20.0]
    assert batch.next_observation.ravel().tolist() == [20.0, 30.0, 30.0]
    assert batch.reward.tolist() == [1.0 + 0.5 * 2.0, 2.0 + 0.5 * 4.0, 4.0]
    assert batch.discount.tolist() == [0.25, bootstrap * 0.25, bootstrap * 0.5]


def test_frame_stacks_by_hand() -> None:
    ring = Ring(1, 20, (1,), np.float32, frame_stack=3)
    ring.start(np.array([[0.0]], np.float32))
    ring.add(np.array([0]), one_env_step(0.0, 10.0))
    ring.add(np.array([0]), one_env_step(0.0, 20.0, TRUNCATED))
    ring.add(np.array([0]), one_env_step(0.0, 40.0))
    batch = Assembler(ring).build(ring.starts())
    assert batch.observation[..., 0].tolist() == [[0, 0, 0], [0, 0, 10], [-1, -1, -1]]
    assert batch.next_observation[..., 0].tolist() == [[0, 0, 10], [0, 10, 20], [-1, -1, 40]]


def test_a_step_both_terminated_and_truncated_does_not_bootstrap() -> None:
    ring = Ring(1, 20, (1,), np.float32)
    ring.start(np.zeros((1, 1), np.float32))
    step = one_env_step(1.0, 10.0, TERMINATED)
    step.truncated = np.array([True])
    ring.add(np.array([0]), step)
    assert Assembler(ring).build(np.array([0])).discount.tolist() == [0.0]


def test_n_step_code_at_n_of_one_equals_the_one_step_code() -> None:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    ring = ring_for(envs, 60)
    fill(ring, envs, 50)
    rows, assembler = ring.starts(), Assembler(ring)
    one, many = Batch.empty(ring, rows.size), Batch.empty(ring, rows.size)
    np.testing.assert_array_equal(assembler._one_step(rows, one), assembler._n_steps(rows, many))
    np.testing.assert_array_equal(one.reward, many.reward)
    np.testing.assert_array_equal(one.discount, many.discount)


def test_rewards_past_the_end_do_not_leak_in() -> None:
    ring = Ring(1, 20, (1,), np.float32, n_step=5)
    ring.reward[:] = np.nan
    ring.start(np.zeros((1, 1), np.float32))
    ring.add(np.array([0]), one_env_step(1.0, 10.0, TERMINATED))
    assert Assembler(ring).build(np.array([0])).reward.tolist() == [1.0]


@pytest.mark.parametrize("rounds", [sampling._ROUNDS, 0])
@pytest.mark.parametrize(("steps", "n_step", "frame_stack"), [(9, 1, 1), (200, 1, 4), (200, 3, 2)])
def test_draws_are_uniform_over_every_start_and_hit_nothing_else(
    monkeypatch: pytest.MonkeyPatch, rounds: int, steps: int, n_step: int, frame_stack: int
) -> None:
    monkeypatch.setattr(sampling, "_ROUNDS", rounds)  # 0: the starts are listed instead
    envs = ScriptedEnvs(SCRIPT, "next_step")
    ring = ring_for(envs, 90, frame_stack, n_step)
    replay = replay_for(ring)
    fill(replay, envs, steps)
    counts = dict.fromkeys(envs.starts(ring.rows_per_env, frame_stack, n_step), 0)
    for _ in range(100):
        for moment in moments(replay.sample(128).observation):
            counts[moment] += 1  # a KeyError is a draw that no start explains
    drawn = np.array(list(counts.values()))
    freedom = drawn.size - 1
    chi_square = ((drawn - drawn.mean()) ** 2 / drawn.mean()).sum()
    assert drawn.min() > 0
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_draws_depend_on_the_generator_alone() -> None:
    batches = []
    for seed in (1, 1, 2):
        envs = ScriptedEnvs(SCRIPT, "same_step")
        replay = replay_for(ring_for(envs, 90), seed)
        fill(replay, envs, 40)
        batches.append(replay.sample(64).rows)
    np.testing.assert_array_equal(batches[0], batches[1])
    assert (batches[0] != batches[2]).any()


def test_nothing_to_sample_is_a_clear_error() -> None:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    replay = replay_for(ring_for(envs, 90))
    with pytest.raises(ValueError, match="no transition to learn from"):
        replay.sample(4)
    replay.start(envs.reset())
    with pytest.raises(ValueError, match="no transition to learn from"):
        replay.sample(4)
    replay.add(*envs.step())
    assert replay.sample(4).reward.shape == (4,)


def test_a_batch_outlives_the_next_sample_and_its_buffers_come_back() -> None:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    replay = replay_for(ring_for(envs, 90, frame_stack=2))
    fill(replay, envs, 40)
    first = replay.sample(16)
    kept = first.observation.copy(), first.reward.copy(), first.rows.copy()
    second = replay.sample(16)
    assert not np.shares_memory(first.observation, second.observation)
    for now, before in zip((first.observation, first.reward, first.rows), kept, strict=True):
        np.testing.assert_array_equal(now, before)
    assert replay.sample(16) is first
    assert replay.sample(8).observation.shape == (8, 2, 3)


def test_dtypes_of_a_batch() -> None:
    ring = Ring(2, 20, (5, 4), np.uint8, frame_stack=2)
    replay = replay_for(ring)
    replay.start(np.full((2, 5, 4), 255, np.uint8))
    step = one_env_step(1.0, 0.0)
    pixels = np.full((2, 5, 4), 7, np.uint8)
    no = np.zeros(2, np.bool_)
    replay.add(np.array([1, 2]), FakeStep(step.reward.repeat(2), no, no, pixels, pixels, no, ~no))
    batch = replay.sample(3)
    assert batch.observation.dtype == np.uint8
    assert batch.observation.shape == batch.next_observation.shape == (3, 2, 5, 4)
    assert (batch.observation == 255).all()
    assert (batch.next_observation[:, 1] == 7).all()
    assert batch.action.dtype == np.int64
    assert {field.dtype for field in (batch.reward, batch.discount, batch.weight)} == {np.dtype(np.float32)}
    assert batch.weight.tolist() == [1.0, 1.0, 1.0]


def atari(capacity: int) -> Replay:
    ring = Ring(4, capacity, (84, 84), np.uint8, frame_stack=4, n_step=3)
    return replay_for(ring)


def test_an_atari_transition_takes_one_frame() -> None:
    replay = atari(10_000)
    assert replay.ring.nbytes / 10_000 <= 7_100


def test_the_loop_allocates_nothing_large() -> None:
    replay = atari(400)
    frames, no = np.zeros((4, 84, 84), np.uint8), np.zeros(4, np.bool_)
    step = FakeStep(np.zeros(4, np.float32), no, no, frames, frames, no, ~no)
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


def test_tickets_are_good_until_their_row_is_opened_again() -> None:
    envs = ScriptedEnvs([[(100, TERMINATED)]] * 2, "same_step")
    ring = ring_for(envs, 8)  # five rows an env
    fill(ring, envs, 6)  # serials 2 to 6 are held, and 6 is open
    rows = np.arange(10)
    tickets = ring.row_ids(rows)
    assert tickets[:5].tolist() == [10, 12, 4, 6, 8]  # serial x 2 envs + env
    assert tickets[5:].tolist() == [11, 13, 5, 7, 9]
    ring.add(*envs.step())
    redeemed, held = ring.rows_of(tickets)
    np.testing.assert_array_equal(redeemed, rows)
    assert np.flatnonzero(~held).tolist() == [2, 7]


def test_length_counts_transitions_not_rows() -> None:
    envs = ScriptedEnvs([[(3, TERMINATED)]], "next_step")
    ring = ring_for(envs, 7)
    replay = replay_for(ring)
    lengths = []
    replay.start(envs.reset())
    for _ in range(12):
        replay.add(*envs.step())
        lengths.append(len(replay))
    # Four rows an episode, the last a final observation; resets add nothing. From the eighth call on, the open
    # row takes the place of the oldest: a transition, or (eleventh) a final observation.
    assert lengths == [1, 2, 3, 3, 4, 5, 6, 5, 5, 5, 6, 5]


def test_a_resumed_replay_goes_on_bit_for_bit() -> None:
    envs = ScriptedEnvs(SCRIPT, "next_step")
    replay = replay_for(ring_for(envs, 60, frame_stack=3, n_step=2), seed=3)
    fill(replay, envs, 31)
    state = {name: array.copy() for name, array in replay.state().items()}
    resumed = replay_for(ring_for(envs, 60, frame_stack=3, n_step=2), seed=99)
    resumed.load_state(state)
    for _ in range(40):
        action, step = envs.step()
        replay.add(action, step)
        resumed.add(action, step)
        one, other = replay.sample(8), resumed.sample(8)
        for name in ("observation", "action", "reward", "next_observation", "discount", "rows"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    check_ring(resumed.ring, envs)


def test_the_state_holds_views_of_the_rows_in_use_and_no_more() -> None:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    ring = ring_for(envs, 3000)
    fill(ring, envs, 10)
    state = ring.state()
    rows = {len(state[f"{env}/{field}"]) for env in range(3) for field in Ring.FIELDS}
    assert max(rows) <= 2 * 10 + 1
    assert np.shares_memory(state["1/observation"], ring.observation[:])
    assert all(array.flags.c_contiguous for array in state.values())


def test_a_state_of_another_shape_is_refused() -> None:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    ring = ring_for(envs, 60)
    fill(ring, envs, 50)
    with pytest.raises(ValueError, match=r"state of 3 envs cannot fill 2"):
        Ring(2, 60, (3,), np.float32).load_state(ring.state())
    with pytest.raises(
        ValueError, match=r"0/observation is float32\[21, 3\], this ring holds float32\[21, 4\]"
    ):
        Ring(3, 60, (4,), np.float32).load_state(ring.state())
    with pytest.raises(ValueError, match=r"0/observation is float32\[21, 3\], this ring holds"):
        Ring(3, 90, (3,), np.float32).load_state(ring.state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"envs": 8, "capacity": 39, "frame_stack": 4, "n_step": 2}, "at least 40 transitions"),
        ({"envs": 0, "capacity": 39}, "must be positive"),
        ({"envs": 1, "capacity": 39, "n_step": 0}, "must be positive"),
        ({"envs": 1, "capacity": 39, "frame_stack": 256}, "at most 255"),
    ],
)
def test_impossible_rings_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ring(observation_shape=(2,), observation_dtype=np.float32, **arguments)
