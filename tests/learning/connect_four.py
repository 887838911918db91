"""Connect Four of the package PettingZoo against an opponent that plays at random.

It registers `tests.learning.connect_four:ConnectFour-v0`. Observations are PettingZoo's: a Dict with the board, own
pieces first, and the `action_mask` of the columns that are not full.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from pettingzoo.classic import connect_four_v3

PLAYERS = ("player_0", "player_1")


class ConnectFour(gym.Env):
    """The agent moves first in half of the games. The reward is 1 for a game won, -1 for one lost, else 0."""

    def __init__(self) -> None:
        self.game = connect_four_v3.raw_env()
        self.observation_space = self.game.observation_space(PLAYERS[0])
        self.action_space = self.game.action_space(PLAYERS[0])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.game.reset()
        self.agent, self.opponent = self.np_random.permutation(PLAYERS)
        if self.opponent == PLAYERS[0]:
            self.move_at_random()
        return self.game.observe(self.agent), {}

    def step(self, action):
        if not self.game.observe(self.agent)["action_mask"][action]:
            raise RuntimeError(f"column {action} is full")
        self.game.step(action)
        if not self.game.terminations[self.agent]:
            self.move_at_random()
        over, reward = self.game.terminations[self.agent], self.game.rewards[self.agent]
        return self.game.observe(self.agent), float(reward), over, False, {}

    def move_at_random(self) -> None:
        legal = np.flatnonzero(self.game.observe(self.opponent)["action_mask"])
        self.game.step(int(self.np_random.choice(legal)))


gym.register("ConnectFour-v0", ConnectFour)
