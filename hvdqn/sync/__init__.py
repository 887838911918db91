"""How replicas agree. `train.py` and the learner know a strategy by `Sync` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from hvdqn.clock import Clock, ReportedClock
from hvdqn.sync.base import Sync

if TYPE_CHECKING:
    from hvdqn.comm import Comm
    from hvdqn.comm.mpi import MpiComm
    from hvdqn.config import ParallelConfig

__all__ = ["Sync", "make_sync"]


def make_sync(config: ParallelConfig, comm: Comm, clock: Clock) -> Sync:
    """The strategy of `--sync`, for this rank; `config.check_engine` has passed."""
    if config.sync == "server":
        from hvdqn.sync.server import Server, Worker

        if isinstance(clock, ReportedClock):
            return Worker(cast("MpiComm", comm), config, clock)
        return Server(cast("MpiComm", comm), config, clock)
    if config.sync == "parameters":
        from hvdqn.sync.parameters import Parameters

        return Parameters(comm, config.sync_every, config.outer_lr, config.outer_momentum)
    from hvdqn.sync.gradients import Gradients

    return Gradients(comm)
