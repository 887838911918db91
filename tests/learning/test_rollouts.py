"""Learning from rollouts without replay finds the known q-values of a chain, and solves CartPole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hvdqn.train import main
from tests.learning.chain import optimal_q
from tests.learning.test_chain import learned_q

pytestmark = pytest.mark.learning


@pytest.mark.parametrize("head", ["scalar", "c51 --v-min 0 --v-max 1 --atoms 21"], ids=["scalar", "c51"])
def test_one_step_returns_learn_the_optimal_q(head: str, tmp_path: Path) -> None:
    """Lambda is 0: longer returns would also hold the rewards of random actions."""
    flags = f"--replay none --td-lambda 0 --rollout-steps 16 --epochs 4 --minibatches 2 --head {head}"
    assert np.abs(learned_q(tmp_path, flags, 20_000) - optimal_q()).max() < 0.05


def test_pqn_solves_cartpole(tmp_path: Path) -> None:
    flags = "--preset cartpole,pqn --total-env-steps 200000 --stop-at-return 475 --checkpoint-every 0"
    assert main([*flags.split(), "--run-dir", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["eval_return_mean"] >= 475
