"""What the training loop asks of every strategy, that is, of every way for replicas to agree."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hvdqn.comm import Comm
from hvdqn.errors import NonFiniteError
from hvdqn.learner import Learner, load_tensors
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import QNetwork
from hvdqn.sync.statistics import Outcome


class Strategy(ABC):
    """One way for replicas to agree. It owns everything that travels: message, trailer, handle, counters.

    Every method but the plain reads is collective: all ranks call it at the same point of the loop.

    Args:
        learner: whose gradients or parameters are exchanged.
        timer: counts the seconds that this rank waits for others.

    Attributes:
        exchanged_updates, sent_messages, sent_bytes: what this rank sent so far, and for how many updates. An allreduce
            over p ranks puts up to 2 (p - 1) / p times its payload on the wire, as in a ring.
        skipped_in_a_row: updates of the job that were skipped in a row, saved in checkpoints.
    """

    def __init__(self, learner: Learner, timer: PhaseTimer) -> None:
        self.learner, self.timer = learner, timer
        self.exchanged_updates = self.sent_messages = self.sent_bytes = 0
        self.skipped_in_a_row = 0

    @property
    @abstractmethod
    def description(self) -> str:
        """How ranks agree, for the header of a run."""

    @abstractmethod
    def launch(
        self, reported: Sequence[float], learned: Tensor | None, largest_weight: float, progress: float
    ) -> None:
        """Begin the exchange for the gradient that the learner has computed; return at once.

        Args:
            reported: this rank's `REPORTED` `[6]`.
            learned: from `Learner.compute_gradient` `[4]`. None contributes a zero gradient, which the average leaves
                out; elastic training does so while the replay of a new rank is still filling.
            largest_weight: of the minibatch's importance weights.
            progress: share of the run that has passed, for the learning rate.
        """

    @abstractmethod
    def wait(self) -> Outcome:
        """Finish the exchange that `launch` began. When this returns, the optimizer step is taken or skipped."""

    def serve(self, stop: bool) -> Outcome:
        """Serve another rank's message; called in place of acting and learning on a rank that serves.

        Args:
            stop: whether this rank votes to stop.
        """
        raise NotImplementedError(f"no rank serves under {type(self).__name__}")

    @abstractmethod
    def exchange_stats(self, reported: Sequence[float]) -> Outcome:
        """Exchange statistics and votes without a gradient."""

    def synchronize(self) -> Outcome:
        """Make all ranks hold the same weights now, where the strategy lets them differ for a while."""
        return Outcome()

    @abstractmethod
    def update_target(self) -> list[int] | None:
        """Copy the online network to the target network on all ranks.

        Returns:
            The ranks whose weights differ from the others' and must not, or None if this has to wait.
        """

    def differing_ranks(self) -> list[int]:
        """Return the ranks whose networks or moments differ from the others' and must not; changes nothing."""
        return []

    @abstractmethod
    def expected_traffic(self) -> tuple[float, float]:
        """Return the messages and payload bytes that one rank should send per update."""

    def learner_state(self) -> dict[str, Tensor]:
        """Return the learner's tensors that a checkpoint keeps, at least on rank 0; a collective call. No copies."""
        return self.learner.state()

    def load_learner_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `learner_state` returned on rank 0."""
        self.learner.load_state(state)

    def whole_network(self) -> QNetwork:
        """Return an online network that this rank can play with by itself; a collective call."""
        return self.learner.online

    def param_sha256(self) -> str:
        """Return the digest of the online network's parameters; a collective call."""
        return self.learner.sha256()

    def close(self) -> None:  # noqa: B027
        """Disconnect what the strategy has connected; a collective call at the end of a run."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps, the same on every rank where ranks agree. They are no copies."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned."""
        load_tensors(self.state(), state)

    def counters(self) -> dict[str, Any]:
        """Return the plain numbers that a checkpoint and the summary keep."""
        return {}

    def load_counters(self, counters: Mapping[str, Any]) -> None:  # noqa: B027
        """Load what `counters` returned."""

    def metrics(self) -> dict[str, float]:
        """Return what the strategy adds to a line of metrics."""
        return {}


def broadcast_target(learner: Learner, comm: Comm, timer: PhaseTimer) -> list[int]:
    """Copy rank 0's weights to every rank's target network, and compare them with each rank's own.

    The comparison is bit for bit, NaNs included, and costs nothing beyond the broadcast.

    Returns:
        The ranks that differ from what most ranks hold, rank 0 or not.
    """
    incoming = learner.parameters.clone()
    with timer.during("comm"):
        comm.broadcast_(incoming)
        same = torch.equal(incoming.view(torch.uint8), learner.parameters.view(torch.uint8))
        all_same = all(comm.all_gather_object(same))
    if learner.target_tau == 1.0:
        learner.update_target(incoming)
    return [] if all_same else minority(comm.all_gather_object(learner.sha256()))


def compare_learners(learner: Learner, comm: Comm, timer: PhaseTimer) -> list[int]:
    """Compare what a checkpoint holds of the learner: both networks and the moments, bit for bit.

    Only digests travel, so this takes much less time than writing the checkpoint.

    Returns:
        The ranks that differ from what most ranks hold, rank 0 or not.
    """
    if comm.size == 1:
        return []
    digest = hashlib.sha256()
    for tensor in learner.state().values():
        digest.update(tensor.cpu().numpy().tobytes())
    with timer.during("comm"):
        return minority(comm.all_gather_object(digest.hexdigest()))


def minority(digests: Sequence[str]) -> list[int]:
    """Return the ranks whose digest is not that of most ranks."""
    common = Counter(digests).most_common(1)[0][0]
    return [rank for rank, digest in enumerate(digests) if digest != common]


def check_skipped(skipped_in_a_row: int, ranks: Sequence[int], limit: int) -> None:
    """End the run if so many updates were skipped in a row that it is no accident.

    Args:
        skipped_in_a_row: updates without a finite gradient.
        ranks: the ranks whose gradient or loss was not finite.
        limit: `--max-skipped-updates`.

    Raises:
        NonFiniteError: the limit is reached.
    """
    if skipped_in_a_row >= limit:
        began = ", ".join(map(str, ranks)) or "none alone: only the average is not finite"
        raise NonFiniteError(
            f"{skipped_in_a_row} updates in a row had a gradient that is not finite; it began on rank "
            f"{began}. Look for NaN or Inf in that rank's rewards and observations, or lower --lr"
        )
