from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdqn.replay import Importance, PrioritizedReplay
from hvdqn.replay.replay import TERMINATED, TRUNCATED
from tests.unit.replay_naive import ScriptedEnvs, check_batch, check_replay, make_replay, moments

SCRIPT = (
    ((5, TERMINATED), (1, TRUNCATED), (7, TRUNCATED), (2, TERMINATED)),
    ((3, TRUNCATED), (40, TERMINATED), (1, TERMINATED)),
)


def make_prioritized(
    envs: ScriptedEnvs, capacity: int, alpha: float = 1.0, eps: float = 1e-6, **kwargs: int
) -> PrioritizedReplay:
    return make_replay(envs, capacity, replay_class=PrioritizedReplay, alpha=alpha, eps=eps, **kwargs)  # type: ignore[arg-type]


def filled(
    steps: int, capacity: int = 60, alpha: float = 1.0, eps: float = 1e-6, **kwargs: int
) -> PrioritizedReplay:
    envs = ScriptedEnvs(SCRIPT, "same_step")
    replay = make_prioritized(envs, capacity, alpha, eps, **kwargs)
    replay.start(envs.reset())
    for _ in range(steps):
        replay.add(*envs.step())
    replay.scripted_envs = envs  # type: ignore[attr-defined]
    return replay


def priorities(replay: PrioritizedReplay) -> np.ndarray:
    return replay._tree.priorities


def set_priorities(replay: PrioritizedReplay, td_errors: np.ndarray) -> np.ndarray:
    """Set the TD error of every transition; return their rows."""
    rows = replay.sampleable_rows()
    replay.update_priorities(replay.row_ids(rows), td_errors[: rows.size])
    return rows


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
def test_only_transitions_have_priorities(
    script: Any, autoreset: str, frame_stack: int, n_step: int, spare: int, restart: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    envs = ScriptedEnvs(script, autoreset, seed)
    capacity = len(script) * (frame_stack + n_step - 1 + spare)
    replay = make_prioritized(envs, capacity, 0.6, frame_stack=frame_stack, n_step=n_step, seed=seed)
    replay.start(envs.reset())
    pending = []  # TD errors arrive up to two calls of `add` late, as they do in training
    for i in range(40):
        replay.add(*envs.step())
        if i == restart:
            replay.start(envs.reset())
        np.testing.assert_array_equal(np.flatnonzero(priorities(replay)), replay.sampleable_rows())
        if replay.sampleable_rows().size:
            batch = replay.sample(8)
            check_batch(batch, envs, replay)
            pending.append((batch.row_ids.copy(), rng.random(8) * 3.0))
        while len(pending) > 2:
            replay.update_priorities(*pending.pop(0))
        np.testing.assert_array_equal(np.flatnonzero(priorities(replay)), replay.sampleable_rows())
    check_replay(replay, envs)


def test_new_transitions_enter_with_the_largest_priority() -> None:
    replay = filled(3)
    rows = set_priorities(replay, np.full(100, 0.5))
    assert priorities(replay)[rows] == pytest.approx(0.5 + 1e-6)
    replay.update_priorities(replay.row_ids(rows[:1]), np.array([7.0]))
    replay.update_priorities(replay.row_ids(rows[:1]), np.array([2.0]))
    replay.add(*replay.scripted_envs.step())  # type: ignore[attr-defined]
    new = np.setdiff1d(replay.sampleable_rows(), rows)
    assert new.size == 2
    assert priorities(replay)[new] == pytest.approx(7.0 + 1e-6)


def test_priorities_by_hand() -> None:
    replay = filled(3, alpha=0.5, eps=0.25)
    rows = set_priorities(replay, np.arange(100.0))
    assert priorities(replay)[rows] == pytest.approx(np.sqrt(np.arange(rows.size) + 0.25))


def test_late_td_errors_do_not_change_the_priorities_of_newer_transitions() -> None:
    replay = filled(100, capacity=40)
    row_ids = replay.sample(200).row_ids
    before = replay.row_ids(np.arange(priorities(replay).size))
    for _ in range(12):
        replay.add(*replay.scripted_envs.step())  # type: ignore[attr-defined]
    replaced = replay.row_ids(np.arange(priorities(replay).size)) != before
    assert 0 < replaced.sum() < replaced.size
    replay.update_priorities(row_ids, np.full(200, 1000.0))
    priority = priorities(replay)
    assert (priority[replaced] <= 1.0).all()
    assert priority[~replaced].max() > 999.0
    np.testing.assert_array_equal(np.flatnonzero(priority), replay.sampleable_rows())


def test_td_errors_that_arrive_a_whole_ring_late_change_nothing() -> None:
    replay = filled(100, capacity=40)
    row_ids = replay.sample(32).row_ids
    for _ in range(21):
        replay.add(*replay.scripted_envs.step())  # type: ignore[attr-defined]
    before = priorities(replay).copy()
    replay.update_priorities(row_ids, np.full(32, 1000.0))
    replay.add(*replay.scripted_envs.step())  # type: ignore[attr-defined]
    assert priorities(replay).max() == before.max() == 1.0


@pytest.mark.parametrize("n_step", [1, 3])
def test_a_td_error_that_is_not_finite_among_finite_ones_removes_its_transition(n_step: int) -> None:
    replay = filled(30, n_step=n_step)
    envs = replay.scripted_envs  # type: ignore[attr-defined]
    rows = replay.sampleable_rows()
    td_errors = np.full(rows.size, 0.5, np.float32)
    td_errors[[2, 20, rows.size - 1]] = [np.nan, np.inf, np.nan]
    replay.update_priorities(replay.row_ids(rows), td_errors)
    assert replay.discarded == 3
    for _ in range(2):
        assert (priorities(replay)[rows[[2, 20, -1]]] == 0.0).all()
        np.testing.assert_array_equal(np.flatnonzero(priorities(replay)), replay.sampleable_rows())
        state = {name: array.copy() for name, array in replay.state().items()}
        replay.add(*envs.step())  # whose neighbours get a priority again
    resumed = make_prioritized(envs, 60, n_step=n_step)
    resumed.load_state(state)
    assert resumed.discarded == 3
    assert (priorities(resumed)[rows[[2, 20, -1]]] == 0.0).all()


def test_td_errors_of_which_none_is_finite_change_nothing() -> None:
    """The network is to blame, not the transitions."""
    replay = filled(30)
    rows = replay.sampleable_rows()
    replay.update_priorities(replay.row_ids(rows), np.full(rows.size, np.nan, np.float32))
    assert (priorities(replay)[rows] == 1.0).all()
    assert replay.discarded == 0


def test_row_ids_are_valid_until_their_row_is_overwritten() -> None:
    envs = ScriptedEnvs([[(100, TERMINATED)]] * 2, "same_step")
    replay = make_prioritized(envs, 8)  # five rows per environment
    replay.start(envs.reset())
    for _ in range(6):  # then rows with the serial numbers 2 to 6 are held; 6 is the current one
        replay.add(*envs.step())
    rows = np.arange(10)
    row_ids = replay.row_ids(rows)
    assert row_ids[:5].tolist() == [10, 12, 4, 6, 8]  # serial number x 2 environments + environment
    assert row_ids[5:].tolist() == [11, 13, 5, 7, 9]
    replay.add(*envs.step())
    found, held = replay.rows_of(row_ids)
    np.testing.assert_array_equal(found, rows)
    assert np.flatnonzero(~held).tolist() == [2, 7]


def test_draws_are_proportional_to_priorities() -> None:
    replay = filled(100, n_step=3, frame_stack=2)
    rows = set_priorities(replay, np.random.default_rng(0).random(100) ** 3)
    priority = priorities(replay)[rows]
    counts = np.zeros(priorities(replay).size)
    draws = 64 * 500
    for _ in range(500):
        drawn, held = replay.rows_of(replay.sample(64).row_ids)
        assert held.all()
        np.add.at(counts, drawn, 1.0)
    assert counts.sum() == counts[rows].sum()
    # Stratified draws scatter less than independent ones, so this bound is a loose one.
    expected = draws * priority / priority.sum()
    assert (np.abs(counts[rows] - expected) < 5 * np.sqrt(expected) + 1).all()


def test_weights_by_hand() -> None:
    replay = filled(2, capacity=60)
    rows = set_priorities(replay, np.array([1.0, 2.0, 3.0, 4.0]) - 1e-6)
    batch = replay.sample(64, Importance(beta=0.5, n_global=100, size=2))
    chance = np.array([0.1, 0.2, 0.3, 0.4]) / 2
    index = np.searchsorted(rows, replay.rows_of(batch.row_ids)[0])
    assert batch.weight == pytest.approx((100 * chance[index]) ** -0.5, rel=1e-5)
    assert set(index) == {0, 1, 2, 3}
    assert (replay.sample(64).weight == 1.0).all()


def test_equal_priorities_give_equal_weights_of_one() -> None:
    replay = filled(50)
    n_global = replay.sampleable_rows().size
    assert replay.sample(32, Importance(beta=0.7, n_global=n_global)).weight == pytest.approx(1.0, rel=1e-5)


def test_nothing_to_sample_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="no transition to learn from"):
        filled(0).sample(4)


def shards(size: int) -> list[tuple[PrioritizedReplay, np.ndarray, np.ndarray]]:
    """Return replay, value of each row and rows of transitions per rank. All three differ between ranks."""
    made = []
    for rank in range(size):
        replay = filled(20 + 60 * rank, capacity=600)
        rng = np.random.default_rng(rank)
        # Uneven, but none so small that 20,000 draws would miss it.
        rows = set_priorities(replay, (0.4 + rng.random(600)) ** (1 + rank))
        value = 10.0 * rank + rng.normal(size=priorities(replay).size)
        made.append((replay, value + 3.0 * np.log(priorities(replay) + 1.0), rows))
    return made


def weighted_estimate(size: int, wrong: str | None, draws: int = 20_000) -> tuple[float, float, float, float]:
    """Return true mean of all ranks, the learner's estimate from weighted draws, its standard error, plain estimate.

    Weights are divided by their maximum over all ranks, and the mean weighted value by the mean weight.
    """
    made = shards(size)
    true = np.concatenate([value[rows] for _, value, rows in made]).mean()
    n_global = sum(rows.size for *_, rows in made)
    values, weights = [], []
    for replay, value, rows in made:
        n = rows.size if wrong == "own n" else n_global
        batch = replay.sample(draws, Importance(beta=1.0, n_global=n, size=size))
        weights.append(batch.weight.astype(np.float64))
        values.append(value[replay.rows_of(batch.row_ids)[0]])
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
    envs = replay.scripted_envs  # type: ignore[attr-defined]
    state = {name: array.copy() for name, array in replay.state().items()}
    resumed = make_prioritized(envs, 60, frame_stack=3, n_step=2, seed=99)
    resumed.load_state(state)
    for i in range(60):
        action, step = envs.step()
        batches = []
        for one in (replay, resumed):
            one.add(action, step)
            batches.append(one.sample(8, Importance(0.4, 60, 2)))
            one.update_priorities(batches[-1].row_ids, np.arange(8.0) * (i % 3))
        for name in ("observation", "reward", "weight", "row_ids"):
            np.testing.assert_array_equal(getattr(batches[0], name), getattr(batches[1], name))
    np.testing.assert_array_equal(priorities(replay), priorities(resumed))
    assert moments(batches[0].observation) == moments(batches[1].observation)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -1.0])
def test_a_state_with_impossible_priorities_is_refused(poison: float) -> None:
    replay = filled(30)
    state = {name: array.copy() for name, array in replay.state().items()}
    state["1/mass"][3] = poison
    with pytest.raises(ValueError, match="negative or not finite"):
        filled(30).load_state(state)
