"""Train CartPole with SBX, the JAX version of Stable-Baselines3, and print one line of JSON.

    python peer_sbx.py cartpole|cartpole-64 [--seed S]

`hvdqn bench peers` runs this file in a Python environment that needs SBX (`pip install sbx-rl`), but not hvdqn. It
prints the speed of a whole call of `learn`, after a first call that compiles. `cartpole-64` has 64 environments and 8
updates for each step of all of them, which JAX compiles into one call.
"""

from __future__ import annotations

import argparse
import json
import time

from sbx import DQN
from stable_baselines3.common.env_util import make_vec_env

# Environments, and updates for each step of all of them.
WORKLOADS = {"cartpole": (8, 1), "cartpole-64": (64, 8)}
COMPILE_ENV_STEPS, ENV_STEPS = 4_000, 40_000


def env_steps_per_second(workload: str, seed: int) -> float:
    """Return the speed of a whole call of `learn` with the settings of the preset bench-cartpole."""
    envs, updates = WORKLOADS[workload]
    model = DQN(
        "MlpPolicy",
        make_vec_env("CartPole-v1", n_envs=envs, seed=seed),
        learning_rate=2.5e-4,
        buffer_size=10_000,
        learning_starts=1_000,
        batch_size=128,
        train_freq=1,
        gradient_steps=updates,
        target_update_interval=500,
        policy_kwargs={"net_arch": [120, 84]},
        seed=seed,
    )
    model.learn(COMPILE_ENV_STEPS)
    began = time.perf_counter()
    model.learn(ENV_STEPS)
    return ENV_STEPS / (time.perf_counter() - began)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps({"env_steps_per_second": env_steps_per_second(options.workload, options.seed)}))
