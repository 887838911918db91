from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdqn.replay import Importance, PrioritizedSampler, Replay, Ring
from hvdqn.replay.storage import TERMINATED, TRUNCATED
from tests.unit.replay_naive import ScriptedEnvs, check_batch, check_ring, moments, ring_for

SCRIPT = (
    ((5, TERMINATED), (1, TRUNCATED), (7, TRUNCATED), (2, TERMINATED)),
    ((3, TRUNCATED), (40, TERMINATED), (1, TERMINATED)),
)


def replay_for(ring: Ring, seed: int = 0, alpha: float = 1.0, eps: float = 1e-6) -> Replay:
    return Replay(ring, PrioritizedSampler(ring, np.random.default_rng(seed), alpha, eps))


def filled(steps: int, capacity: int = 60, alpha: float = 1.0, eps: float = 1e-6, **kwargs: int) -> Replay:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    replay = replay_for(ring_for(envs, capacity, **kwargs), alpha=alpha, eps=eps)
    replay.start(envs.reset())
    for _ in range(steps):
        replay.add(*envs.step())
    replay.envs = envs  # type: ignore[attr-defined]
    return replay


def masses(replay: Replay) -> np.ndarray:
    assert isinstance(replay.sampler, PrioritizedSampler)
    return replay.sampler._tree.mass


def set_priorities(replay: Replay, td_errors: np.ndarray) -> np.ndarray:
    """Give every start a TD error; return the starts."""
    starts = replay.ring.starts()
    replay.update(replay.ring.row_ids(starts), td_errors[: starts.size])
    return starts


@settings(max_examples=60, deadline=None)
@given(
    script=st.lists(
        st.lists(
            st.tuples(st.integers(1, 9), st.sampled_from([TERMINATED, TRUNCATED])), min_size=1, max_size=4
        ),
        min_size=1,
        max_size=3,
    ),
    autoreset=st.sampled_from(["same_step", "next_step"]),
    frame_stack=st.integers(1, 4),
    n_step=st.integers(1, 4),
    spare=st.integers(0, 9),
    restart=st.integers(0, 40),
    seed=st.integers(0, 1000),
)
def test_starts_and_only_starts_have_mass(
    script: Any, autoreset: str, frame_stack: int, n_step: int, spare: int, restart: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    envs = ScriptedEnvs(script, autoreset, seed)
    ring = ring_for(envs, len(script) * (frame_stack + n_step - 1 + spare), frame_stack, n_step)
    replay = replay_for(ring, seed, alpha=0.6)
    replay.start(envs.reset())
    pending = []  # updates come up to two adds late, as they do when gradients travel
    for i in range(40):
        replay.add(*envs.step())
        if i == restart:
            replay.start(envs.reset())
        np.testing.assert_array_equal(np.flatnonzero(masses(replay)), ring.starts())
        if ring.starts().size:
            batch = replay.sample(8)
            check_batch(batch, envs, ring)
            pending.append((batch.rows.copy(), rng.random(8) * 3.0))
        while len(pending) > 2:
            replay.update(*pending.pop(0))
        np.testing.assert_array_equal(np.flatnonzero(masses(replay)), ring.starts())
    check_ring(ring, envs)


def test_new_transitions_enter_with_the_largest_priority() -> None:
    replay = filled(3)
    starts = set_priorities(replay, np.full(100, 0.5))
    assert masses(replay)[starts] == pytest.approx(0.5 + 1e-6)
    replay.update(replay.ring.row_ids(starts[:1]), np.array([7.0]))
    replay.update(replay.ring.row_ids(starts[:1]), np.array([2.0]))
    replay.add(*replay.envs.step())  # type: ignore[attr-defined]
    new = np.setdiff1d(replay.ring.starts(), starts)
    assert new.size == 2
    assert masses(replay)[new] == pytest.approx(7.0 + 1e-6)


def test_priorities_by_hand() -> None:
    replay = filled(3, alpha=0.5, eps=0.25)
    starts = set_priorities(replay, np.arange(100.0))
    assert masses(replay)[starts] == pytest.approx(np.sqrt(np.arange(starts.size) + 0.25))


def test_a_priority_never_lands_on_what_replaced_its_transition() -> None:
    replay = filled(100, capacity=40)
    rows = replay.sample(200).rows
    before = replay.ring.row_ids(np.arange(masses(replay).size))
    for _ in range(12):
        replay.add(*replay.envs.step())  # type: ignore[attr-defined]
    replaced = replay.ring.row_ids(np.arange(masses(replay).size)) != before
    assert 0 < replaced.sum() < replaced.size
    replay.update(rows, np.full(200, 1000.0))
    mass = masses(replay)
    assert (mass[replaced] <= 1.0).all()
    assert mass[~replaced].max() > 999.0
    np.testing.assert_array_equal(np.flatnonzero(mass), replay.ring.starts())


def test_an_update_that_comes_a_whole_ring_late_changes_nothing() -> None:
    replay = filled(100, capacity=40)
    rows = replay.sample(32).rows
    for _ in range(21):
        replay.add(*replay.envs.step())  # type: ignore[attr-defined]
    before = masses(replay).copy()
    replay.update(rows, np.full(32, 1000.0))
    replay.add(*replay.envs.step())  # type: ignore[attr-defined]
    assert masses(replay).max() == before.max() == 1.0


def test_td_errors_that_are_not_finite_leave_priorities_alone() -> None:
    replay = filled(30)
    starts = replay.ring.starts()
    td_errors = np.full(starts.size, 0.5, np.float32)
    td_errors[::2] = [np.nan, np.inf] * (td_errors[::2].size // 2) + [np.nan] * (td_errors[::2].size % 2)
    replay.update(replay.ring.row_ids(starts), td_errors)
    assert (masses(replay)[starts[::2]] == 1.0).all()
    assert masses(replay)[starts[1::2]] == pytest.approx(0.5, rel=1e-5)


def test_draws_are_proportional_to_priorities() -> None:
    replay = filled(100, n_step=3, frame_stack=2)
    starts = set_priorities(replay, np.random.default_rng(0).random(100) ** 3)
    mass = masses(replay)[starts]
    counts = np.zeros(masses(replay).size)
    draws = 64 * 500
    for _ in range(500):
        rows, held = replay.ring.rows_of(replay.sample(64).rows)
        assert held.all()
        np.add.at(counts, rows, 1.0)
    assert counts.sum() == counts[starts].sum()
    # Stratified draws scatter less than independent ones, so this bound is a loose one.
    expected = draws * mass / mass.sum()
    assert (np.abs(counts[starts] - expected) < 5 * np.sqrt(expected) + 1).all()


def test_weights_by_hand() -> None:
    replay = filled(2, capacity=60)
    starts = set_priorities(replay, np.array([1.0, 2.0, 3.0, 4.0]) - 1e-6)
    batch = replay.sample(64, Importance(beta=0.5, n_global=100, size=2))
    chance = np.array([0.1, 0.2, 0.3, 0.4]) / 2
    index = np.searchsorted(starts, replay.ring.rows_of(batch.rows)[0])
    assert batch.weight == pytest.approx((100 * chance[index]) ** -0.5, rel=1e-5)
    assert set(index) == {0, 1, 2, 3}
    assert (replay.sample(64).weight == 1.0).all()


def test_equal_priorities_give_equal_weights_of_one() -> None:
    replay = filled(50)
    n_global = replay.ring.starts().size
    assert replay.sample(32, Importance(beta=0.7, n_global=n_global)).weight == pytest.approx(1.0, rel=1e-5)


def test_nothing_to_sample_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="no transition to learn from"):
        filled(0).sample(4)


def shards(size: int) -> list[tuple[Replay, np.ndarray, np.ndarray]]:
    """Per rank: replay, a value of each row, starts. Shards differ in number, in values and in priorities."""
    made = []
    for rank in range(size):
        replay = filled(20 + 60 * rank, capacity=600)
        rng = np.random.default_rng(rank)
        # Uneven, yet none so small that 20,000 draws would miss it and the error with it.
        starts = set_priorities(replay, (0.4 + rng.random(600)) ** (1 + rank))
        value = 10.0 * rank + rng.normal(size=masses(replay).size)
        made.append((replay, value + 3.0 * np.log(masses(replay) + 1.0), starts))
    return made


def weighted_estimate(size: int, wrong: str | None, draws: int = 20_000) -> tuple[float, float, float, float]:
    """True mean of all shards, the learner's estimate from weighted draws, its standard error, the plain estimate.

    Each rank's weights are divided by the largest, and the averaged weighted values by the averaged weights.
    """
    made = shards(size)
    true = np.concatenate([value[starts] for _, value, starts in made]).mean()
    n_global = sum(starts.size for *_, starts in made)
    values, weights = [], []
    for replay, value, starts in made:
        n = starts.size if wrong == "own n" else n_global
        batch = replay.sample(draws, Importance(beta=1.0, n_global=n, size=size))
        weights.append(batch.weight.astype(np.float64))
        values.append(value[replay.ring.rows_of(batch.rows)[0]])
    plain = float(np.mean([(w * v).mean() for w, v in zip(weights, values, strict=True)]))
    largest = max(w.max() for w in weights)
    scaled = [w / (w.max() if wrong == "own max" else largest) for w in weights]
    w, v = np.concatenate(scaled), np.concatenate(values)
    estimate = float((w * v).sum() / w.sum())
    error = float(np.sqrt((w**2 * (v - estimate) ** 2).sum()) / w.sum())
    return float(true), estimate, error, plain


@pytest.mark.parametrize("size", [1, 2, 4])
def test_weighted_draws_are_unbiased_over_shards(size: int) -> None:
    true, estimate, error, plain = weighted_estimate(size, wrong=None)
    assert error < 0.2
    assert abs(estimate - true) < 4 * error
    # Not normalised, the mean of weight x value is unbiased too: it needs n_global and size themselves.
    assert plain == pytest.approx(true, rel=0.02)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("wrong", ["own n", "own max"])
def test_a_rank_that_uses_its_own_count_or_maximum_is_biased(size: int, wrong: str) -> None:
    true, estimate, error, _ = weighted_estimate(size, wrong)
    assert abs(estimate - true) > 10 * error


def test_a_resumed_replay_goes_on_bit_for_bit() -> None:
    replay = filled(70, n_step=2, frame_stack=3)
    set_priorities(replay, np.random.default_rng(5).random(100) * 4.0)
    envs = replay.envs  # type: ignore[attr-defined]
    state = {name: array.copy() for name, array in replay.state().items()}
    resumed = replay_for(ring_for(envs, 60, frame_stack=3, n_step=2), seed=99)
    resumed.load_state(state)
    for i in range(60):
        action, step = envs.step()
        batches = []
        for one in (replay, resumed):
            one.add(action, step)
            batches.append(one.sample(8, Importance(0.4, 60, 2)))
            one.update(batches[-1].rows, np.arange(8.0) * (i % 3))
        for name in ("observation", "reward", "weight", "rows"):
            np.testing.assert_array_equal(getattr(batches[0], name), getattr(batches[1], name))
    np.testing.assert_array_equal(masses(replay), masses(resumed))
    assert moments(batches[0].observation) == moments(batches[1].observation)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -1.0])
def test_a_state_with_impossible_priorities_is_refused(poison: float) -> None:
    replay = filled(30)
    state = {name: array.copy() for name, array in replay.state().items()}
    state["1/mass"][3] = poison
    with pytest.raises(ValueError, match="negative or not finite"):
        filled(30).load_state(state)
