"""How replicas agree: what the loop and the learner ask of every strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hvdqn.sync.traffic import Traffic

if TYPE_CHECKING:
    from torch import Tensor

    from hvdqn.learner import Learner


class Sync(ABC):
    """One way for replicas to agree: launched when gradients are there, finished before they are needed.

    What most strategies do not need does nothing here.

    Attributes:
        ranks_per_update: how many ranks' minibatches one step of the optimizer is of.
        gradient_share: what the learner multiplies its gradient by, so that it need not be done once it is summed up.
        traffic: what it gave to the network so far.
    """

    def __init__(self, ranks_per_update: int) -> None:
        self.ranks_per_update = ranks_per_update
        self.gradient_share = 1.0
        self.traffic = Traffic()

    @property
    @abstractmethod
    def description(self) -> str:
        """How ranks agree, for people."""

    def attach(self, learner: Learner) -> None:  # noqa: B027
        """Take hold of what is to travel; called once, when the learner is built."""

    def turn(
        self, learner: Learner, iterate: Callable[[], None], report: Callable[[], Sequence[float]]
    ) -> None:
        """One turn of the loop: `iterate` acts and learns; a rank that serves the others does that in its place."""
        iterate()

    @abstractmethod
    def begin(self, learner: Learner) -> None:
        """A gradient is there: launch what has to travel; return at once."""

    @abstractmethod
    def finish(self, learner: Learner) -> None:
        """Wait for it; when this returns, the step is taken."""

    @abstractmethod
    def exchange(self, learner: Learner) -> None:
        """Send reports and votes without a gradient."""

    def agree(self, learner: Learner) -> None:  # noqa: B027
        """Make all ranks hold the same weights now, where they may differ; a collective call."""

    @abstractmethod
    def sync_target(self, learner: Learner) -> list[int] | None:
        """Renew the target network; the ranks that are found to differ, or None if it has to wait."""

    @abstractmethod
    def expected_traffic(self, learner: Learner) -> tuple[float, float]:
        """Messages and payload bytes that one rank should give to the network in an update."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint keeps of it, the same on every rank where they agree: not copies."""
        return {}

    def counters(self) -> dict[str, Any]:
        """Plain numbers that a checkpoint and the summary keep of it."""
        return {}

    def load_counters(self, counters: Mapping[str, Any]) -> None:  # noqa: B027
        """Put back what `counters` gave."""

    def measures(self) -> dict[str, float]:
        """What it adds to a line of metrics."""
        return {}
