"""Keep the ranks' copies of the network in agreement, by one of the strategies that `--sync` offers.

The training loop uses a strategy only through the interface `Strategy`.
"""

from __future__ import annotations

from typing import cast

from hvdqn.clock import Clock, WorkerClock
from hvdqn.comm import Comm
from hvdqn.comm.mpi import MpiComm
from hvdqn.config import Config
from hvdqn.graphs import Record
from hvdqn.learner import Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.sync.gradients import Gradients
from hvdqn.sync.parameters import Parameters
from hvdqn.sync.recorded import RecordedGradients
from hvdqn.sync.server import Server
from hvdqn.sync.statistics import Outcome, Totals
from hvdqn.sync.strategy import Strategy
from hvdqn.sync.worker import Worker

__all__ = ["Outcome", "Strategy", "Totals", "make_strategy"]


def make_strategy(
    config: Config,
    learner: Learner,
    comm: Comm,
    timer: PhaseTimer,
    clock: Clock,
    record: Record | None = None,
) -> Strategy:
    """Create this rank's object of the strategy that `--sync` names. All ranks must call it together.

    Args:
        config: the configuration of the run; `check_engine` must have accepted it.
        learner: this rank's learner.
        comm: the collectives over all ranks.
        timer: counts the seconds that this rank waits for others.
        clock: this rank's clock.
        record: records a function as a CUDA graph; None: the run uses no CUDA graphs.
    """
    parallel, limit = config.parallel, config.learning.max_skipped_updates
    if parallel.sync == "parameters":
        return Parameters(learner, comm, timer, parallel, limit)
    if parallel.sync == "server":
        if isinstance(clock, WorkerClock):
            return Worker(learner, cast(MpiComm, comm), timer, parallel, clock, limit)
        return Server(learner, cast(MpiComm, comm), timer, parallel, clock, limit)
    if record is not None:
        return RecordedGradients(learner, comm, timer, limit, record)
    return Gradients(learner, comm, timer, limit)
