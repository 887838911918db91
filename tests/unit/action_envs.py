"""Environments whose actions have several dimensions, with known best actions."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

DIMENSIONS, CHOICES = 6, 5


class Additive(gym.Env[np.ndarray, np.ndarray]):
    """Each dimension has a best action of its own in each of a few states; the reward is the share of best ones.

    Args:
        action_space: MultiDiscrete, MultiBinary or Box.
        masked: forbid action 0 of each dimension, which then is never the best one.
    """

    STATES, LENGTH = 4, 10

    def __init__(self, action_space: spaces.Space[Any], masked: bool = False) -> None:
        self.action_space, self.masked = action_space, masked
        self.observation_space = spaces.Discrete(self.STATES)
        rng = np.random.default_rng(5)
        if isinstance(action_space, spaces.Box):
            bounds = np.stack([action_space.low.ravel(), action_space.high.ravel()])
            picks = rng.integers(2, size=(self.STATES, bounds.shape[1]))
            self.best = np.take_along_axis(bounds, picks, axis=0)
        else:
            self.sizes = np.asarray(getattr(action_space, "nvec", np.full(action_space.shape, 2))).ravel()
            first = np.asarray(getattr(action_space, "start", 0)).ravel()
            self.best = first + rng.integers(int(masked), self.sizes, size=(self.STATES, len(self.sizes)))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self._observe()

    def step(self, action: np.ndarray) -> Any:
        assert self.action_space.contains(action), action
        chosen = np.asarray(action).ravel()
        if self.masked and (chosen == 0).any():
            raise RuntimeError(f"illegal action {action}")
        reward = float((chosen == self.best[self.state]).mean())
        self.time += 1
        observation, info = self._observe()
        return observation, reward, False, self.time == self.LENGTH, info

    def _observe(self) -> tuple[int, dict[str, Any]]:
        self.state = int(self.np_random.integers(self.STATES))
        if not self.masked:
            return self.state, {}
        return self.state, {"action_mask": tuple(np.arange(size) > 0 for size in self.sizes)}


EVEN = spaces.MultiDiscrete([CHOICES] * DIMENSIONS)
UNEVEN = spaces.MultiDiscrete([3, 5, 2, 4])
BOX = spaces.Box(np.array([[-1, 0, -2]], np.float32), np.array([[1, 3, 2]], np.float32))
for _name, _space, _masked in (
    ("Even", EVEN, False),
    ("Uneven", UNEVEN, False),
    ("Masked", UNEVEN, True),
    ("Matrix", spaces.MultiDiscrete([[2, 3], [3, 2]], start=[[1, 0], [5, 0]]), False),
    ("Binary", spaces.MultiBinary(4), False),
    ("Box", BOX, False),
    ("Unbounded", spaces.Box(-np.inf, np.inf, (2,)), False),
):
    gym.register(f"Additive{_name}-v0", Additive, kwargs={"action_space": _space, "masked": _masked})
