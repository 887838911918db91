"""Training learns the known q-values of a chain, with every head and every part of Rainbow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hvdqn.config import Config
from hvdqn.envs import make_environments
from hvdqn.evaluate import find_checkpoint, load_network
from hvdqn.train import main
from tests.learning.chain import GAMMA, STATES, munchausen_q, optimal_q

pytestmark = pytest.mark.learning

C51 = "--head c51 --v-min 0 --v-max 1 --atoms 21"
# A Gaussian around the largest return must not be cut off at the last bin, or its mean is too small.
HL_GAUSS = "--head hl-gauss --v-min -0.5 --v-max 1.5 --atoms 41"
IQN = "--head iqn --iqn-samples 8 --iqn-target-samples 8 --iqn-embedding 16"


def learned_q(run_dir: Path, flags: str, env_steps: int) -> np.ndarray:
    """Train; return the q-values of the last checkpoint, `[states - 1, actions]`, without the terminal state."""
    argv = f"""--env tests.learning.chain:Chain-v0 --gamma {GAMMA} --total-env-steps {env_steps} --replay-capacity 20000
        --learning-starts 500 --replay-ratio 8 --batch-per-rank 64 --hidden 64 --lr 2e-3 --epsilon-end 0.5
        --exploration-env-steps 2000 --target-every 200 --eval-episodes 4 --run-dir {run_dir}"""
    assert main([*argv.split(), *flags.split()]) == 0
    checkpoint = find_checkpoint(run_dir)
    config = Config().replace(**checkpoint.manifest["config"])
    envs = make_environments(config.environment, 1, 0, training=False)
    network = load_network(checkpoint, config, envs).eval()
    with torch.inference_mode():
        q: np.ndarray = network.q_values(torch.eye(STATES)[:-1]).numpy()
    return q


@pytest.mark.parametrize(
    "flags",
    ["--no-double --loss mse", "--double --loss huber", "--double --target-tau 0.02"],
    ids=["dqn-mse", "double-huber", "double-tau"],
)
def test_dqn_learns_the_optimal_q(flags, tmp_path):
    assert np.abs(learned_q(tmp_path, flags, 20_000) - optimal_q()).max() < 0.05


@pytest.mark.parametrize(
    "flags",
    [
        C51,
        HL_GAUSS,
        "--head qr --quantiles 11",
        IQN,
        "--dueling --replay prioritized --layer-norm",
        # N-step returns are off-policy, so n > 1 would also learn the values of the random actions in between.
        f"--preset rainbow --n-step 1 --exploration linear --hidden 64 64 {C51}",
    ],
    ids=["c51", "hl-gauss", "qr", "iqn", "dueling-prioritized", "rainbow"],
)
def test_every_head_learns_the_optimal_q(flags, tmp_path):
    assert np.abs(learned_q(tmp_path, flags, 10_000) - optimal_q()).max() < 0.05


@pytest.mark.parametrize(
    "flags",
    ["--exploration softmax", "--head qr --quantiles 11", IQN, HL_GAUSS],
    ids=["m-dqn", "m-qr", "m-iqn", "m-hl-gauss"],
)
def test_munchausen_learns_its_fixed_point(flags, tmp_path):
    q = learned_q(tmp_path, f"--munchausen --no-double {flags}", 10_000)
    assert np.abs(q - munchausen_q(alpha=0.9, temperature=0.03, clip=-1.0)).max() < 0.1
    assert (q.argmax(axis=1) == 1).all()


def test_n_step_and_an_epsilon_ladder_learn_the_optimal_policy(tmp_path):
    flags = f"--preset rainbow --exploration ladder --hidden 64 64 {C51}"
    assert (learned_q(tmp_path, flags, 10_000).argmax(axis=1) == 1).all()
