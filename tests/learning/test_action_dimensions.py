"""Training finds the best action of six dimensions at once, among 5 ** 6 = 15,625."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvdqn.train import main

pytestmark = pytest.mark.learning

ROLLOUTS = "--replay none --td-lambda 0 --rollout-steps 16 --epochs 4 --minibatches 2"


@pytest.mark.parametrize(
    "flags",
    ["", "--head qr --quantiles 11 --dueling", ROLLOUTS],
    ids=["scalar", "qr-dueling", "rollouts"],
)
def test_six_dimensions_of_five_actions(flags: str, tmp_path: Path) -> None:
    argv = f"""--env tests.unit.action_envs:AdditiveEven-v0 --gamma 0.9 --total-env-steps 20000 --replay-capacity 20000
        --learning-starts 500 --replay-ratio 8 --batch-per-rank 64 --hidden 64 --lr 2e-3 --epsilon-end 0.1
        --exploration-env-steps 5000 --target-every 200 --eval-episodes 20 --run-dir {tmp_path} {flags}"""
    assert main(argv.split()) == 0
    # Each of the 10 steps of an episode earns 1 if all six dimensions are right.
    assert json.loads((tmp_path / "summary.json").read_text())["eval_return_mean"] == pytest.approx(10.0)
