"""A chain of states with known optimal q-values, registered as `tests.learning.chain:Chain-v0`."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

STATES, GAMMA = 6, 0.9
LEFT_REWARD, RIGHT_REWARD = 0.05, 1.0


class Chain(gym.Env):
    """Action 1 moves right, action 0 left.

    Reaching the right end gives a reward of 1 and terminates. Staying at the left end gives a small reward.
    """

    observation_space = gym.spaces.Discrete(STATES)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return self.state, {}

    def step(self, action):
        if action == 0:
            reward = LEFT_REWARD if self.state == 0 else 0.0
            self.state = max(self.state - 1, 0)
            return self.state, reward, False, False, {}
        self.state += 1
        terminated = self.state == STATES - 1
        return self.state, RIGHT_REWARD if terminated else 0.0, terminated, False, {}


def optimal_q() -> np.ndarray:
    """Return the optimal q-values `[states - 1, actions]`, by value iteration. The last state is terminal."""
    q = np.zeros((STATES, 2))
    for _ in range(500):
        v = q.max(axis=1)
        for s in range(STATES - 1):
            q[s, 0] = (LEFT_REWARD if s == 0 else 0.0) + GAMMA * v[max(s - 1, 0)]
            q[s, 1] = RIGHT_REWARD if s + 1 == STATES - 1 else GAMMA * v[s + 1]
    return q[:-1]


def munchausen_q(alpha: float, temperature: float, clip: float) -> np.ndarray:
    """Return the fixed point of Munchausen's backup (Vieillard et al. 2020, eq. 1), `[states - 1, actions]`."""
    q = np.zeros((STATES, 2))
    for _ in range(2000):
        log_policy = (q - q.max(axis=1, keepdims=True)) / temperature
        log_policy -= np.log(np.exp(log_policy).sum(axis=1, keepdims=True))
        v = (np.exp(log_policy) * (q - temperature * log_policy)).sum(axis=1)
        v[-1] = 0.0
        bonus = alpha * np.clip(temperature * log_policy, clip, 0.0)
        for s in range(STATES - 1):
            q[s, 0] = (LEFT_REWARD if s == 0 else 0.0) + GAMMA * v[max(s - 1, 0)] + bonus[s, 0]
            q[s, 1] = (RIGHT_REWARD if s + 1 == STATES - 1 else 0.0) + GAMMA * v[s + 1] + bonus[s, 1]
    return q[:-1]


# Within 12 steps most random walks are truncated. Treating a truncation as a termination would change every value.
gym.register("Chain-v0", Chain, max_episode_steps=12)
