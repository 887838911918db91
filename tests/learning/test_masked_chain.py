"""Training learns the exact q-values of a chain in which most actions are illegal, with every head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hvdqn.config import Config
from hvdqn.envs import make_environments
from hvdqn.evaluate import find_checkpoint, load_network
from hvdqn.train import main
from tests.learning.masked_chain import GAMMA, LEGAL, STATES, optimal_q

pytestmark = pytest.mark.learning

IQN = "--head iqn --iqn-samples 8 --iqn-target-samples 8 --iqn-embedding 16"
FLAGS = {
    "dqn": "--no-double",
    "double": "--double --dueling",
    "c51": "--head c51 --v-min -3 --v-max 1 --atoms 41",
    "qr": "--head qr --quantiles 11 --no-double",
    "iqn": IQN,
    "munchausen": "--munchausen --no-double --munchausen-temperature 0.1",
    # Two steps bootstrap from states that are worth less than an action that was never tried.
    "n-step": "--n-step 2 --replay prioritized --epsilon-start 0.0 --epsilon-end 0.0",
}


@pytest.mark.parametrize("name", FLAGS)
def test_targets_take_legal_actions_alone(name: str, tmp_path: Path) -> None:
    argv = f"""--env tests.learning.masked_chain:MaskedChain-v0 --gamma {GAMMA} --total-env-steps 12000
        --replay-capacity 5000 --learning-starts 500 --replay-ratio 8 --batch-per-rank 64 --hidden 64 --lr 3e-3
        --lr-final 0 --epsilon-end 1.0 --target-every 200 --eval-episodes 4 --run-dir {tmp_path}"""
    assert main([*argv.split(), *FLAGS[name].split()]) == 0
    checkpoint = find_checkpoint(tmp_path)
    config = Config().replace(**checkpoint.manifest["config"])
    envs = make_environments(config.environment, 1, 0, training=False)
    network = load_network(checkpoint, config, envs).eval()
    with torch.inference_mode():
        q = network.q_values(torch.eye(STATES)).numpy()
    expected = optimal_q(0.9, 0.1, -1.0) if name == "munchausen" else optimal_q()
    if name == "n-step":  # learns from its own steps, which never go left
        best = np.nanargmax(expected, axis=1)
        assert (np.where(LEGAL, q, -np.inf).argmax(axis=1) == best).all()
        q, expected = q[range(STATES), best], expected[range(STATES), best]
        legal = np.ones(STATES, bool)
    else:
        legal = LEGAL
    assert np.abs(q - expected)[legal].max() < 0.01
