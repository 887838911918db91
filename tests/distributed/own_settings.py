"""hvdqn.train as it should not be started: each rank with a learning rate of its own."""

from __future__ import annotations

import sys

from hvdqn.comm import launcher_rank
from hvdqn.train import main

if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--lr", f"0.00{1 + launcher_rank()}"]))
