"""A chain whose optimal q-values are known: `tests.learning.chain:Chain-v0`."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

STATES, GAMMA = 6, 0.9
LURE, PRIZE = 0.05, 1.0


class Chain(gym.Env):
    """Action 1 moves right, 0 left. The right end pays 1 and ends; staying at the left end pays a little."""

    observation_space = gym.spaces.Discrete(STATES)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return self.state, {}

    def step(self, action):
        if action == 0:
            lured = self.state == 0
            self.state = max(self.state - 1, 0)
            return self.state, LURE if lured else 0.0, False, False, {}
        self.state += 1
        ended = self.state == STATES - 1
        return self.state, PRIZE if ended else 0.0, ended, False, {}


def optimal_q() -> np.ndarray:
    """`[states - 1, 2]`, by value iteration. The last state is terminal and has no value."""
    q = np.zeros((STATES, 2))
    for _ in range(500):
        v = q.max(axis=1)
        for s in range(STATES - 1):
            q[s, 0] = (LURE if s == 0 else 0.0) + GAMMA * v[max(s - 1, 0)]
            q[s, 1] = PRIZE if s + 1 == STATES - 1 else GAMMA * v[s + 1]
    return q[:-1]


def munchausen_q(alpha: float, temperature: float, clip: float) -> np.ndarray:
    """`[states - 1, 2]`: where Munchausen's backup (Vieillard et al. 2020, eq. 1) no longer changes anything."""
    q = np.zeros((STATES, 2))
    for _ in range(2000):
        log_policy = (q - q.max(axis=1, keepdims=True)) / temperature
        log_policy -= np.log(np.exp(log_policy).sum(axis=1, keepdims=True))
        v = (np.exp(log_policy) * (q - temperature * log_policy)).sum(axis=1)
        v[-1] = 0.0
        bonus = alpha * np.clip(temperature * log_policy, clip, 0.0)
        for s in range(STATES - 1):
            q[s, 0] = (LURE if s == 0 else 0.0) + GAMMA * v[max(s - 1, 0)] + bonus[s, 0]
            q[s, 1] = (PRIZE if s + 1 == STATES - 1 else 0.0) + GAMMA * v[s + 1] + bonus[s, 1]
    return q[:-1]


# 12 steps: most random walks are truncated. Treating that as an end would spoil every value.
gym.register("Chain-v0", Chain, max_episode_steps=12)
