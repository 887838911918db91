from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hvdqn.config import EnvironmentConfig
from hvdqn.envs import Environments, Step, make_environments
from hvdqn.envs import make as making
from hvdqn.envs.atari import AtariVector
from hvdqn.envs.snapshot import sizes
from hvdqn.errors import UserError
from tests.unit import scripted_envs

Script = list[tuple[list[float], str]]


def make(env: str, envs: int = 2, seed: int = 1, training: bool = True, **settings: Any) -> Environments:
    if "scripted_envs" not in env and not re.match(r"[A-Z]\w+-v\d|ALE/|MinAtar/", env):
        env = f"tests.unit.scripted_envs:{env}"
    return make_environments(EnvironmentConfig(env=env, **settings), envs, seed, training)


def steps_of(environments: Environments, count: int, seed: int = 7) -> list[Step]:
    rng = np.random.default_rng(seed)
    return [
        environments.step(rng.integers(environments.num_actions, size=environments.num_envs))
        for _ in range(count)
    ]


def assert_same(one: Step, other: Step) -> None:
    for name in Step.__slots__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


# --- Steps and autoreset -------------------------------------------------------------------------------------------


def naive_transitions(script: Script, count: int) -> list[tuple[Any, ...]]:
    """Return the transitions of the usual Gymnasium loop over one environment."""
    env, seen = scripted_envs.Scripted(script), []
    observation, _ = env.reset()
    while len(seen) < count:
        next_observation, reward, terminated, truncated, _ = env.step(0)
        seen.append((*observation, reward, terminated, truncated, *next_observation))
        observation = env.reset()[0] if terminated or truncated else next_observation
    return seen


def learned_transitions(environments: Environments, count: int) -> list[list[tuple[Any, ...]]]:
    """Return the transitions that a learner gets from each env of an `Environments`."""
    seen: list[list[tuple[Any, ...]]] = [[] for _ in range(environments.num_envs)]
    observation = environments.reset().copy()
    while min(map(len, seen)) < count:
        step = environments.step(np.zeros(environments.num_envs, np.int64))
        for env in np.flatnonzero(step.valid):
            ends = bool(step.terminated[env]), bool(step.truncated[env])
            seen[env].append((*observation[env], float(step.reward[env]), *ends, *step.next_observation[env]))
        observation = step.observation.copy()
    return [transitions[:count] for transitions in seen]


ends = st.sampled_from(["terminated", "truncated", "both"])
rewards = st.lists(st.integers(-9, 9).map(float), min_size=1, max_size=4)
scripts = st.lists(st.tuples(rewards, ends), min_size=1, max_size=3)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@settings(max_examples=40, deadline=None)
@given(script=st.lists(scripts, min_size=1, max_size=3))
def test_every_autoreset_mode_gives_the_transitions_of_a_naive_loop(
    mode: AutoresetMode, script: list[Script]
):
    vector = SyncVectorEnv([lambda s=s: scripted_envs.Scripted(s) for s in script], autoreset_mode=mode)
    environments = Environments(vector, seed=1)
    assert learned_transitions(environments, 15) == [naive_transitions(s, 15) for s in script]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_episodes_report_raw_returns_and_lengths_in_every_mode(mode: AutoresetMode):
    vector = SyncVectorEnv([scripted_envs.Scripted] * 2, autoreset_mode=mode)
    environments = Environments(vector, seed=1, clip_rewards=True)
    environments.reset()
    rewards = [environments.step(np.zeros(2, np.int64)) for _ in range(7)]
    assert max(step.reward.max() for step in rewards) == 1.0
    assert min(step.reward.min() for step in rewards) == -1.0
    episodes = environments.pop_episodes()
    expected = [(6.0, 3, 0), (6.0, 3, 1), (-3.5, 2, 0), (-3.5, 2, 1)]
    assert [tuple(e[:3]) for e in episodes[:4]] == expected
    assert [e.info for e in episodes[:4]] == [{"noise": 2.0}] * 4
    assert environments.pop_episodes() == []


def test_the_reset_step_of_next_step_autoreset_is_not_valid():
    vector = SyncVectorEnv([scripted_envs.Scripted], autoreset_mode=AutoresetMode.NEXT_STEP)
    environments = Environments(vector, seed=1)
    environments.reset()
    steps = [environments.step(np.zeros(1, np.int64)) for _ in range(4)]
    final, reset = steps[2], steps[3]
    assert final.terminated[0]
    assert not final.fresh[0]
    np.testing.assert_array_equal(final.observation, final.next_observation)
    assert reset.fresh[0]
    assert not reset.valid[0]
    assert reset.reward[0] == 0
    assert not reset.terminated[0]
    assert not reset.truncated[0]


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_same_step_autoreset_returns_the_final_and_the_first_observation(mode: AutoresetMode):
    vector = SyncVectorEnv([scripted_envs.Scripted], autoreset_mode=mode)
    environments = Environments(vector, seed=1)
    environments.reset()
    step = [environments.step(np.zeros(1, np.int64)) for _ in range(3)][-1]
    np.testing.assert_array_equal(step.next_observation, [[0, 3]])
    np.testing.assert_array_equal(step.observation, [[1, 0]])
    assert step.fresh[0]
    assert step.valid[0]
    np.testing.assert_array_equal(environments.observation, [[1, 0]])


def test_an_environment_that_reuses_its_buffer_keeps_its_final_observations():
    plain, reusing = make("Scripted-v0"), make("Scripted-v0", env_kwargs='{"buffer": true}')
    plain.reset(), reusing.reset()
    for one, other in zip(steps_of(plain, 12), steps_of(reusing, 12), strict=True):
        assert_same(one, other)


def test_life_lost_in_infos_of_other_environments_is_ignored():
    environments = make("InfoLifeLost-v0", envs=1)
    environments.reset()
    steps_of(environments, 5)
    assert [episode.length for episode in environments.pop_episodes()] == [3, 2]


def test_later_calls_do_not_change_earlier_steps():
    environments = make("CartPole-v1", envs=3)
    environments.reset()
    steps, copies = [], []
    for _ in range(60):
        steps.append(steps_of(environments, 1)[0])
        copies.append(copy.deepcopy(steps[-1]))
    for step, copied in zip(steps, copies, strict=True):
        assert_same(step, copied)


def test_constant_flags_cannot_be_written_to():
    environments = make("Scripted-v0")
    environments.reset()
    step = environments.step(np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="read-only"):
        step.valid[0] = False


def test_rewards_are_clipped_only_in_training():
    for training, largest in ((True, 1.0), (False, 3.0)):
        environments = make("Scripted-v0", clip_rewards=True, training=training)
        environments.reset()
        assert max(step.reward.max() for step in steps_of(environments, 5)) == largest


def test_clipped_rewards_are_float32_and_small_rewards_are_unchanged():
    environments = make("Scripted-v0", clip_rewards=True)
    environments.reset()
    rewards = np.array([step.reward[0] for step in steps_of(environments, 5)])
    assert rewards.dtype == np.float32
    np.testing.assert_array_equal(rewards, [1, 1, 1, -1, 0.5])


# --- Spaces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "image"),
    [
        ("Vector", (3,), np.float32, False),
        ("Scalar", (1,), np.float32, False),
        ("Matrix", (6,), np.float32, False),
        ("Integers", (3,), np.float32, False),
        ("Bytes", (4,), np.uint8, False),
        ("Image", (8, 6, 3), np.uint8, True),
        ("FloatImage", (3, 8, 6), np.float32, True),
        ("BoolImage", (10, 10, 4), np.bool_, True),
        ("GrayImage", (8, 6), np.uint8, True),
        ("Discrete", (4,), np.float32, False),
        ("MultiDiscrete", (5,), np.float32, False),
        ("MultiBinary", (4,), np.float32, False),
        ("Dict", (12 + 3 + 2 + 2,), np.float32, False),
        ("Tuple", (6,), np.float32, False),
    ],
)
def test_observations_are_flattened_unless_they_are_images(
    name: str, shape: tuple[int, ...], dtype: Any, image: bool
):
    # In worker processes, each env samples from its own copy of the space.
    environments = make(f"Observes{name}-v0", vectorization="async")
    assert (environments.observation_shape, environments.observation_dtype) == (shape, dtype)
    assert environments.is_image is image
    observation = environments.reset(seed=3)
    step = environments.step(np.zeros(2, np.int64))
    environments.close()
    space = scripted_envs.OBSERVED[name]
    space.seed(int(np.random.SeedSequence(3).generate_state(2)[1]) >> 1)  # the second env's seed
    for seen in (observation, step.observation):
        expected = space.sample()
        if not image and not isinstance(space, gym.spaces.Box):
            expected = gym.spaces.flatten(space, expected)
        assert seen.dtype == dtype
        assert seen.shape == (2, *shape)
        np.testing.assert_array_equal(seen[1], np.asarray(expected).reshape(shape).astype(dtype))


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_actions_start_at_zero_for_any_start_of_the_space(vectorization: str):
    environments = make("ActsFromFive-v0", envs=3, vectorization=vectorization)
    environments.reset()
    assert environments.num_actions == 3
    np.testing.assert_array_equal(environments.step(np.array([0, 1, 2])).reward, [5, 6, 7])
    environments.close()


@pytest.mark.parametrize(
    ("wrappers", "first_reward"),
    [((), 1), (("doubled", "plus_ten"), 12), (("plus_ten", "doubled"), 22)],
)
def test_wrappers_are_applied_in_order(wrappers: tuple[str, ...], first_reward: float):
    environments = make("Scripted-v0", wrapper=tuple(f"tests.unit.scripted_envs:{name}" for name in wrappers))
    environments.reset()
    assert environments.step(np.zeros(2, np.int64)).reward[0] == first_reward


def test_wrappers_replace_a_native_vector_by_a_sync_vector():
    environments = make("CartPole-v1", wrapper=("tests.unit.scripted_envs:doubled",))
    environments.reset()
    assert environments.description == (
        "CartPole-v1, 2 envs, sync vector, SAME_STEP autoreset, wrapped by tests.unit.scripted_envs:doubled"
    )
    assert environments.step(np.zeros(2, np.int64)).reward.tolist() == [2, 2]


# --- Native vectors ----------------------------------------------------------------------------------------------


def balance(observation: NDArray[np.float32]) -> NDArray[np.int64]:
    return (observation[:, 2] + 0.5 * observation[:, 3] + 0.05 * observation[:, 1] > 0).astype(np.int64)


@pytest.mark.parametrize("vectorization", ["native", "sync"])
def test_cartpole_is_truncated_after_500_steps_with_return_500(vectorization: str):
    environments = make("CartPole-v1", envs=4, vectorization=vectorization)
    assert f"{vectorization} vector" in environments.description
    observation = environments.reset()
    for _ in range(500):
        step = environments.step(balance(observation))
        observation = step.observation
    assert step.truncated.all()
    assert not step.terminated.any()
    assert [tuple(e) for e in environments.pop_episodes()] == [(500.0, 500, env, {}) for env in range(4)]


@pytest.mark.parametrize(
    "env", ["CartPole-v1", "Acrobot-v1", "MinAtar/Breakout-v1", "MinAtar/SpaceInvaders-v1"]
)
def test_equal_seeds_give_equal_steps(env: str):
    def played(seed: int) -> list[Step]:
        environments = make(env, envs=3, seed=seed)
        environments.reset()
        return steps_of(environments, 60)

    for one, other in zip(played(5), played(5), strict=True):
        assert_same(one, other)
    assert any((a.observation != b.observation).any() for a, b in zip(played(5), played(6), strict=True))
    first = make(env, envs=3, seed=5).reset()
    if env != "MinAtar/SpaceInvaders-v1":  # its first observation is always the same
        assert (first != first[0]).any(), "all envs have the same seed"


def test_a_later_reset_without_a_seed_continues_the_random_streams():
    environments = make("CartPole-v1")
    first, second = environments.reset().copy(), environments.reset().copy()
    assert (first != second).any()
    np.testing.assert_array_equal(environments.reset(seed=1), first)


# --- Atari -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["native", "sync"])
def breakout_lives(request: pytest.FixtureRequest) -> tuple[list[Step], list[Any]]:
    environments = make("ALE/Breakout-v5", vectorization=request.param, episodic_life=True, clip_rewards=True)
    assert "a lost life ends the episode" in environments.description
    assert environments.observation_shape == (84, 84)
    environments.reset()
    steps = steps_of(environments, 450)
    episodes = environments.pop_episodes()
    environments.close()
    return steps, episodes


def test_a_lost_life_ends_the_episode_but_not_the_atari_game(breakout_lives: tuple[list[Step], list[Any]]):
    steps, episodes = breakout_lives
    for env in range(2):
        ends = [index for index, step in enumerate(steps) if step.terminated[env]]
        games = [episode for episode in episodes if episode.env == env]
        assert games
        last = np.cumsum([game.length for game in games]) - 1  # the steps in which games ended
        assert set(last) <= set(ends)
        assert ends.index(last[0]) == 4, "Breakout has five lives"
        for index in ends:
            step = steps[index]
            assert step.fresh[env]
            same = np.array_equal(step.next_observation[env], step.observation[env])
            assert same == (index not in last), "only a new game changes the observation"
        returns = np.cumsum([step.reward[env] for step in steps])[last[0]]
        assert games[0].episode_return >= returns > 0, "raw returns are no smaller than clipped ones"


def test_native_and_sync_atari_vectors_are_equal():
    native = make("ALE/Breakout-v5", vectorization="native", episodic_life=True)
    loop = make("ALE/Breakout-v5", vectorization="sync", episodic_life=True)
    np.testing.assert_array_equal(native.reset(), loop.reset())
    for one, other in zip(steps_of(native, 250), steps_of(loop, 250), strict=True):
        assert_same(one, other)
    assert native.pop_episodes() == loop.pop_episodes()
    assert "native vector, SAME_STEP autoreset, frameskip 4, sticky actions 0.0" in native.description
    native.close(), loop.close()


def test_a_new_atari_game_shows_in_its_lives_and_frame_number():
    vector = AtariVector(4, 1, True, {"game": "breakout"})
    vector._lives, vector._frames = np.array([3, 3, 1, 9]), np.array([400, 400, 400, 400])
    info = {"lives": np.array([2, 3, 5, 5]), "episode_frame_number": np.array([404, 404, 12, 20])}
    assert vector._same_game(info).tolist() == [True, False, False, False]
    vector.close()


def test_a_lost_life_does_not_end_the_episode_in_evaluation():
    environments = make("ALE/Breakout-v5", envs=1, training=False, episodic_life=True)
    environments.reset()
    steps = steps_of(environments, 250)
    episodes = environments.pop_episodes()
    ends = [index for index, step in enumerate(steps) if step.terminated[0]]
    assert [episode.length for episode in episodes] == np.diff([-1, *ends]).tolist()
    assert "life" not in environments.description
    assert environments.state() is None, "the state of an emulator is not plain data"
    environments.close()


def test_a_game_in_its_usual_difficulty_is_played_as_in_the_native_vector():
    kwargs = {"noop_max": 0}
    native = make("ALE/Breakout-v5", env_kwargs=json.dumps(kwargs), episodic_life=True)
    single = make("ALE/Breakout-v5", env_kwargs=json.dumps(kwargs | {"difficulty": 0}), episodic_life=True)
    assert (single.observation_shape, single.num_actions) == ((84, 84), native.num_actions)
    assert_close(native.reset(), single.reset())
    lost = 0
    for one, other in zip(steps_of(native, 250), steps_of(single, 250), strict=True):
        assert_close(one.observation, other.observation)
        # The native vector mixes older screens into the last frame of a game, which nobody learns from.
        assert_close(one.next_observation[~one.terminated], other.next_observation[~one.terminated])
        for name in ("reward", "terminated", "truncated", "fresh"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        lost += int(one.terminated.sum())
    assert lost > 5
    assert native.pop_episodes() == single.pop_episodes()
    native.close(), single.close()


def assert_close(one: np.ndarray, other: np.ndarray) -> None:
    """Frames may differ by rounding."""
    assert np.abs(one.astype(int) - other.astype(int)).max(initial=0) <= 1


@pytest.mark.parametrize(
    ("kwargs", "shape", "described"),
    [
        ({"mode": 4}, (84, 84), "sync vector.*mode 4"),
        ({"difficulty": 1, "obs_type": "rgb", "img_height": 42}, (42, 84, 3), "sync vector.*difficulty 1"),
        ({"obs_type": "ram"}, (128,), "sync vector.*RAM observations"),
        ({"obs_type": "rgb"}, (84, 84, 3), "native vector"),
        ({"obs_type": "grayscale", "mode": None}, (84, 84), "native vector"),
    ],
)
def test_variants_of_an_atari_game(kwargs: dict[str, Any], shape: tuple[int, ...], described: str):
    environments = make("ALE/Breakout-v5", env_kwargs=json.dumps(kwargs))
    assert re.search(described, environments.description)
    observation = environments.reset()
    assert (environments.observation_shape, observation.dtype) == (shape, np.uint8)
    steps = steps_of(environments, 40)
    assert all(step.observation.shape[1:] == shape for step in steps)
    assert any((step.observation != observation).any() for step in steps)
    environments.close()


def test_the_mode_changes_the_game():
    screens = [
        make("ALE/Freeway-v5", env_kwargs=json.dumps({"mode": mode, "noop_max": 0})).reset()
        for mode in (0, 1)
    ]
    assert (screens[0] != screens[1]).any()


def test_an_atari_time_limit_truncates():
    kwargs = '{"max_num_frames_per_episode": 100, "repeat_action_probability": 0.25}'
    environments = make("ALE/Pong-v5", envs=1, env_kwargs=kwargs)
    environments.reset()
    steps = steps_of(environments, 25)
    assert "sticky actions 0.25" in environments.description
    assert [bool(step.truncated[0]) for step in steps] == [False] * 24 + [True]
    assert (steps[-1].next_observation != steps[-1].observation).any()
    assert environments.pop_episodes()[0].length == 25
    environments.close()


# --- Exact resume ------------------------------------------------------------------------------------------------

PLAIN = [
    *[("CartPole-v1", how) for how in ("native", "sync", "async")],
    ("Acrobot-v1", "auto"),
    ("MountainCar-v0", "auto"),
    ("FrozenLake-v1", "auto"),
    *[(f"{game}-v1", "auto") for game in ("Blackjack", "CliffWalking")],
    ("Trader-v0", "sync"),
    ("Trader-v0", "async"),
    *[
        (f"MinAtar/{game}-v1", "auto")
        for game in ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")
    ],
    ("Scripted-v0", "auto"),
]


def through_a_file(state: Any, path: Path) -> Any:
    """Return the state after a round trip through JSON and arrays without pickle, as in a checkpoint."""
    arrays: list[np.ndarray] = []

    def split(node: Any) -> Any:
        if isinstance(node, np.ndarray):
            arrays.append(node)
            return {"array": len(arrays) - 1}
        if isinstance(node, dict):
            return {key: split(value) for key, value in node.items()}
        return [split(value) for value in node] if isinstance(node, list) else node

    def join(node: Any) -> Any:
        if isinstance(node, dict) and set(node) == {"array"}:
            return loaded[str(node["array"])]
        if isinstance(node, dict):
            return {key: join(value) for key, value in node.items()}
        return [join(value) for value in node] if isinstance(node, list) else node

    text = json.dumps(split(state))
    np.savez(path, **{str(index): array for index, array in enumerate(arrays)})
    loaded = np.load(path, allow_pickle=False)
    return join(json.loads(text))


@pytest.mark.parametrize(("env", "vectorization"), PLAIN)
def test_a_restored_state_reproduces_the_next_steps_bitwise(env: str, vectorization: str, tmp_path: Path):
    played = make(env, seed=1, vectorization=vectorization)
    played.reset()
    steps_of(played, 137)
    saved = played.state()
    assert saved is not None
    saved = through_a_file(saved, tmp_path / "arrays.npz")
    other = make(env, seed=2, vectorization=vectorization)
    other.load_state(saved)
    np.testing.assert_array_equal(other.observation, played.observation)
    for one, two in zip(steps_of(played, 500), steps_of(other, 500), strict=True):
        assert_same(one, two)
    assert played.pop_episodes() == other.pop_episodes()
    played.close(), other.close()


def test_saving_does_not_change_the_next_steps():
    watched, plain = make("MinAtar/Asterix-v1"), make("MinAtar/Asterix-v1")
    watched.reset(), plain.reset()
    for _ in range(4):
        assert watched.state() is not None
        for one, other in zip(steps_of(watched, 20), steps_of(plain, 20), strict=True):
            assert_same(one, other)


def test_later_steps_do_not_change_a_saved_state():
    environments = make("MinAtar/Asterix-v1")
    environments.reset()
    steps_of(environments, 20)
    saved = environments.state()
    before = json.dumps(saved, default=lambda array: array.tolist())
    steps_of(environments, 20)
    assert json.dumps(saved, default=lambda array: array.tolist()) == before


@pytest.mark.parametrize("env", ["Forgetful-v0", "HiddenStarts-v0"])
def test_state_outside_of_attributes_is_detected(env: str):
    environments = make(env)
    environments.reset()
    assert environments.state() is None


def test_state_that_does_not_fit_a_copy_is_detected():
    environments = make("RandomPart-v0", envs=1)
    environments.reset()
    assert environments.state() is None


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_environments_are_usable_after_a_state_that_does_not_fit(vectorization: str):
    cartpole, scripted = (make(env, vectorization="sync") for env in ("CartPole-v1", "Scripted-v0"))
    cartpole.reset(), scripted.reset()
    state = scripted.state()
    assert state is not None
    state["vector"] = cartpole.state()["vector"]
    environments = make("Scripted-v0", vectorization=vectorization)
    with pytest.raises(ValueError, match="does not fit"):
        environments.load_state(state)
    environments.reset()
    assert len(steps_of(environments, 5)) == 5
    environments.close()


def test_environments_too_slow_to_check_have_no_state(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hvdqn.envs.rehearsal._CHECK_SECONDS", 0.0)
    environments = make("CartPole-v1")
    environments.reset()
    assert environments.state() is None


@pytest.mark.parametrize(
    "hidden", [iter([1]), object(), {"a": {1, 2}}, np.array([None]), lambda: [open], print]
)
def test_an_environment_with_other_attributes_than_plain_data_and_functions_has_no_state(hidden: Any):
    from hvdqn.envs import snapshot

    env = scripted_envs.Scripted()
    env.hidden = hidden  # type: ignore[attr-defined]
    assert (snapshot.save(env) is not None) == callable(hidden)


def deeply_nested(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


def containing_itself(container: Any) -> Any:
    container["self" if isinstance(container, dict) else 0] = container
    return container


class Node:
    """An element of a linked list."""

    def __init__(self, length: int) -> None:
        self.next = Node(length - 1) if length > 1 else None


class Unreadable:
    @property
    def __dict__(self):  # type: ignore[override]
        raise RuntimeError("the server has gone away")


@pytest.mark.parametrize(
    "odd",
    [
        containing_itself([0]),
        containing_itself({}),
        {"a": (containing_itself([0]),)},
        deeply_nested(3000),
        deeply_nested(200),
        Node(200),
        Unreadable(),
        10**5000,
    ],
    ids=["list", "dict", "inside", "deep", "too deep for JSON", "linked", "unreadable", "long integer"],
)
def test_state_that_cannot_be_written_is_not_plain(odd: Any):
    from hvdqn.envs import snapshot

    env = scripted_envs.Scripted()
    env.odd = odd  # type: ignore[attr-defined]
    assert snapshot.save(env) is None


def test_state_that_refers_to_one_list_many_times_does_not_explode():
    from hvdqn.envs import snapshot

    env = scripted_envs.Scripted()
    env.odd = [1]  # type: ignore[attr-defined]
    for _ in range(50):
        env.odd = [env.odd, env.odd]  # type: ignore[attr-defined]
    assert snapshot.save(env) is None


@pytest.mark.parametrize(
    "value",
    [
        [0.1 * i for i in range(100)],
        list(range(-50, 50)),
        [True, False] * 20,
        [*range(40), 2**63],
        [*range(40), 10**30],
        [np.float32(i) for i in range(40)],
        (*range(40), 1.0),
        deque([1.5] * 40, maxlen=50),
        {f"2020-{i}": i / 3 for i in range(40)},
        {(1, 2): [3], None: ("x",)},
        np.str_("Hearts"),
        np.bytes_(b"x"),
        [float("nan")] * 40,
    ],
    ids=str,
)
def test_values_keep_their_type_through_a_snapshot(value: Any, tmp_path: Path):
    from hvdqn.envs import snapshot

    env, other = scripted_envs.Scripted(), scripted_envs.Scripted()
    env.value = value  # type: ignore[attr-defined]
    state = snapshot.save(env)
    assert state is not None
    snapshot.load(other, through_a_file(state, tmp_path / "arrays.npz"))
    restored = other.value  # type: ignore[attr-defined]
    assert repr(restored) == repr(value)
    assert type(restored) is type(value)


def test_a_large_array_that_environments_share_is_saved_once():
    environments = make("Trader-v0", envs=4)
    environments.reset()
    steps_of(environments, 3)
    state = environments.state()
    assert state is not None
    text_bytes, array_bytes = sizes(state)
    prices = scripted_envs.Trader.BARS * 8
    assert prices < array_bytes < 2 * prices
    assert text_bytes < 15_000
    assert prices < environments.saved_bytes() < 2 * prices


def test_lists_that_no_checkpoint_can_hold_are_left_out(monkeypatch, caplog):
    monkeypatch.setattr("hvdqn.envs.vector.MAX_TEXT_BYTES", 1000)
    environments = make("Scripted-v0", envs=4)
    environments.reset()
    assert environments.state() is None
    assert environments.state() is None
    assert caplog.text.count("checkpoints leave them out, and a resumed run begins new episodes") == 1


def test_a_state_of_other_environments_is_refused():
    saved = {}
    for env in ("Acrobot-v1", "MountainCar-v0"):
        environments = make(env)
        environments.reset()
        saved[env] = environments.state()
    with pytest.raises(ValueError, match=r"observations of shape \(2, 6\), not \(2, 2\)"):
        make("MountainCar-v0").load_state(saved["Acrobot-v1"])
    with pytest.raises(ValueError, match=r"observations of shape \(2, 2\), not \(3, 2\)"):
        make("MountainCar-v0", envs=3).load_state(saved["MountainCar-v0"])
    with pytest.raises(ValueError, match="does not fit"):
        make("Scripted-v0").load_state(saved["MountainCar-v0"])


# --- Worker processes --------------------------------------------------------------------------------------------


def test_async_and_sync_vectors_are_equal():
    sync, parallel = (
        make("MinAtar/Breakout-v1", vectorization="sync"),
        make("MinAtar/Breakout-v1", vectorization="async"),
    )
    np.testing.assert_array_equal(sync.reset(), parallel.reset())
    for one, other in zip(steps_of(sync, 60), steps_of(parallel, 60), strict=True):
        assert_same(one, other)
    assert sync.pop_episodes() == parallel.pop_episodes()
    parallel.close()


def test_workers_ignore_signals():
    environments = make("Scripted-v0", vectorization="async")
    environments.reset()
    vector = environments._vector
    assert isinstance(vector, AsyncVectorEnv)
    for process in vector.processes:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            os.kill(process.pid, number)
    assert steps_of(environments, 3)[-1].terminated.all()
    environments.close()
    assert not any(process.is_alive() for process in vector.processes)


@pytest.mark.parametrize("end", ["raise ValueError('a crash')", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_workers_end_with_their_rank(end: str):
    program = f"""
import os, signal
from hvdqn.config import EnvironmentConfig
from hvdqn.envs import make_environments
config = EnvironmentConfig("tests.unit.scripted_envs:Scripted-v0", vectorization="async")
environments = make_environments(config, 3, 1, True)
environments.reset()
print(*[process.pid for process in environments._vector.processes], flush=True)
{end}
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=30,
    )
    assert ended.returncode != 0
    workers = [int(pid) for pid in ended.stdout.split()]
    assert len(workers) == 3
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, workers))


# --- Wrong input -------------------------------------------------------------------------------------------------

WRONG = {
    "unknown id": ({"env": "CartPol-v1"}, r"unknown environment 'CartPol-v1'; did you mean .*'CartPole-v1'"),
    "unknown case": ({"env": "cartpole-v1"}, r"did you mean .*'CartPole-v1'"),
    "unknown game": ({"env": "ALE/Breakuot-v5"}, r"did you mean 'ALE/Breakout-v5'"),
    "nothing of this name": (
        {"env": "FlappyBird-v0"},
        r"'FlappyBird-v0'; give a registered Gymnasium id, or module:FlappyBird-v0 if a package",
    ),
    "near ids, and a package's own": (
        {"env": "CartPole-v7"},
        r"'CartPole-v1'.*\? Else .* module:CartPole-v7 if",
    ),
    "an id that a module lacks": (
        {"env": "tests.unit.scripted_envs:Flappy-v0"},
        r"'Flappy-v0'; give an id that its module registers$",
    ),
    "game without its namespace": ({"env": "Breakout-v5"}, r"did you mean .*'ALE/Breakout-v5'"),
    "nothing near": ({"env": "zzzzzzzzzz"}, r"unknown environment 'zzzzzzzzzz'; give a registered"),
    "unknown module": ({"env": "no_such_module:X-v0"}, r"cannot import 'no_such_module'.*PYTHONPATH"),
    "continuous": ({"env": "Pendulum-v1"}, r"action space Box\(.*needs Discrete"),
    "continuous, scripted": (
        {"env": "tests.unit.scripted_envs:ActsContinuously-v0"},
        r"action space Box.*Discrete",
    ),
    "continuous Atari": ({"env": "ALE/Pong-v5", "env_kwargs": '{"continuous": true}'}, r"needs Discrete"),
    "text": (
        {"env": "tests.unit.scripted_envs:ObservesText-v0"},
        r"observes a Text space at \['said'\]; hvdqn supports Box",
    ),
    "text, async": (
        {"env": "tests.unit.scripted_envs:ObservesText-v0", "vectorization": "async"},
        r"observes a Text space at \['said'\]",
    ),
    "sequence": (
        {"env": "tests.unit.scripted_envs:ObservesSequence-v0"},
        r"observes a Sequence space; hvdqn supports",
    ),
    "huge": (
        {"env": "tests.unit.scripted_envs:ObservesHuge-v0"},
        r"observes Discrete\(1000000000\); as a one-hot vector .* 1,000,000,000 numbers, .* use a --wrapper",
    ),
    "huge in parts": (
        {"env": "tests.unit.scripted_envs:ObservesHugeParts-v0", "vectorization": "async"},
        r"would take 2,000,000,002 numbers",
    ),
    "graph": ({"env": "tests.unit.scripted_envs:ObservesGraph-v0"}, r"observes a Graph space"),
    "no JSON": ({"env_kwargs": "{a: 1}"}, r"--env-kwargs '\{a: 1\}' is not JSON .*\"name\": value"),
    "no object": ({"env_kwargs": "[1]"}, r"--env-kwargs '\[1\]' is not a JSON object"),
    "unknown argument": ({"env_kwargs": '{"gravty": 1}'}, r"does not suit 'CartPole-v1': .*gravty"),
    "unknown argument, sync": (
        {"env": "Acrobot-v1", "env_kwargs": '{"gravty": 1}'},
        r"does not suit 'Acrobot-v1': .*gravty",
    ),
    "unknown argument, Atari": (
        {"env": "ALE/Pong-v5", "env_kwargs": '{"obs_typ": "ram"}'},
        r"does not suit 'ALE/Pong-v5': .*obs_typ",
    ),
    "unknown argument, Atari in a mode": (
        {"env": "ALE/Pong-v5", "env_kwargs": '{"mode": 1, "obs_typ": "ram"}'},
        r"does not suit 'ALE/Pong-v5': .*obs_typ",
    ),
    "unknown mode": (
        {"env": "ALE/Pong-v5", "env_kwargs": '{"mode": 7}'},
        r"pong has no mode 7; there are 0, 1",
    ),
    "unknown difficulty": (
        {"env": "ALE/Pong-v5", "env_kwargs": '{"difficulty": 9}', "vectorization": "async"},
        r"pong has no difficulty 9; there are 0, 1",
    ),
    "unknown observations": (
        {"env": "ALE/Pong-v5", "env_kwargs": '{"obs_type": "rom"}'},
        r"obs_type is 'rom'; it must be one of grayscale, rgb, ram",
    ),
    "a mode of the native vector": (
        {"env": "ALE/Pong-v5", "env_kwargs": '{"mode": 1}', "vectorization": "native"},
        r"no mode, difficulty or RAM; use --vectorization sync",
    ),
    "wrong value": ({"env": "FrozenLake-v1", "env_kwargs": '{"map_name": "9x9"}'}, r"does not suit"),
    "own setting": ({"env": "ALE/Pong-v5", "env_kwargs": '{"stack_num": 4}'}, r"'stack_num'.*--frame-stack"),
    "wrapper form": ({"wrapper": ("doubled",)}, r"--wrapper 'doubled' is not of the form module:attribute"),
    "wrapper module": ({"wrapper": ("no_such:f",)}, r"--wrapper 'no_such:f': cannot import 'no_such'"),
    "wrapper name": (
        {"wrapper": ("tests.unit.scripted_envs:dobled",)},
        r"module 'tests.unit.scripted_envs' has no 'dobled'",
    ),
    "wrapper arguments": (
        {"wrapper": ("gymnasium.wrappers:TimeLimit",)},
        r"cannot be called with an environment alone \(.*max_episode_steps.*\)",
    ),
    "no wrapper": (
        {"wrapper": ("tests.unit.scripted_envs:nothing",)},
        r"returned a NoneType; it must return",
    ),
    "wrapper without its library": (
        {"wrapper": ("tests.unit.scripted_envs:needs_more",)},
        r"needs_more' lacks a dependency: No module named 'no_such_library'; install what it needs",
    ),
    "native and wrapper": (
        {"wrapper": ("tests.unit.scripted_envs:doubled",), "vectorization": "native"},
        r"--wrapper wraps single environments; .*sync",
    ),
    "not native": ({"env": "Acrobot-v1", "vectorization": "native"}, r"has no native vector; use .*sync"),
    "lives": ({"episodic_life": True}, r"--episodic-life needs an Atari environment"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_that_names_the_remedy(case: str):
    settings, message = WRONG[case]
    with pytest.raises(UserError, match=message) as raised:
        make_environments(EnvironmentConfig(**settings), 2, 1, True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("module", "env", "extra"),
    [("ale_py", "ALE/Pong-v5", "atari"), ("minatar.gym", "MinAtar/Breakout-v1", "minatar")],
)
def test_a_missing_extra_is_named(module: str, env: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, module, None)
    for known in list(gym.registry):
        if known.startswith(env.split("/")[0]):
            monkeypatch.delitem(gym.registry, known)
    with pytest.raises(UserError, match=re.escape(f"pip install 'hvdqn[{extra}]'")):
        make_environments(EnvironmentConfig(env=env), 2, 1, True)


def test_a_missing_dependency_is_named(monkeypatch: pytest.MonkeyPatch):
    def engine(**_: Any) -> None:
        raise gym.error.DependencyNotInstalled(
            "Box2D is not installed,\n you can install it by `pip install swig` and `pip install gymnasium[box2d]`"
        )

    monkeypatch.setitem(
        gym.registry, "Engine-v0", gym.envs.registration.EnvSpec("Engine-v0", entry_point=engine)
    )
    with pytest.raises(UserError, match=r"'Engine-v0' lacks a dependency: Box2D is not .* 'hvdqn\[box2d\]'$"):
        make_environments(EnvironmentConfig(env="Engine-v0"), 2, 1, True)


@pytest.mark.parametrize(
    ("error", "described"),
    [
        (
            gym.error.DependencyNotInstalled('pygame is not installed, run `pip install "gymnasium[box2d]"`'),
            "pygame is not installed; pip install 'hvdqn[video]'",
        ),
        (ImportError("No module named 'Box2D'"), "Box2D is not installed; pip install 'hvdqn[box2d]'"),
        (ImportError("No module named 'mujoco'"), "mujoco is not installed; pip install 'hvdqn[mujoco]'"),
        (ImportError("No module named 'pybullet'"), "No module named 'pybullet'; install what it needs"),
    ],
)
def test_a_missing_library_is_described_with_its_extra(error: Exception, described: str):
    assert making.describe_missing_library(error) == described


def test_a_bug_in_the_environment_is_not_a_user_error():
    with pytest.raises(ValueError, match="a bug in the environment") as raised:
        make("Broken-v0")
    assert not isinstance(raised.value, UserError)


def test_a_bug_in_a_wrapper_is_not_reported_as_wrong_env_kwargs():
    config = EnvironmentConfig(
        env_kwargs='{"sutton_barto_reward": true}', wrapper=("tests.unit.scripted_envs:broken",)
    )
    with pytest.raises(ValueError, match="a bug in the wrapper") as raised:
        make_environments(config, 2, 1, True)
    assert not isinstance(raised.value, UserError)


def test_old_atari_ids_are_found():
    assert making.find_spec("PongNoFrameskip-v4").kwargs["frameskip"] == 1
