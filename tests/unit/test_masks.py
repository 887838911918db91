"""Masks of legal actions: where they are found, what is chosen, what replay stores, and what targets take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from hvdqn.acting import RandomActions, greedy_actions, softmax_actions
from hvdqn.config import EnvironmentConfig
from hvdqn.envs import Environments, make_environments
from hvdqn.envs.actions import Actions, draw_legal
from hvdqn.errors import UserError
from hvdqn.losses import mask_q, munchausen_bonus, soft_policy
from hvdqn.replay import PrioritizedReplay, Replay
from hvdqn.replay.bits import BitRows
from hvdqn.train import main
from tests.unit.masked_envs import ACTIONS, Strict, mask_of

STRICT = "tests.unit.masked_envs:Strict-v0"
Make = Callable[[str, str], Environments]


def own(vectorization: str) -> Make:
    def make(source: str, terminal: str) -> Environments:
        kwargs = f'{{"source": "{source}", "terminal": "{terminal}"}}'
        config = EnvironmentConfig(env=STRICT, env_kwargs=kwargs, vectorization=vectorization)  # type: ignore[arg-type]
        return make_environments(config, 3, 1, True)

    return make


def foreign(mode: AutoresetMode) -> Make:
    """Environments in a vector of Gymnasium's, whose infos hvdqn's own wrapper has not seen."""

    def make(source: str, terminal: str) -> Environments:
        return Environments(SyncVectorEnv([lambda: Strict(source, terminal)] * 3, autoreset_mode=mode), 1)

    return make


VECTORS = {
    "sync": own("sync"),
    "async": own("async"),
    "next-step": foreign(AutoresetMode.NEXT_STEP),
    "same-step": foreign(AutoresetMode.SAME_STEP),
    "disabled": foreign(AutoresetMode.DISABLED),
}


def play(envs: Environments, steps: int, replay: Replay | None = None) -> None:
    """Take random legal steps; check the masks of each step, and of everything that replay returns."""
    rng = np.random.default_rng(0)
    first = envs.reset()
    assert (envs.action_mask == mask_of(first)).all()
    if replay is not None:
        replay.start(first, envs.action_mask)
    ends = {"terminated": 0, "truncated": 0}
    for _ in range(steps):
        actions = draw_legal(rng, envs.action_mask)
        step = envs.step(actions)
        live = ~step.terminated
        assert (step.next_action_mask[live] == mask_of(step.next_observation)[live]).all()
        acting = live | step.fresh
        assert (step.action_mask[acting] == mask_of(step.observation)[acting]).all()
        assert step.action_mask.any(axis=1).all()
        for name in ends:
            ends[name] += int(getattr(step, name).sum())
        if replay is not None:
            replay.add(actions, step)
    assert min(ends.values()) > 3


@pytest.mark.parametrize(
    ("vector", "terminal"),
    [(v, t) for v in VECTORS for t in ("mask", "zeros", "nothing") if v != "async" or t == "nothing"],
)
def test_masks_belong_to_their_observations(vector: str, terminal: str) -> None:
    with closing(VECTORS[vector]("info", terminal)) as envs:
        play(envs, 100)


@pytest.mark.parametrize("source", ["method", "observation"])
@pytest.mark.parametrize("vector", ["sync", "async"])
def test_masks_are_found_elsewhere(vector: str, source: str) -> None:
    with closing(VECTORS[vector](source, "mask")) as envs:
        assert envs.observation_shape == (2,)
        play(envs, 60)


@pytest.mark.parametrize("kind", [Replay, PrioritizedReplay])
@pytest.mark.parametrize("vector", ["sync", "next-step"])
@pytest.mark.parametrize(("n_step", "frame_stack"), [(1, 1), (3, 1), (3, 2)])
def test_replay_returns_the_mask_of_each_observation(
    kind: type[Replay], vector: str, n_step: int, frame_stack: int
) -> None:
    with closing(VECTORS[vector]("info", "zeros")) as envs:
        rng = np.random.default_rng(2)
        settings: dict[str, Any] = {"n_step": n_step, "frame_stack": frame_stack, "mask_shape": (ACTIONS,)}
        replay = kind(3, 90, (2,), np.float32, rng, **settings)
        play(envs, 60, replay)  # twice round the rings
        assert (replay.outcome == 2).any()  # truncated transitions bootstrap too
        for _ in range(10):
            batch = replay.sample(64)
            newest = [
                o if frame_stack == 1 else o[:, -1] for o in (batch.observation, batch.next_observation)
            ]
            assert (batch.action_mask == mask_of(newest[0])).all()
            assert batch.action_mask[np.arange(64), batch.action].all()
            live = batch.discount > 0
            assert (batch.next_action_mask[live] == mask_of(newest[1])[live]).all()
        restored = kind(3, 90, (2,), np.float32, np.random.default_rng(0), **settings)
        restored.load_state(replay.state())
        one, other = restored.sample(64), replay.sample(64)
        assert np.array_equal(one.next_action_mask, other.next_action_mask)


def test_masks_take_one_bit_an_action() -> None:
    replay = Replay(2, 1000, (2,), np.float32, np.random.default_rng(0), mask_shape=(64,))
    before = replay.nbytes
    replay.start(np.zeros((2, 2), np.float32), np.ones((2, 64), bool))
    assert replay.nbytes - before == 2 * replay.rows_per_env * 64 // 8


def test_bits_come_back() -> None:
    rng = np.random.default_rng(0)
    bits, values = BitRows(20, (3, 5)), rng.random((20, 3, 5)) < 0.5
    assert not bits[np.arange(20)].any()
    bits[np.arange(20)] = values
    rows = rng.integers(20, size=50)
    assert (bits[rows] == values[rows]).all()


def test_an_environment_without_masks_has_none() -> None:
    with closing(make_environments(EnvironmentConfig(env="CartPole-v1"), 2, 1, True)) as envs:
        envs.reset()
        step = envs.step(np.zeros(2, np.int64))
        assert envs.action_mask is step.action_mask is step.next_action_mask is None


FAULTS = {
    "shape": r"Strict-v0' gives an action_mask of shape \(10,\) and dtype int8; it must hold 11 booleans or numbers",
    "dtype": r"gives an action_mask of shape \(11,\) and dtype float64; it must hold 11 booleans",
    "sometimes": r"gives an action_mask with some observations and not with others",
    "late": r"gives an action_mask with some observations and not with others",
    "empty": r"Strict-v0' gives an action_mask that allows no action in a state that is not terminal \(env \d\)",
}


@pytest.mark.parametrize(("fault", "vectorization"), [*((f, "sync") for f in FAULTS), ("shape", "async")])
def test_wrong_masks_are_refused_in_one_line(
    fault: str, vectorization: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--preset", "smoke", "--env", STRICT, "--env-kwargs", f'{{"fault": "{fault}"}}']
    argv += ["--vectorization", vectorization, "--run-dir", str(tmp_path / "run")]
    assert main(argv) == 2
    written = capsys.readouterr()
    line = next(line for line in (written.out + written.err).splitlines() if "hvdqn: error" in line)
    with pytest.raises(UserError, match=FAULTS[fault]):
        raise UserError(line)
    assert "Traceback" not in written.out + written.err


def test_a_list_is_a_mask_too() -> None:
    config = EnvironmentConfig(env=STRICT, env_kwargs='{"fault": "list"}')
    with closing(make_environments(config, 3, 1, True)) as envs:
        play(envs, 60)


EXPLORATION = {
    "linear": "--epsilon-start 0.5 --epsilon-end 0.5",
    "ez-greedy": "--epsilon-start 0.5 --epsilon-end 0.5 --epsilon-repeat 1.5",
    "ladder": "--exploration ladder --epsilon-repeat 2",
    "softmax": "--exploration softmax --temperature 0.5 --epsilon-end 0.2",
    "noisy": "--exploration noisy --noisy",
    "munchausen": "--munchausen --no-double --exploration softmax --temperature 0.03",
}


# A longer run, on two ranks, for each of the flags above:
#   mpirun -np 2 python -m hvdqn.train --comm mpi --preset smoke --env tests.unit.masked_envs:Strict-v0
#       --total-env-steps 100000 FLAGS
@pytest.mark.parametrize("exploration", EXPLORATION)
def test_no_exploration_takes_an_illegal_action(exploration: str, tmp_path: Any) -> None:
    argv = f"""--preset smoke --env {STRICT} --total-env-steps 1500 --learning-starts 100 --checkpoint-every 500
        --run-dir {tmp_path / "run"} {EXPLORATION[exploration]}"""
    assert main(argv.split()) == 0


# --- What is chosen --------------------------------------------------------------------------------------------------


def test_the_best_legal_action_is_chosen() -> None:
    q = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [-np.inf, 5.0, -np.inf]], np.float32)
    mask = np.array([[0, 1, 1], [1, 1, 1], [0, 0, 1]], bool)
    assert greedy_actions(q, mask).tolist() == [1, 0, 2]
    assert greedy_actions(q).tolist() == [0, 0, 1]


def test_softmax_draws_among_legal_actions_alone() -> None:
    q = np.tile(np.array([9.0, 1.0, 2.0], np.float32), (20_000, 1))
    mask = np.tile([False, True, True], (20_000, 1))
    drawn = softmax_actions(q, 1.0, np.random.default_rng(0), mask)
    shares = np.bincount(drawn, minlength=3) / 20_000
    assert shares[0] == 0
    assert shares[2] == pytest.approx(np.e / (1 + np.e), abs=0.015)


def test_random_actions_are_uniform_over_legal_ones() -> None:
    mask = np.tile([True, False, True, True], (30_000, 1))
    random = RandomActions(30_000, 4, np.random.default_rng(0))
    drawn = random.replace(np.full(30_000, 3), 1.0, mask)
    shares = np.bincount(drawn, minlength=4) / 30_000
    assert shares == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=0.015)


def test_a_repeated_action_ends_where_it_is_illegal() -> None:
    random = RandomActions(1000, 2, np.random.default_rng(0), repeat=1.1)
    both, second = np.ones((1000, 2), bool), np.tile([False, True], (1000, 1))
    first = random.replace(np.ones(1000, np.int64), 1.0, both)
    repeated = (random.left > 0) & (first == 0)
    assert repeated.sum() > 100
    assert (random.replace(np.ones(1000, np.int64), 0.0, second) == 1).all()
    assert (random.left[repeated] == 0).all()
    # It does not come back when it is legal again.
    assert (random.replace(np.ones(1000, np.int64), 0.0, both)[repeated] == 1).all()


# --- Targets ---------------------------------------------------------------------------------------------------------


def test_munchausen_counts_legal_actions_alone() -> None:
    """The illegal action must drop out, as if there were one action less."""
    full = torch.tensor([[1.0, 9.0, 0.5], [-1.0, 0.0, 2.0]])
    mask = torch.tensor([[True, False, True], [True, False, True]])
    short = full[:, [0, 2]]
    masked = mask_q(full, mask)
    policy, entropy = soft_policy(masked, 0.7)
    short_policy, short_entropy = soft_policy(short, 0.7)
    torch.testing.assert_close(policy[:, [0, 2]], short_policy)
    assert (policy[:, 1] == 0).all()
    torch.testing.assert_close(entropy, short_entropy)
    bonus = munchausen_bonus(masked, torch.tensor([0, 2]), 0.9, 0.7, -1.0)
    torch.testing.assert_close(bonus, munchausen_bonus(short, torch.tensor([0, 1]), 0.9, 0.7, -1.0))


def test_masks_of_an_action_space_are_read() -> None:
    actions = Actions(gym.spaces.Discrete(3, start=2))
    assert actions.to_environment(np.array([0, 2])).tolist() == [2, 4]
    assert actions.read_masks([1, 0, 1]).tolist() == [True, False, True]
    assert actions.read_masks(np.array([[1, 0, 1], [0, 0, 0]], np.float64), 2).dtype == bool
    for wrong in (np.ones(4), np.full(3, 2), ["a", "b", "c"], None, [[1, 0], [1, 1]]):
        with pytest.raises(UserError, match="it must hold 3 booleans"):
            actions.read_masks(wrong)


def test_states_keep_masks() -> None:
    with closing(VECTORS["sync"]("info", "mask")) as envs, closing(VECTORS["sync"]("info", "mask")) as other:
        play(envs, 50)
        state = envs.state()
        assert state is not None
        other.load_state(state)
        rng = np.random.default_rng(5)
        for _ in range(30):
            assert np.array_equal(envs.action_mask, other.action_mask)
            actions = draw_legal(rng, envs.action_mask)
            one, two = envs.step(actions), other.step(actions)
            for field in dataclasses.fields(one):
                assert np.array_equal(getattr(one, field.name), getattr(two, field.name))


def test_taxi_of_gymnasium_is_masked() -> None:
    taxi = next(name for name in gym.registry if name.startswith("Taxi-v"))
    with closing(make_environments(EnvironmentConfig(env=taxi), 4, 1, True)) as envs:
        envs.reset()
        rng = np.random.default_rng(0)
        for _ in range(250):
            actions = draw_legal(rng, envs.action_mask)
            step = envs.step(actions)
            assert step.action_mask is not None
            assert (step.reward > -10).all()  # -10 is the price of an illegal pick-up or drop-off
