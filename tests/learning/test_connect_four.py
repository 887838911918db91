"""Training learns a board game with illegal actions that this project did not write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvdqn.train import main

pytestmark = pytest.mark.learning


def test_connect_four_against_a_random_player(tmp_path: Path) -> None:
    argv = f"""--env tests.learning.connect_four:ConnectFour-v0 --gamma 0.97 --total-env-steps 15000
        --replay-capacity 15000 --learning-starts 1000 --replay-ratio 8 --batch-per-rank 64 --hidden 128 --lr 5e-4
        --exploration-env-steps 8000 --target-every 1000 --eval-episodes 100 --run-dir {tmp_path}"""
    assert main(argv.split()) == 0
    # Random play has a mean of -0.03 and a standard deviation of 1 (1,000 games).
    assert json.loads((tmp_path / "summary.json").read_text())["eval_return_mean"] > 0.3
