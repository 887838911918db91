"""Train as `python -m hvdqn.train` does. At the end each rank prints its host, its secrets and a parameter hash."""

from __future__ import annotations

import os
import socket
import sys

from hvdqn.train import main
from hvdqn.trainer import Trainer

_close = Trainer.close


def _report_and_close(trainer: Trainer) -> None:
    secrets = sorted(name for name in os.environ if "TOKEN" in name or "KEY" in name)
    # One write, because the ranks share the output.
    sys.stdout.write(
        f"rank {trainer.comm.rank} on {socket.gethostname()} has {','.join(secrets) or 'no secret'}, "
        f"parameters {trainer.learner.sha256()}\n"
    )
    sys.stdout.flush()
    _close(trainer)


Trainer.close = _report_and_close  # type: ignore[method-assign]
sys.exit(main())
