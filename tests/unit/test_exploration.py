"""Exploration on several ranks: schedules, the epsilon ladder over all environments, softmax draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hvdqn import train
from hvdqn.acting import Epsilons, RandomActions, ladder, softmax_actions
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config, ExplorationConfig, check_world, parse
from hvdqn.errors import UserError
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts


def test_ladder_by_hand():
    """0.4 ^ (1 + 7 i / (N - 1)) for N = 8: exponents 1 to 8 (Horgan et al. 2018)."""
    expected = [0.4**exponent for exponent in range(1, 9)]
    assert ladder(ExplorationConfig(), 8).tolist() == pytest.approx(expected)
    assert ladder(ExplorationConfig(ladder_epsilon=0.5, ladder_alpha=2.0), 3).tolist() == [0.5, 0.25, 0.125]


@pytest.mark.parametrize(("size", "envs"), [(1, 8), (2, 4), (4, 2), (8, 1), (3, 5)])
def test_the_ranks_share_one_ladder(size, envs):
    config = ExplorationConfig(exploration="ladder")
    ranks = [Epsilons(config, envs, rank, size) for rank in range(size)]
    everyone = np.concatenate([rank.at(123) for rank in ranks])
    rungs = ladder(config, size * envs)
    np.testing.assert_array_equal(np.sort(everyone)[::-1], rungs)
    for rank in ranks:
        assert len(rank.at(0)) == envs
        assert rank.mean(0) == pytest.approx(rungs.mean())
        if envs > 1:  # every shard of replay is filled by greedy and by exploring environments
            assert rank.at(0).max() >= rungs[size - 1]
            assert rank.at(0).min() <= rungs[-size]


@pytest.mark.parametrize(
    ("size", "envs", "greediest"), [(1, 8, 2), (2, 4, 2), (4, 16, 16), (1, 2, 1), (2, 1, 1)]
)
def test_the_greediest_quarter_of_a_ladder_is_marked(size, envs, greediest):
    config = ExplorationConfig(exploration="ladder")
    ranks = [Epsilons(config, envs, rank, size) for rank in range(size)]
    epsilon = np.concatenate([rank.at(0) for rank in ranks])
    picked = np.concatenate([rank.greediest for rank in ranks])
    assert picked.sum() == greediest
    assert epsilon[picked].max() < epsilon[~picked].min()


@pytest.mark.parametrize(("kind", "expected"), [("linear", 0.55), ("softmax", 0.55), ("noisy", 0.0)])
def test_other_schedules_are_the_same_in_all_environments(kind, expected):
    config = ExplorationConfig(
        exploration=kind, epsilon_start=1.0, epsilon_end=0.1, exploration_env_steps=1_000
    )
    for rank in range(2):
        epsilons = Epsilons(config, 3, rank, 2)
        assert epsilons.at(500).tolist() == pytest.approx([expected] * 3)
        assert epsilons.mean(500) == pytest.approx(expected)
        assert not epsilons.greediest.any()


def test_a_ladder_needs_two_environments():
    config = Config().replace(exploration="ladder", envs_per_rank=1)
    with pytest.raises(UserError, match=r"--exploration ladder .* raise --envs-per-rank"):
        check_world(config, ranks=1)
    check_world(config, ranks=2)


def test_each_environment_explores_with_its_own_epsilon():
    epsilon = np.array([0.0, 0.1, 0.5, 1.0])
    random_actions, rounds = RandomActions(4, 10**6, np.random.default_rng(0)), 10_000
    explored = np.array([random_actions.replace(np.full(4, -1), epsilon) >= 0 for _ in range(rounds)])
    deviation = np.sqrt(epsilon * (1 - epsilon) / rounds)
    assert (np.abs(explored.mean(axis=0) - epsilon) <= 4 * deviation).all()


def test_random_actions_are_repeated():
    """Compare with a naive loop that draws from the same stream; the end of an episode ends a repeat."""
    random_actions, rng = RandomActions(2, 5, np.random.default_rng(3), repeat=2.0), np.random.default_rng(3)
    action, left, repeated, interrupted = [0, 0], [0, 0], 0, 0
    for step in range(2_000):
        chance, drawn, lengths = rng.random(2), rng.integers(5, size=2), rng.zipf(2.0, 2)
        expected = []
        for env in range(2):
            repeated += left[env] > 0
            if left[env] == 0 and chance[env] < 0.1:
                action[env], left[env] = drawn[env], lengths[env]
            expected.append(action[env] if left[env] else -1)
            left[env] = max(left[env] - 1, 0)
        assert random_actions.replace(np.full(2, -1), 0.1).tolist() == expected
        if step % 10 == 9:
            interrupted += left[0] > 0
            random_actions.interrupt(np.array([True, False]))
            left[0] = 0
    assert repeated > 100
    assert interrupted > 5


def test_lengths_of_random_actions_have_the_zipf_distribution():
    """With epsilon 1 every action is random: p(1) = 6 / pi^2, p(2) = a quarter of that (mu = 2)."""
    random_actions, count = RandomActions(100_000, 2, np.random.default_rng(0), repeat=2.0), 100_000
    random_actions.replace(np.zeros(count, np.int64), 1.0)
    for length, share in ((1, 6 / np.pi**2), (2, 1.5 / np.pi**2), (3, 2 / 3 / np.pi**2)):
        assert np.mean(random_actions.left == length - 1) == pytest.approx(
            share, abs=4 * np.sqrt(share / count)
        )


@pytest.mark.parametrize("exponent", ["1", "0.5", "-1"])
def test_lengths_need_an_exponent_above_one(exponent):
    with pytest.raises(UserError, match=r"--epsilon-repeat .* above 1"):
        parse(["--epsilon-repeat", exponent])


def test_softmax_draws_actions_with_their_probabilities():
    """q / T = log 1, log 2, log 5: odds of 1 : 2 : 5."""
    q = np.tile(np.float32([0.0, 0.5 * np.log(2.0), 0.5 * np.log(5.0)]), (80_000, 1))
    actions = softmax_actions(q, 0.5, np.random.default_rng(0))
    assert np.abs(np.bincount(actions) - [10_000, 20_000, 50_000]).max() < 4 * np.sqrt(50_000 * 3 / 8)


def test_a_cold_softmax_is_greedy_and_does_not_overflow():
    q = np.tile(np.float32([1e4, -1e4, 9e3]), (1_000, 1))
    assert (softmax_actions(q, 1e-3, np.random.default_rng(0)) == 0).all()


@pytest.mark.parametrize("kind", ["linear", "ladder", "noisy", "softmax"])
def test_the_actor_explores_as_the_setting_says(kind):
    flags = ["--exploration", kind, "--epsilon-start", "0", "--epsilon-end", "0", "--ladder-epsilon", "1"]
    flags += ["--temperature", "1000", "--noisy" if kind == "noisy" else "--no-noisy", "--noisy-sigma", "5"]
    parts = build_parts(parse([*flags, "--ladder-alpha", "0"]), LocalComm(), PhaseTimer())
    actor = parts.acting.actor
    actor.start()
    seen = np.array([actor.choose(parts.epsilons.at(0)) for _ in range(40)])  # for one observation
    parts.acting.envs.close()
    varied = (seen != seen[0]).any()
    assert varied == (kind != "linear")


@pytest.mark.parametrize("kind", ["linear", "ladder"])
def test_returns_of_the_greediest_are_logged_separately(kind, tmp_path: Path):
    argv = [
        "--preset",
        "smoke",
        "--total-env-steps",
        "600",
        "--eval-episodes",
        "1",
        "--run-dir",
        str(tmp_path),
    ]
    assert train.main([*argv, "--exploration", kind]) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("episode_return_mean" in row for row in rows)
    assert any("greediest_return_mean" in row for row in rows) == (kind == "ladder")
    mean = ladder(ExplorationConfig(), 8).mean() if kind == "ladder" else 1 - 0.95 * 0.6
    assert next(row["epsilon"] for row in rows if row["env_steps"] == 600) == pytest.approx(mean)
