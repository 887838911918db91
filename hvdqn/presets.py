"""Tuned configurations by family, each with the source of its numbers.

A preset is a mapping from flag names to values that replace defaults. They are written for one rank:
with more ranks the global batch grows, the replay ratio stays, and `lr_scaling` adapts the learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Seconds, to see that everything is in place. It is not meant to learn.
    "smoke": {
        "env": "CartPole-v1",
        "total_env_steps": 2_000,
        "replay_capacity": 2_000,
        "learning_starts": 200,
        "exploration_env_steps": 1_000,
        "target_every": 200,
        "eval_episodes": 4,
        "checkpoint_every": 1_000,
        "log_every": 200,
    },
    # rl-baselines3-zoo, hyperparams/dqn.yml, CartPole-v1: an update every 2 env steps, gamma 0.99, epsilon to 0.04
    # within 16% of 50k steps. Ours: batch 128, 3-step returns, a target that follows, a smaller network, and a
    # learning rate that falls, so that the final policy is steady.
    "cartpole": {
        "env": "CartPole-v1",
        "total_env_steps": 50_000,
        "replay_capacity": 100_000,
        "learning_starts": 1_000,
        "replay_ratio": 64.0,
        "batch_per_rank": 128,
        "n_step": 3,
        "hidden": (120, 84),
        "lr": 1e-3,
        "lr_final": 0.05,
        "exploration_env_steps": 8_000,
        "epsilon_end": 0.04,
        "target_tau": 0.01,
        "target_every": 1_000,
        "eval_every": 10_000,
        "checkpoint_every": 10_000,
        "log_every": 1_000,
    },
    # rl-baselines3-zoo, hyperparams/dqn.yml, Acrobot-v1.
    "acrobot": {
        "env": "Acrobot-v1",
        "total_env_steps": 100_000,
        "replay_capacity": 50_000,
        "learning_starts": 1_000,
        "replay_ratio": 32.0,
        "batch_per_rank": 128,
        "hidden": (256, 256),
        "lr": 6.3e-4,
        "exploration_env_steps": 12_000,
        "epsilon_end": 0.1,
        "target_every": 1_000,
        "eval_every": 25_000,
        "checkpoint_every": 25_000,
    },
    # rl-baselines3-zoo, hyperparams/dqn.yml, MountainCar-v0: gamma 0.98, target every 600 steps.
    "mountaincar": {
        "env": "MountainCar-v0",
        "total_env_steps": 120_000,
        "replay_capacity": 50_000,
        "learning_starts": 1_000,
        "replay_ratio": 64.0,
        "batch_per_rank": 128,
        "hidden": (256, 256),
        "lr": 1e-3,
        "gamma": 0.98,
        "exploration_env_steps": 24_000,
        "epsilon_end": 0.07,
        "target_every": 600,
        "eval_every": 30_000,
        "checkpoint_every": 30_000,
    },
    # rl-baselines3-zoo, hyperparams/dqn.yml, LunarLander: lr 6.3e-4, batch 128, target every 250 steps.
    "lunarlander": {
        "env": "LunarLander-v3",
        "total_env_steps": 100_000,
        "replay_capacity": 100_000,
        "learning_starts": 1_000,
        "replay_ratio": 64.0,
        "batch_per_rank": 128,
        "hidden": (256, 256),
        "lr": 6.3e-4,
        "exploration_env_steps": 12_000,
        "epsilon_end": 0.05,
        "target_every": 500,
        "eval_every": 25_000,
        "checkpoint_every": 25_000,
    },
    # Young and Tian 2019 (MinAtar), DQN: batch 32, replay 100k, target every 1,000 frames, epsilon to 0.1 within
    # 100k frames; Adam as in Obando-Ceron and Castro 2021.
    "minatar": {
        "env": "MinAtar/Breakout-v1",
        "total_env_steps": 2_000_000,
        "replay_capacity": 100_000,
        "learning_starts": 5_000,
        "replay_ratio": 8.0,
        "batch_per_rank": 32,
        "hidden": (128,),
        "lr": 2.5e-4,
        "optimizer_eps": 3.125e-4,
        "exploration_env_steps": 100_000,
        "epsilon_end": 0.01,
        "target_every": 4_000,
        "eval_every": 200_000,
        "checkpoint_every": 200_000,
        "log_every": 10_000,
    },
    # Mnih et al. 2015 in CleanRL's dqn_atari setting (Adam, lr 1e-4): batch 32 every 4 steps, replay 1M,
    # epsilon to 0.01 within 1M steps, target every 1,000 updates.
    "atari": {
        "env": "ALE/Pong-v5",
        "total_env_steps": 10_000_000,
        "frame_stack": 4,
        "clip_rewards": True,
        "episodic_life": True,
        "replay_capacity": 1_000_000,
        "learning_starts": 80_000,
        "replay_ratio": 8.0,
        "batch_per_rank": 32,
        "hidden": (512,),
        "lr": 1e-4,
        "exploration_env_steps": 1_000_000,
        "epsilon_end": 0.01,
        "target_every": 4_000,
        "eval_every": 1_000_000,
        "eval_episodes": 10,
        "checkpoint_every": 500_000,
        "log_every": 10_000,
    },
}  # fmt: skip
