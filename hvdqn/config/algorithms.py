"""Presets of algorithms, and what they set together with an environment's; see `hvdqn.config.presets`."""

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

# Gallici et al. 2025, with the settings of the authors' code for Atari: rollouts of 32 steps, 2 epochs, lambda 0.65,
# minibatches of 128, RAdam with lr 2.5e-4, layer norm, squared errors, gradients clipped to norm 10. They have 128
# environments, here only the presets for images do.
PQN: Mapping[str, Any] = {
    **PLAIN,
    "replay": "none",
    "envs_per_rank": 32,
    "rollout_steps": 32,
    "td_lambda": 0.65,
    "epochs": 2,
    "minibatches": 8,
    "layer_norm": True,
    "loss": "mse",
    "optimizer": "radam",
    "optimizer_eps": 1e-8,
    "lr": 2.5e-4,
    "max_grad_norm": 10.0,
    "target_tau": 1.0,
}

# Presets of algorithms. Joined with an environment's preset, they win.
ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
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
    "pqn": PQN,
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
    # The authors' settings for CartPole: 64 steps, 4 epochs, lambda 0.95, epsilon falls to 0.2. They scale rewards by
    # 0.1, have 16 minibatches and take 500k env steps; Huber's loss, smaller minibatches and a larger learning rate
    # shorten this.
    ("cartpole", "pqn"): {
        "total_env_steps": 200_000,
        "gamma": 0.99,
        "rollout_steps": 64,
        "td_lambda": 0.95,
        "epochs": 4,
        "minibatches": 32,
        "loss": "huber",
        "lr": 1e-3,
        "exploration_env_steps": 60_000,
        "epsilon_end": 0.2,
        "target_every": 10_000,
        "eval_every": 20_000,
        "checkpoint_every": 50_000,
        "log_every": 10_000,
    },
    # The authors' settings for MinAtar: 128 environments, a larger learning rate that falls, and more exploration.
    ("minatar", "pqn"): {
        "total_env_steps": 10_000_000,
        "envs_per_rank": 128,
        "minibatches": 32,
        "lr": 5e-4,
        "lr_final": 0.0,
        "exploration_env_steps": 1_000_000,
        "epsilon_end": 0.05,
    },
    # The authors' settings for 10M env steps of Atari: 128 environments, and epsilon falls to 0.001.
    ("atari", "pqn"): {"envs_per_rank": 128, "minibatches": 32, "epsilon_end": 0.001},
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
