"""Job-shop scheduling of the package JSSEnv as an environment of today's Gymnasium: `reset` takes a seed.

It registers `tests.learning.job_shop:JobShop-v0`. Observations are Dicts with an `action_mask`: which jobs can be
allocated now, and whether waiting is allowed. JSSEnv (MIT license) needs pandas and plotly.
"""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import JSSEnv
import numpy as np
from JSSEnv.envs import JssEnv

INSTANCES = Path(JSSEnv.__file__).parent / "envs" / "instances"


class JobShop(gym.Env):
    """One instance of Taillard's benchmark, by default ta01: 15 jobs on 15 machines.

    The reward is the share of time that machines work less the share that they idle, so that its sum falls with the
    makespan.
    """

    def __init__(self, instance: str = "ta01"):
        self.inner = JssEnv({"instance_path": str(INSTANCES / instance)})
        self.action_space, space = self.inner.action_space, self.inner.observation_space
        numbers = gym.spaces.Box(0.0, 1.0, space["real_obs"].shape, np.float32)
        self.observation_space = gym.spaces.Dict(action_mask=space["action_mask"], real_obs=numbers)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.inner.reset(), {}

    def step(self, action):
        if not self.inner.legal_actions[action]:
            raise RuntimeError(f"illegal action {action}")
        return self.inner.step(int(action))


gym.register("JobShop-v0", JobShop)
