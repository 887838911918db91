"""Presets: tuned settings of environments and algorithms, each with the source of its numbers.

A preset maps names of settings to values that replace the defaults. Its numbers are for one rank: with more ranks the
global batch grows, the replay ratio stays, and `lr_scaling` adapts the learning rate. An environment's preset and an
algorithm's preset can be joined, as in `--preset atari,rainbow`; where both set something, the algorithm wins. An
environment's `v_min` and `v_max` bound its discounted returns, for c51.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Mnih et al. 2015, without any later extension.
PLAIN: Mapping[str, Any] = {
    "double": False,
    "dueling": False,
    "n_step": 1,
    "replay": "uniform",
    "noisy": False,
    "exploration": "linear",
    "head": "scalar",
    "munchausen": False,
    "loss": "huber",
}

# Dabney et al. 2018b, section 4; N, N', K and the embedding are those of Dopamine's iqn_icml. The loss is summed over
# N, so gradients are large and are not clipped. Adam's epsilon shrinks with the global batch, here and in rainbow, as
# in Stooke and Abbeel 2018.
IQN: Mapping[str, Any] = {
    **PLAIN,
    "head": "iqn",
    "iqn_samples": 64,
    "iqn_target_samples": 64,
    "iqn_policy_samples": 32,
    "iqn_embedding": 64,
    "max_grad_norm": 0.0,
    "optimizer_eps_scaling": "inverse",
}

# Mnih et al. 2015 with the settings of CleanRL's dqn_atari (Adam, lr 1e-4): a batch of 32 every 4 steps, 1M transitions
# of replay, epsilon falls to 0.01 within 1M steps, the target is copied every 1,000 updates.
ATARI: Mapping[str, Any] = {
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
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # A run of seconds that checks the installation, with any environment. It is not meant to learn.
    "smoke": {
        "total_env_steps": 2_000,
        "replay_capacity": 2_000,
        "learning_starts": 200,
        "exploration_env_steps": 1_000,
        "target_every": 200,
        "eval_episodes": 4,
        "checkpoint_every": 1_000,
        "log_every": 200,
    },
    # From rl-baselines3-zoo, hyperparams/dqn.yml, CartPole-v1: an update every 2 env steps; epsilon falls to 0.04
    # within 16% of 50k steps. Added for fast learning: 3-step returns, a soft target, a smaller network with layer norm
    # and Munchausen (Vieillard et al. 2020). Added for a steady policy at the end: dueling, a learning rate that falls
    # to 0, a larger gamma, and a larger epsilon of Adam, which keeps its steps small when gradients are small.
    "cartpole": {
        "env": "CartPole-v1",
        "total_env_steps": 50_000,
        "replay_capacity": 100_000,
        "learning_starts": 1_000,
        "replay_ratio": 64.0,
        "batch_per_rank": 64,
        "n_step": 3,
        "gamma": 0.995,
        "hidden": (120, 84),
        "dueling": True,
        "double": False,
        "munchausen": True,
        "layer_norm": True,
        "lr": 5e-4,
        "lr_final": 0.0,
        "optimizer_eps": 1e-4,
        "exploration_env_steps": 8_000,
        "epsilon_end": 0.04,
        "target_tau": 0.005,
        "target_every": 1_000,
        "eval_every": 10_000,
        "checkpoint_every": 10_000,
        "log_every": 1_000,
        "v_min": 0.0,
        "v_max": 200.0,
    },
    # From rl-baselines3-zoo, hyperparams/dqn.yml and qrdqn.yml, Acrobot-v1: network, replay, batch and 25 quantiles.
    # The rest is as in `cartpole`; with one-step returns and no layer norm, some seeds never leave a return of -500.
    "acrobot": {
        "env": "Acrobot-v1",
        "total_env_steps": 100_000,
        "replay_capacity": 50_000,
        "learning_starts": 1_000,
        "replay_ratio": 64.0,
        "batch_per_rank": 128,
        "n_step": 3,
        "hidden": (256, 256),
        "head": "qr",
        "quantiles": 25,
        "dueling": True,
        "layer_norm": True,
        "lr": 5e-4,
        "lr_final": 0.05,
        "exploration_env_steps": 20_000,
        "epsilon_end": 0.05,
        "target_tau": 0.01,
        "target_every": 1_000,
        "eval_every": 25_000,
        "checkpoint_every": 25_000,
        "v_min": -100.0,
        "v_max": 0.0,
    },
    # From rl-baselines3-zoo, hyperparams/dqn.yml, MountainCar-v0: gamma 0.98. The rest is as in `cartpole`, with two
    # means to explore: the ladder of epsilons (Horgan et al. 2018) and repeated random actions (Dabney et al. 2021).
    # Both papers explore less (ladder_alpha 7, epsilon_repeat 2), and so too few episodes reach the flag.
    "mountaincar": {
        "env": "MountainCar-v0",
        "total_env_steps": 120_000,
        "replay_capacity": 50_000,
        "learning_starts": 1_000,
        "replay_ratio": 64.0,
        "batch_per_rank": 64,
        "n_step": 3,
        "hidden": (120, 84),
        "layer_norm": True,
        "lr": 1e-3,
        "lr_final": 0.05,
        "gamma": 0.98,
        "exploration": "ladder",
        "ladder_alpha": 3.0,
        "epsilon_repeat": 1.5,
        "target_tau": 0.01,
        "target_every": 1_000,
        "eval_every": 30_000,
        "checkpoint_every": 30_000,
        "v_min": -50.0,
        "v_max": 0.0,
    },
    # From rl-baselines3-zoo, hyperparams/dqn.yml, LunarLander: batch 128 and the schedule of epsilon. The rest is as in
    # `cartpole`, with twice the replay ratio, 25 quantiles and repeated random actions, which raise the final return.
    "lunarlander": {
        "env": "LunarLander-v3",
        "total_env_steps": 100_000,
        "replay_capacity": 100_000,
        "learning_starts": 1_000,
        "replay_ratio": 128.0,
        "batch_per_rank": 128,
        "n_step": 3,
        "hidden": (120, 84),
        "double": False,
        "head": "qr",
        "quantiles": 25,
        "munchausen": True,
        "dueling": True,
        "layer_norm": True,
        "lr": 1e-3,
        "lr_final": 0.05,
        "exploration_env_steps": 12_000,
        "epsilon_end": 0.05,
        "epsilon_repeat": 2.0,
        "target_tau": 0.01,
        "target_every": 500,
        "eval_every": 25_000,
        "checkpoint_every": 25_000,
        "v_min": -300.0,
        "v_max": 300.0,
    },
    # Young and Tian 2019 (MinAtar), DQN: batch 32, 100k transitions of replay, a target update every 1,000 updates,
    # epsilon falls within 100k frames (to 0.1 there, to 0.01 here). Adam as in Obando-Ceron and Castro 2021. Rewards
    # are 1, and v_max puts the atoms of c51 at distances of 0.5.
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
        "v_min": 0.0,
        "v_max": 25.0,
    },
    # Seyde et al. 2023 (DecQN), appendix: bang-off-bang actions, 3-step returns, batch 256, epsilon 0.1, lr 1e-4 (here
    # 3e-4, falling), gamma 0.99, Double DQN. A soft target and layer norm keep learning steady.
    "mujoco": {
        "env": "Reacher-v5",
        "action_bins": 3,
        "total_env_steps": 500_000,
        "replay_capacity": 500_000,
        "learning_starts": 5_000,
        "replay_ratio": 64.0,
        "batch_per_rank": 256,
        "n_step": 3,
        "hidden": (256, 256),
        "layer_norm": True,
        "lr": 3e-4,
        "lr_final": 0.1,
        "exploration_env_steps": 10_000,
        "epsilon_end": 0.1,
        "target_tau": 0.01,
        "target_every": 5_000,
        "eval_every": 50_000,
        "checkpoint_every": 50_000,
    },
    "atari": ATARI,
    # A shorter `atari` with centered images (otherwise learning starts much later), 3-step returns, dueling, and a
    # learning rate that falls, which keeps the policy steady at the end.
    "pong": {
        **ATARI,
        "total_env_steps": 700_000,
        "replay_capacity": 300_000,
        "learning_starts": 10_000,
        "n_step": 3,
        "dueling": True,
        "center_images": True,
        "lr": 1.5e-4,
        "lr_final": 0.05,
        "exploration_env_steps": 100_000,
        "target_every": 2_000,
        "eval_every": 50_000,
        "checkpoint_every": 50_000,
    },
    # The workload of `hvdqn bench peers`: Stable-Baselines3's DQN (Huber loss, no Double DQN, gradients clipped to norm
    # 10) with the network, batch and learning rate of CleanRL's dqn; one update of 128 transitions every 8 env steps.
    "bench-cartpole": {
        **PLAIN,
        "env": "CartPole-v1",
        "total_env_steps": 40_000,
        "replay_capacity": 10_000,
        "learning_starts": 1_000,
        "replay_ratio": 16.0,
        "batch_per_rank": 128,
        "hidden": (120, 84),
        "lr": 2.5e-4,
        "exploration_env_steps": 4_000,
        "target_every": 500,
    },
    # The same with the Nature CNN: one update of 32 transitions every 4 env steps, as in Mnih et al. 2015.
    "bench-pong": {
        **PLAIN,
        "env": "ALE/Pong-v5",
        "total_env_steps": 6_000,
        "frame_stack": 4,
        "clip_rewards": True,
        "episodic_life": True,
        "replay_capacity": 8_000,
        "learning_starts": 800,
        "replay_ratio": 8.0,
        "batch_per_rank": 32,
        "hidden": (512,),
        "lr": 1e-4,
        "exploration_env_steps": 600,
        "target_every": 1_000,
        "checkpoint_every": 6_000,
    },
    "dqn": PLAIN,
    # van Hasselt et al. 2016 and Wang et al. 2016: gradients clipped to norm 10.
    "double-dueling": {**PLAIN, "double": True, "dueling": True, "max_grad_norm": 10.0},
    # Hessel et al. 2018, table 1: 3-step returns, priority exponent 0.5, importance 0.4 to 1, sigma_0 0.5, 51 atoms.
    "rainbow": {
        **PLAIN,
        "double": True,
        "dueling": True,
        "n_step": 3,
        "replay": "prioritized",
        "priority_alpha": 0.5,
        "priority_beta": 0.4,
        "noisy": True,
        "noisy_sigma": 0.5,
        "exploration": "noisy",
        "head": "c51",
        "atoms": 51,
        "optimizer_eps_scaling": "inverse",
    },
    "iqn": IQN,
    # Vieillard et al. 2020, table 1 and the authors' code: alpha 0.9, tau 0.03, clip -1, softmax policy for acting.
    "m-iqn": {
        **IQN,
        "munchausen": True,
        "munchausen_alpha": 0.9,
        "munchausen_temperature": 0.03,
        "munchausen_clip": -1.0,
        "exploration": "softmax",
        "temperature": 0.03,
    },
    # Clark et al. 2025 (Beyond The Rainbow), table D6. Noise and epsilon-greedy explore together. The table has no
    # exponent of importance weights, so that is `rainbow`'s.
    "btr": {
        **IQN,
        "iqn_samples": 8,
        "iqn_target_samples": 8,
        "iqn_policy_samples": 8,
        "munchausen": True,
        "munchausen_alpha": 0.9,
        "munchausen_temperature": 0.03,
        "munchausen_clip": -1.0,
        "dueling": True,
        "noisy": True,
        "noisy_sigma": 0.5,
        "n_step": 3,
        "replay": "prioritized",
        "priority_alpha": 0.2,
        "priority_beta": 0.4,
        "gamma": 0.997,
        "max_grad_norm": 10.0,
    },
}  # fmt: skip

# Presets of algorithms. Joined with an environment's preset, they win.
# Presets for all environments whose ids begin with these words and a slash.
FAMILIES: Mapping[str, str] = {"ALE": "atari", "MinAtar": "minatar"}

ALGORITHMS = ("dqn", "double-dueling", "rainbow", "iqn", "m-iqn", "btr")

# Settings of an environment and an algorithm together: the best learning rate of an algorithm depends on both.
JOINED: Mapping[tuple[str, str], Mapping[str, Any]] = {
    # Twice the batch of `minatar`, so epsilon of Adam is 0.01 / batch (rounded), and lr is larger and falls. Layer norm
    # speeds up learning. Noise as the only exploration can die out early, so epsilon-greedy stays on beside it.
    ("minatar", "rainbow"): {
        "batch_per_rank": 64,
        "lr": 5e-4,
        "lr_final": 0.1,
        "optimizer_eps": 1.5e-4,
        "layer_norm": True,
        "exploration": "linear",
    },
    # Wang et al. 2016, section 4.2.
    ("atari", "double-dueling"): {"lr": 6.25e-5},
    # Hessel et al. 2018, table 1: learning starts at 80k frames, target update every 32k frames; 4 frames are a step.
    ("atari", "rainbow"): {
        "lr": 6.25e-5,
        "optimizer_eps": 1.5e-4,
        "learning_starts": 20_000,
        "target_every": 8_000,
    },
    # Dabney et al. 2018b, section 4: lr 5e-5, epsilon 0.01 / 32. Learning start and target as in Dopamine's iqn_icml.
    ("atari", "iqn"): {
        "lr": 5e-5,
        "optimizer_eps": 3.125e-4,
        "learning_starts": 50_000,
        "target_every": 10_000,
    },
    # Vieillard et al. 2020, table 1.
    ("atari", "m-iqn"): {
        "lr": 5e-5,
        "optimizer_eps": 3.125e-4,
        "learning_starts": 20_000,
        "target_every": 8_000,
        "exploration_env_steps": 250_000,
    },
    # Clark et al. 2025, table D6: an update of 256 transitions every 64 env steps, a target update every 500 updates,
    # epsilon falls within 8M frames (it is off after 100M there), and epsilon of Adam is 0.005 / batch.
    ("atari", "btr"): {
        "envs_per_rank": 64,
        "torso": "impala",
        "torso_width": 2,
        "torso_pool": 6,
        "spectral_norm": True,
        "replay_capacity": 1_048_576,
        "learning_starts": 200_000,
        "replay_ratio": 4.0,
        "batch_per_rank": 256,
        "lr": 1e-4,
        "optimizer_eps": 1.953125e-5,
        "target_every": 32_000,
        "exploration_env_steps": 2_000_000,
        "epsilon_end": 0.01,
    },
}  # fmt: skip
