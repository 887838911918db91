"""Environments whose legal actions follow from the observation, and which raise on an illegal action."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

ACTIONS = 11  # more than one byte of bits


def mask_of(observation: np.ndarray, actions: int = ACTIONS) -> np.ndarray:
    """Return the legal actions of observations `[..., 2]`: booleans `[..., actions]`, at least one of them True."""
    numbers = np.asarray(observation, np.int64)
    place = np.arange(actions)
    bits = (numbers[..., :1] * 7919 + numbers[..., 1:] * 104_729 + place * 31_337) % 5 < 2
    return bits | (place == numbers[..., :1] % actions)


class Strict(gym.Env[Any, int]):
    """Episodes of random length that terminate or are truncated. The observation is [random number, step].

    Args:
        source: where the mask is found: "info", "method" or "observation".
        terminal: give a mask at the end of an episode too: "mask", "zeros" or "nothing".
        fault: breaks a rule about masks.
    """

    def __init__(self, source: str = "info", terminal: str = "mask", fault: str = "") -> None:
        self.source, self.terminal, self.fault = source, terminal, fault
        self.action_space = spaces.Discrete(ACTIONS)
        box = spaces.Box(0, 1e6, (2,), np.float32)
        mask = spaces.Box(0, 1, (ACTIONS,), np.int8)
        self.observation_space = (
            spaces.Dict({"action_mask": mask, "seen": box}) if source == "observation" else box
        )
        if source == "method":
            self.action_masks = lambda: self._mask().astype(bool)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.time, self.over = 0, False
        self._draw()
        return self._observe()

    def step(self, action: int) -> Any:
        if not mask_of(self.observation)[action]:
            raise RuntimeError(f"illegal action {action} at {self.observation}")
        self.time += 1
        self._draw()
        end = int(self.np_random.integers(12))
        terminated, truncated = end == 0, end == 1
        self.over = terminated
        observation, info = self._observe()
        return observation, float(self.observation[0]) / 1000, terminated, truncated, info

    def _draw(self) -> None:
        self.observation = np.array([self.np_random.integers(1000), self.time], np.float32)

    def _mask(self) -> Any:
        mask = mask_of(self.observation).astype(np.int8)
        if (self.over and self.terminal == "zeros") or (self.fault == "empty" and self.time == 3):
            mask[:] = 0
        if self.fault == "shape":
            return mask[:-1]
        if self.fault == "dtype":
            return mask + 0.5
        return mask.tolist() if self.fault == "list" else mask

    def _observe(self) -> Any:
        if self.source == "observation":
            return {"action_mask": self._mask(), "seen": self.observation}, {}
        lacks = (self.over and self.terminal == "nothing") or (self.fault == "sometimes" and self.time == 3)
        lacks = lacks or (self.fault == "late" and self.time == 0) or self.source == "method"
        return self.observation, {} if lacks else {"action_mask": self._mask()}


gym.register("Strict-v0", Strict)
