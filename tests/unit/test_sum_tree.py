from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdqn.replay.sum_tree import SumTree


def updates(
    rows: int, priorities: st.SearchStrategy[float]
) -> st.SearchStrategy[list[list[tuple[int, float]]]]:
    """Batches of (row, priority); some rows occur twice."""
    return st.lists(
        st.lists(st.tuples(st.integers(0, rows - 1), priorities), min_size=1, max_size=20), max_size=6
    )


def build(rows: int, batches: list[list[tuple[int, float]]]) -> tuple[SumTree, np.ndarray]:
    tree, naive = SumTree(rows), np.zeros(rows)
    for batch in batches:
        tree.set(
            np.array([row for row, _ in batch]), np.array([priority for _, priority in batch], np.float64)
        )
        for row, priority in batch:
            naive[row] = priority
    return tree, naive


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows=st.sampled_from([1, 2, 15, 16, 17, 255, 256, 257, 4097]))
def test_searches_equal_those_of_a_naive_array(data: st.DataObject, rows: int) -> None:
    tree, naive = build(rows, data.draw(updates(rows, st.integers(0, 50).map(float))))
    np.testing.assert_array_equal(tree.priorities, naive)
    assert tree.total == naive.sum()
    targets = np.arange(0.0, naive.sum(), 0.5)  # sums of integers are exact, so every border is tested
    np.testing.assert_array_equal(tree.find(targets), np.searchsorted(naive.cumsum(), targets, side="right"))


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    rows=st.sampled_from([3, 40, 300]),
    fractions=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20),
)
def test_a_search_never_ends_at_a_priority_of_zero(
    data: st.DataObject, rows: int, fractions: list[float]
) -> None:
    sizes = st.one_of(st.just(0.0), st.floats(1e-12, 1e12))
    tree, naive = build(rows, data.draw(updates(rows, sizes)))
    np.testing.assert_allclose(tree.total, naive.sum(), rtol=1e-12)
    if tree.total == 0.0:
        return
    targets = np.minimum(np.array(fractions) * tree.total, np.nextafter(tree.total, 0.0))
    found = tree.find(targets)
    assert (naive[found] > 0.0).all()
    slack = 1e-12 * tree.total
    assert (naive.cumsum()[found] >= targets - slack).all()
    assert (naive.cumsum()[found] - naive[found] <= targets + slack).all()


def test_sums_do_not_drift_and_do_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    tree = SumTree(1000)
    for _ in range(2000):
        tree.set(rng.integers(0, 1000, 64), rng.random(64) * 10.0 ** rng.integers(-9, 9))
    fresh, filled = SumTree(1000), SumTree(1000)
    fresh.set(np.arange(1000)[::-1], tree.priorities[::-1])
    filled.fill(tree.priorities)
    for level, same, also in zip(tree._levels, fresh._levels, filled._levels, strict=True):
        np.testing.assert_array_equal(level, same)
        np.testing.assert_array_equal(level, also)


def test_draws_are_proportional_to_priorities() -> None:
    rng = np.random.default_rng(0)
    priority = rng.random(300) ** 4
    priority[::3] = 0.0
    tree = SumTree(300)
    tree.fill(priority)
    draws = 200_000
    counts = np.bincount(tree.find(rng.random(draws) * tree.total), minlength=300)
    expected = draws * priority / priority.sum()
    assert (counts[::3] == 0).all()
    positive = priority > 0
    chi_square = ((counts - expected)[positive] ** 2 / expected[positive]).sum()
    freedom = positive.sum() - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_the_last_priority_of_a_row_that_occurs_twice_counts() -> None:
    tree = SumTree(20)
    tree.set(np.array([3, 3, 3]), np.array([1.0, 7.0, 2.0]))
    assert tree.priorities[3] == tree.total == 2.0


@pytest.mark.parametrize("rows", [1, 16, 1_000_000])
def test_a_full_tree_can_be_searched_to_its_last_row(rows: int) -> None:
    tree = SumTree(rows)
    tree.fill(np.full(rows, 0.1))
    assert tree.find(np.array([0.0, np.nextafter(tree.total, 0.0)])).tolist() == [0, rows - 1]


def test_rounding_does_not_move_a_search_out_of_its_node() -> None:
    tree, large = SumTree(32), 8144465079774356.0
    tree.set(np.array([0, 21]), np.array([23.5, large]))
    target = np.nextafter(tree.total, 0.0)
    assert target - 23.5 == large  # rounded up to the priority of row 21
    assert tree.find(np.array([target])).tolist() == [21]
