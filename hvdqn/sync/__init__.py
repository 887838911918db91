"""How replicas agree. Each strategy answers `begin(learner)` and `finish(learner)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hvdqn.comm import Comm
    from hvdqn.learner import Learner


class Sync(Protocol):
    """One way for replicas to agree: launched when gradients are there, finished before they are needed."""

    def begin(self, learner: Learner) -> None:
        """Launch what has to travel; return at once."""

    def finish(self, learner: Learner) -> None:
        """Wait for it and take the step."""


def make_sync(name: str, comm: Comm) -> Sync:
    """The strategy of `--sync`."""
    from hvdqn.sync.gradients import Gradients

    strategies = {"gradients": Gradients}
    return strategies[name](comm)
