"""Test environments with known rewards, episode ends and observations.

Importing this module registers them; `--env tests.unit.scripted_envs:Scripted-v0` works from the repository's root.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

TWO_EPISODES = (((1.0, 2.0, 3.0), "terminated"), ((-4.0, 0.5), "truncated"))


class Scripted(gym.Env[np.ndarray, int]):
    """Repeats a list of episodes. The observation is [episode, step in the episode]; actions have no effect.

    Args:
        episodes: the rewards of each episode, and how it ends: "terminated", "truncated" or "both".
        buffer: return the same array from every call, as some simulators do.
    """

    observation_space = spaces.Box(-1e6, 1e6, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, episodes: Sequence[tuple[Sequence[float], str]] = TWO_EPISODES, buffer: bool = False):
        self.episodes = [(list(rewards), end) for rewards, end in episodes]
        self.buffer = np.zeros(2, np.float32) if buffer else None
        self.episode = -1
        self.step_in_episode = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.episode += 1
        self.step_in_episode = 0
        return self._observation(), {"noise": 1.0}

    def step(self, action: int):
        rewards, end = self.episodes[self.episode % len(self.episodes)]
        reward = rewards[self.step_in_episode]
        self.step_in_episode += 1
        ended = self.step_in_episode == len(rewards)
        terminated = ended and end in ("terminated", "both")
        truncated = ended and end in ("truncated", "both")
        return self._observation(), reward, terminated, truncated, {"noise": 2.0}

    def _observation(self) -> np.ndarray:
        observation = np.array([self.episode, self.step_in_episode], np.float32)
        if self.buffer is None:
            return observation
        self.buffer[:] = observation
        return self.buffer


class Observing(gym.Env[Any, int]):
    """Observations are samples of a space, the reward is the action, and the episode never ends."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any] | None = None):
        self.observation_space = observation_space
        self.action_space = spaces.Discrete(3) if action_space is None else action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: int):
        assert self.action_space.contains(action)
        return self.observation_space.sample(), float(action), False, False, {}


class RendersNothing(Observing):
    """Accepts a render mode, but renders nothing."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - Gymnasium's convention

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(OBSERVED["Vector"])
        self.render_mode = render_mode

    def render(self) -> None:
        return None


class Forgetful(Scripted):
    """Takes rewards from a class attribute, which `snapshot` does not save: it cannot be resumed exactly."""

    stream = iter(range(1_000_000))

    def step(self, action: int):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, float(next(self.stream)), terminated, truncated, info


class Trader(Scripted):
    """Holds a long price history, as trading environments do: one array, and one list with the same numbers."""

    BARS = 5000

    def __init__(self) -> None:
        super().__init__()
        self.history = np.arange(self.BARS, dtype=np.float64)[::-1]
        self.recent = self.history[:500].tolist()


class HiddenStarts(Scripted):
    """Long episodes whose first observation comes from a class attribute, which `snapshot` does not save."""

    stream = iter(range(1_000_000))

    def __init__(self) -> None:
        super().__init__([([0.0] * 500, "terminated")])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        observation, info = super().reset(seed=seed)
        return observation + next(self.stream), info


class InfoLifeLost(Scripted):
    """Has a `life_lost` among its infos that does not mean what hvdqn's own key means."""

    def step(self, action: int):
        *rest, _ = super().step(action)
        return *rest, {"life_lost": True}


class RandomPart(Scripted):
    """The class of its part differs between instances, so the state of one may not fit another."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1
        self.part = Observing(self.observation_space) if self.made % 3 else Scripted()


class NeedsArgument(Scripted):
    """An environment whose constructor needs an argument."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


class Broken(Scripted):
    """An environment with a bug in its constructor."""

    def __init__(self) -> None:
        super().__init__()
        raise ValueError("a bug in the environment")


OBSERVED = {
    "Vector": spaces.Box(-1, 1, (3,), np.float64),
    "Scalar": spaces.Box(-1, 1, (), np.float32),
    "Matrix": spaces.Box(-1, 1, (2, 3), np.float32),
    "Integers": spaces.Box(-5, 5, (3,), np.int32),
    "Bytes": spaces.Box(0, 255, (4,), np.uint8),
    "Image": spaces.Box(0, 255, (8, 6, 3), np.uint8),
    "FloatImage": spaces.Box(0, 1, (3, 8, 6), np.float64),
    "BoolImage": spaces.Box(0, 1, (10, 10, 4), bool),
    "Cards": spaces.Box(0, 51, (4,), np.uint8),
    "GrayImage": spaces.Box(0, 255, (8, 6), np.uint8),
    "Discrete": spaces.Discrete(4, start=2),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary((2, 2)),
    "Dict": spaces.Dict(
        image=spaces.Box(0, 255, (2, 2, 3), np.uint8),
        rest=spaces.Tuple((spaces.Discrete(3), spaces.MultiBinary(2), spaces.Box(-1, 1, (2,), np.float64))),
    ),
    "Tuple": spaces.Tuple((spaces.Discrete(2), spaces.Discrete(4))),
    "Text": spaces.Dict(seen=spaces.Discrete(2), said=spaces.Text(5)),
    "Sequence": spaces.Sequence(spaces.Discrete(2)),
    "Graph": spaces.Graph(spaces.Discrete(2), None),
    "Huge": spaces.Discrete(10**9),
    "HugeParts": spaces.Tuple((spaces.Discrete(2), spaces.Discrete(10**9), spaces.Discrete(10**9))),
}

gym.register("Scripted-v0", Scripted)
gym.register("Forgetful-v0", Forgetful)
gym.register("HiddenStarts-v0", HiddenStarts)
gym.register("Trader-v0", Trader)
gym.register("RendersNothingVector-v0", RendersNothing)
gym.register("InfoLifeLost-v0", InfoLifeLost)
gym.register("RandomPart-v0", RandomPart)
gym.register("Broken-v0", Broken)
gym.register("NeedsArgument-v0", NeedsArgument)
for _name, _space in OBSERVED.items():
    gym.register(f"Observes{_name}-v0", Observing, kwargs={"observation_space": _space})
gym.register(
    "ActsFromFive-v0",
    Observing,
    kwargs={"observation_space": OBSERVED["Bytes"], "action_space": spaces.Discrete(3, start=5)},
)
gym.register(
    "ActsContinuously-v0",
    Observing,
    kwargs={"observation_space": OBSERVED["Bytes"], "action_space": spaces.Box(-1, 1, (2,))},
)


def doubled(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Wrapper: doubles the rewards."""
    return gym.wrappers.TransformReward(env, lambda reward: 2 * reward)


def broken(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """A wrapper with a bug."""
    raise ValueError("a bug in the wrapper")


def needs_more(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """A wrapper that needs a library that is not installed."""
    import no_such_library  # type: ignore[import-not-found]  # noqa: F401

    return env


def plus_ten(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Wrapper: adds 10 to each reward."""
    return gym.wrappers.TransformReward(env, lambda reward: reward + 10)


def nothing(env: gym.Env[Any, Any]) -> None:
    """Not a wrapper: returns None."""
