"""How replicas agree. `train.py` and the learner know a strategy by `Sync` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from hvdqn.sync.traffic import Traffic

if TYPE_CHECKING:
    from torch import Tensor

    from hvdqn.comm import Comm
    from hvdqn.config import ParallelConfig
    from hvdqn.learner import Learner

__all__ = ["Sync", "Traffic", "make_sync"]


class Sync(Protocol):
    """One way for replicas to agree: launched when gradients are there, finished before they are needed."""

    traffic: Traffic

    @property
    def description(self) -> str:
        """How ranks agree, for people."""

    @property
    def agreed(self) -> bool:
        """Whether all ranks hold the same weights now; the same on every rank."""

    def attach(self, learner: Learner) -> None:
        """Take hold of what is to travel; called once, when the learner is built."""

    def begin(self, learner: Learner) -> None:
        """A gradient is there: launch what has to travel; return at once."""

    def finish(self, learner: Learner) -> None:
        """Wait for it; when this returns, the step is taken."""

    def agree(self, learner: Learner) -> None:
        """Make all ranks hold the same weights and moments now; a collective call."""

    def exchange(self, learner: Learner) -> None:
        """Send reports and votes without a gradient; a collective call."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, the same on every rank where they agree: not copies."""

    def expected_traffic(self, learner: Learner) -> tuple[float, float]:
        """Messages and payload bytes that one rank should give to the network in an update."""


def make_sync(config: ParallelConfig, comm: Comm) -> Sync:
    """The strategy of `--sync`."""
    from hvdqn.sync.gradients import Gradients
    from hvdqn.sync.parameters import Parameters

    if config.sync == "parameters":
        return Parameters(comm, config.sync_every, config.outer_lr, config.outer_momentum)
    return Gradients(comm)
