"""A chain whose optimum is wrong if targets ignore the masks; `tests.learning.masked_chain:MaskedChain-v0`."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

STATES, GAMMA = 5, 0.9
LEFT, RIGHT, LEAP = range(3)
COST, REWARD = -0.5, 1.0
# Walls are at both ends, and one can leap at the right end alone.
LEGAL = np.array([[s > 0, s < STATES - 1, s == STATES - 1] for s in range(STATES)])


class MaskedChain(gym.Env):
    """A step costs 0.5. Leaping, legal at the right end alone, gives a reward of 1 and terminates.

    Most states are worth less than an action that was never tried, and than a leap: a target that takes an illegal
    action for possible is wrong in each of them.
    """

    observation_space = gym.spaces.Discrete(STATES)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(STATES))
        return self.state, {"action_mask": LEGAL[self.state].astype(np.int8)}

    def step(self, action):
        assert LEGAL[self.state, action], f"illegal action {action} in state {self.state}"
        if action == LEAP:
            return self.state, REWARD, True, False, {"action_mask": np.zeros(3, np.int8)}
        self.state += 1 if action == RIGHT else -1
        return self.state, COST, False, False, {"action_mask": LEGAL[self.state].astype(np.int8)}


def optimal_q(alpha: float = 0.0, temperature: float = 0.0, clip: float = -1.0) -> np.ndarray:
    """Return the optimal Q-values `[states, actions]` by value iteration, NaN for illegal actions.

    With a temperature it is the fixed point of Munchausen's backup (Vieillard et al. 2020, eq. 1).
    """
    q = np.where(LEGAL, 0.0, -np.inf)
    for _ in range(1000):
        v, bonus = q.max(axis=1), np.zeros_like(q)
        if temperature:
            for s in range(STATES):
                legal = q[s, LEGAL[s]] / temperature
                log_policy = legal - legal.max() - np.log(np.exp(legal - legal.max()).sum())
                v[s] = (np.exp(log_policy) * (q[s, LEGAL[s]] - temperature * log_policy)).sum()
                bonus[s, LEGAL[s]] = alpha * np.clip(temperature * log_policy, clip, 0.0)
        for s in range(STATES):
            if s > 0:
                q[s, LEFT] = COST + GAMMA * v[s - 1] + bonus[s, LEFT]
            if s < STATES - 1:
                q[s, RIGHT] = COST + GAMMA * v[s + 1] + bonus[s, RIGHT]
        q[-1, LEAP] = REWARD + bonus[-1, LEAP]
    return np.where(LEGAL, q, np.nan)


# Most random walks are truncated. The mask of their last observation counts, not that of the next episode's first.
gym.register("MaskedChain-v0", MaskedChain, max_episode_steps=5)
