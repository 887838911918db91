"""Tuned configurations by family, each with the source of its numbers.

A preset is a mapping from flag names to values that replace defaults. They are written for one rank:
with more ranks the global batch grows, the replay ratio stays, and `lr_scaling` adapts the learning rate.
Those named for an environment say how it is played; those named for an algorithm which parts it has, and join
the former: `--preset atari,rainbow`, where the algorithm's parts hold. `v_min` and `v_max` bound an environment's
discounted returns, for c51.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Mnih et al. 2015: none of the later parts.
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

# Dabney et al. 2018b, section 4; N, N', K and the embedding as in Dopamine's iqn_icml. Gradients are sums over N, and
# not clipped. Adam's epsilon follows the global batch, here and in rainbow, as in Stooke and Abbeel 2018.
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

# Mnih et al. 2015 in CleanRL's dqn_atari setting (Adam, lr 1e-4): batch 32 every 4 steps, replay 1M,
# epsilon to 0.01 within 1M steps, target every 1,000 updates.
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
    # Seconds, to see that everything is in place, of any environment. It is not meant to learn.
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
    # rl-baselines3-zoo, hyperparams/dqn.yml, CartPole-v1: an update every 2 env steps, epsilon to 0.04 within 16% of
    # 50k steps. Ours: 3-step returns, a target that follows, a smaller network with layer norm (without it, it takes
    # three times as long), Munchausen (Vieillard et al. 2020), with which two ranks were there within 10k env steps on
    # each of five seeds, and, so that the policy stays steady once it is there, dueling, a learning rate that falls, an
    # epsilon that keeps Adam's steps small where gradients are, and a larger gamma.
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
    # rl-baselines3-zoo, hyperparams/dqn.yml and qrdqn.yml, Acrobot-v1: the network, replay, batch; 25 quantiles, with
    # which it plays better by 7 than with a scalar head. Else as `cartpole`: one-step returns without layer norm stay
    # at -500 with some seeds.
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
    # rl-baselines3-zoo, hyperparams/dqn.yml, MountainCar-v0: gamma 0.98. Else as `cartpole`, but for the ladder of
    # epsilons (Horgan et al. 2018) and random actions that are repeated (Dabney et al. 2021). Of episodes that explore
    # so around one constant action, 2.5% reach the flag in a simulation; 0.6% with mu = 2 and a ladder of alpha = 7,
    # where one seed in five had hardly learned by the end.
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
    # rl-baselines3-zoo, hyperparams/dqn.yml, LunarLander: batch 128, epsilon's schedule. Else as `cartpole`, with twice
    # the replay ratio, and with 25 quantiles, Munchausen (Vieillard et al. 2020) and repeated random actions: 236, not
    # 170 as without the three.
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
    # Young and Tian 2019 (MinAtar), DQN: batch 32, replay 100k, target every 1,000 frames, epsilon within 100k frames
    # to 0.1, here to 0.01; Adam as in Obando-Ceron and Castro 2021. v_max puts c51's atoms 0.5 apart: rewards are 1.
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
    "atari": ATARI,
    # As `atari`, less of it, with images that are centered (without, nothing was learned within 250k env steps), 3-step
    # returns, dueling and a learning rate that falls: while it did not, the policy went to and fro between 5 and 16.
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
    # What `hvdqn bench peers` times: Stable-Baselines3's DQN (Huber, no Double DQN, clipping at 10) with the network,
    # batch and learning rate of CleanRL's dqn, one update of 128 transitions every 8 env steps.
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
    # Vieillard et al. 2020, table 1 and the authors' code: alpha 0.9, tau 0.03, clip -1, and it acts by the softmax.
    "m-iqn": {
        **IQN,
        "munchausen": True,
        "munchausen_alpha": 0.9,
        "munchausen_temperature": 0.03,
        "munchausen_clip": -1.0,
        "exploration": "softmax",
        "temperature": 0.03,
    },
}  # fmt: skip

# Whose parts hold over an environment's.
ALGORITHMS = ("dqn", "double-dueling", "rainbow", "iqn", "m-iqn")

# What holds where both are named: an algorithm's learning rate is another on every family.
JOINED: Mapping[tuple[str, str], Mapping[str, Any]] = {
    # Twice the batch of `minatar`, hence epsilon 0.01 / batch, rounded, and a larger lr, which falls. One seed each,
    # with noise as the only exploration: Asterix came to 11 after 400k frames with layer norm, to 3 without; on
    # Seaquest, whose image was then read along the wrong axes, the noise died out before anything was found, so a few
    # random actions stay beside it.
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
    # Hessel et al. 2018, table 1: in frames, learning starts at 80k, target every 32k.
    ("atari", "rainbow"): {
        "lr": 6.25e-5,
        "optimizer_eps": 1.5e-4,
        "learning_starts": 20_000,
        "target_every": 8_000,
    },
    # Dabney et al. 2018b, section 4: lr 5e-5, epsilon 0.01 / 32; learning start and target as in Dopamine's iqn_icml.
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
}  # fmt: skip
