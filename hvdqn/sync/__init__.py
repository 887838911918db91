"""How replicas agree. `train.py` and the learner know a strategy by `Sync` alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from hvdqn.clock import Clock, ReportedClock
from hvdqn.sync.traffic import Traffic

if TYPE_CHECKING:
    from torch import Tensor

    from hvdqn.comm import Comm
    from hvdqn.comm.mpi import MpiComm
    from hvdqn.config import ParallelConfig
    from hvdqn.learner import Learner

__all__ = ["Sync", "Traffic", "make_sync"]


class Sync(Protocol):
    """One way for replicas to agree: launched when gradients are there, finished before they are needed.

    Attributes:
        ranks_per_update: how many ranks' minibatches one step of the optimizer is of.
        traffic: what it gave to the network so far.
    """

    ranks_per_update: int
    traffic: Traffic

    @property
    def description(self) -> str:
        """How ranks agree, for people."""

    def attach(self, learner: Learner) -> None:
        """Take hold of what is to travel; called once, when the learner is built."""

    def turn(
        self, learner: Learner, iterate: Callable[[], None], report: Callable[[], Sequence[float]]
    ) -> None:
        """One turn of the loop: `iterate` acts and learns; a rank that serves the others does that in its place."""

    def begin(self, learner: Learner) -> None:
        """A gradient is there: launch what has to travel; return at once."""

    def finish(self, learner: Learner) -> None:
        """Wait for it; when this returns, the step is taken."""

    def exchange(self, learner: Learner) -> None:
        """Send reports and votes without a gradient."""

    def agree(self, learner: Learner) -> None:
        """Make all ranks hold the same weights now; a collective call."""

    def sync_target(self, learner: Learner) -> list[int] | None:
        """Renew the target network; the ranks that are found to differ, or None if it has to wait."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint keeps of it, the same on every rank where they agree: not copies."""

    def counters(self) -> dict[str, Any]:
        """Plain numbers that a checkpoint and the summary keep of it."""

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Put back what `counters` gave."""

    def measures(self) -> dict[str, float]:
        """What it adds to a line of metrics."""

    def expected_traffic(self, learner: Learner) -> tuple[float, float]:
        """Messages and payload bytes that one rank should give to the network in an update."""


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
