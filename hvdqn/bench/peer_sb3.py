"""Run one workload on Stable-Baselines3 and print one line of JSON.

    python peer_sb3.py cartpole|pong|solve [--seed S] [--threads T]

`hvdqn bench peers` runs this file in a Python environment that needs Stable-Baselines3, but not hvdqn. `cartpole` and
`pong` print the speed of the whole call of `learn`. `solve` trains CartPole-v1 with the tuned settings of
rl-baselines3-zoo (hyperparams/dqn.yml) until 100 greedy episodes reach a mean of 475, and prints the seconds of
training without the evaluations.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack

EVALUATE_EVERY, EPISODES, SOLVED = 2_000, 100, 475.0


def time_learn(model: DQN, env_steps: int) -> dict[str, Any]:
    """Train for this many env steps and return the speed."""
    began = time.perf_counter()
    model.learn(env_steps)
    return {"env_steps_per_second": env_steps / (time.perf_counter() - began)}


def cartpole(seed: int) -> dict[str, Any]:
    """Time the workload of the preset bench-cartpole."""
    settings: dict[str, Any] = {
        "learning_rate": 2.5e-4,
        "buffer_size": 10_000,
        "learning_starts": 1_000,
        "batch_size": 128,
        "train_freq": 1,  # steps of all 8 environments
        "gradient_steps": 1,
        "target_update_interval": 500,
        "policy_kwargs": {"net_arch": [120, 84]},
    }
    env = make_vec_env("CartPole-v1", n_envs=8, seed=seed)
    return time_learn(DQN("MlpPolicy", env, device="cpu", seed=seed, **settings), 40_000)


def pong(seed: int) -> dict[str, Any]:
    """Time the workload of the preset bench-pong."""
    import ale_py

    gym.register_envs(ale_py)
    settings: dict[str, Any] = {
        "learning_rate": 1e-4,
        "buffer_size": 8_000,
        "learning_starts": 800,
        "batch_size": 32,
        "train_freq": 1,
        "gradient_steps": 2,
        "target_update_interval": 1_000,
    }
    env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=8, seed=seed), 4)
    return time_learn(DQN("CnnPolicy", env, device="cpu", seed=seed, **settings), 6_000)


class EvaluateUntilSolved:
    """Callback of `learn` that evaluates at intervals and ends training when CartPole is solved.

    `training_seconds` does not include the evaluations.
    """

    def __init__(self, model: DQN, seed: int) -> None:
        self.model = model
        self.envs = make_vec_env("CartPole-v1", n_envs=50, seed=seed + 1_000)
        self.training_seconds, self.mean = 0.0, 0.0
        self.resumed_at = time.perf_counter()

    def __call__(self, *_: Any) -> bool:
        """Return True if training should continue."""
        if self.model.num_timesteps % EVALUATE_EVERY:
            return True
        self.training_seconds += time.perf_counter() - self.resumed_at
        self.mean = float(evaluate_policy(self.model, self.envs, EPISODES)[0])
        self.resumed_at = time.perf_counter()
        return self.mean < SOLVED


def solve(seed: int) -> dict[str, Any]:
    """Train until CartPole is solved, for at most 50,000 env steps."""
    settings: dict[str, Any] = {
        "learning_rate": 2.3e-3,
        "batch_size": 64,
        "buffer_size": 100_000,
        "learning_starts": 1_000,
        "gamma": 0.99,
        "target_update_interval": 10,
        "train_freq": 256,
        "gradient_steps": 128,
        "exploration_fraction": 0.16,
        "exploration_final_eps": 0.04,
        "policy_kwargs": {"net_arch": [256, 256]},
    }
    model = DQN("MlpPolicy", gym.make("CartPole-v1"), device="cpu", seed=seed, **settings)
    callback = EvaluateUntilSolved(model, seed)
    model.learn(50_000, callback=callback)
    return {
        "training_seconds": callback.training_seconds,
        "env_steps": model.num_timesteps,
        "eval_return_mean": callback.mean,
        "solved": callback.mean >= SOLVED,
    }


WORKLOADS = {"cartpole": cartpole, "pong": pong, "solve": solve}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(WORKLOADS[options.workload](options.seed)))
