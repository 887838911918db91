"""Q-learning reaches the known optimum of a chain."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hvdqn.config import Config
from hvdqn.envs import make_environments
from hvdqn.evaluate import find_checkpoint, load_network
from hvdqn.train import main
from tests.learning.chain import GAMMA, STATES, optimal_q

pytestmark = pytest.mark.learning


@pytest.mark.parametrize(
    "flags",
    [["--no-double", "--loss", "mse"], ["--double", "--loss", "huber"], ["--double", "--target-tau", "0.02"]],
    ids=["dqn-mse", "double-huber", "double-tau"],
)
def test_chain_reaches_its_optimal_q(flags, tmp_path):
    argv = f"""--env tests.learning.chain:Chain-v0 --gamma {GAMMA} --total-env-steps 20000 --replay-capacity 20000
        --learning-starts 500 --replay-ratio 8 --batch-per-rank 64 --hidden 64 --lr 2e-3 --epsilon-end 0.5
        --exploration-env-steps 2000 --target-every 200 --eval-episodes 4 --run-dir {tmp_path}"""
    assert main([*argv.split(), *flags]) == 0
    checkpoint = find_checkpoint(tmp_path)
    config = Config().replace(**checkpoint.manifest["config"])
    envs = make_environments(config.environment, 1, 0, training=False)
    network = load_network(checkpoint, config, envs)
    with torch.inference_mode():
        q = network.q_values(torch.eye(STATES)[:-1]).numpy()
    assert np.abs(q - optimal_q()).max() < 0.05
