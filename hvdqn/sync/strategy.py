"""Define the interface of a strategy: a way to keep the ranks' copies of the network in agreement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hvdqn.comm import Comm
from hvdqn.errors import NonFiniteError
from hvdqn.learner import Learner, load_tensors, sha256
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import QNetwork
from hvdqn.sync.statistics import Outcome


class Strategy(ABC):
    """Exchanges gradients or parameters between ranks. Each value of `--sync` has a subclass.

    All ranks must call `launch`, `wait`, `exchange_stats`, `synchronize`, `update_target` and `differing_ranks` at the
    same point of the loop; with `--sync server`, only `synchronize`. The other methods need no other rank, but `serve`.

    Args:
        learner: computes the gradients, and holds the parameters.
        timer: counts the seconds that this rank waits for others.

    Attributes:
        exchanged_updates, sent_messages, sent_bytes: number of updates that this rank has exchanged, and the messages
            and bytes that it passed to the engine for them. An allreduce of n bytes over p ranks sends up to
            2 n (p - 1) / p of them over the network, as in a ring.
        skipped_in_a_row: number of the job's latest updates that were skipped one after another; checkpoints hold it.
    """

    def __init__(self, learner: Learner, timer: PhaseTimer) -> None:
        self.learner, self.timer = learner, timer
        self.exchanged_updates = self.sent_messages = self.sent_bytes = 0
        self.skipped_in_a_row = 0

    @property
    @abstractmethod
    def description(self) -> str:
        """One line for the log: what the ranks exchange and how often."""

    @abstractmethod
    def launch(
        self, reported: Sequence[float], learned: Tensor | None, largest_weight: float, progress: float
    ) -> None:
        """Begin the exchange for the gradient that the learner has computed; return at once.

        Args:
            reported: this rank's values of `REPORTED` `[6]`.
            learned: what `Learner.compute_gradient` returned `[4]`. None: this rank has no gradient, and the average is
                over the others; elastic training passes it while the replay of a new rank is still filling.
            largest_weight: the largest importance weight of the minibatch.
            progress: share of the run that has passed, for the learning rate.
        """

    @abstractmethod
    def wait(self) -> Outcome:
        """Finish the exchange that `launch` began. When this returns, the optimizer step is taken or skipped."""

    def serve(self, stop: bool) -> Outcome:
        """Answer one message of another rank. With `--sync server`, rank 0 calls it instead of acting and learning.

        Args:
            stop: whether this rank votes to stop.
        """
        raise NotImplementedError(f"no rank serves under {type(self).__name__}")

    @abstractmethod
    def exchange_stats(self, reported: Sequence[float]) -> Outcome:
        """Sum statistics and votes to stop over all ranks without a gradient. `reported`: as in `launch`."""

    def synchronize(self) -> Outcome:
        """Make all ranks hold the same weights now, if the strategy lets them differ between exchanges."""
        return Outcome()

    @abstractmethod
    def update_target(self) -> list[int] | None:
        """Copy the online network to the target network on all ranks.

        Returns:
            The ranks whose weights differ from the others' although they must not; None if the strategy copies later.
        """

    def differing_ranks(self) -> list[int]:
        """Return the ranks whose networks or optimizer moments differ from the others' although they must not."""
        return []

    @abstractmethod
    def expected_traffic(self) -> tuple[float, float]:
        """Return how many messages and bytes one rank should pass to the engine per update."""

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
        """Return the strategy's tensors for a checkpoint, equal on all ranks: the object's own, not copies."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite the strategy's tensors with those that `state` returned."""
        load_tensors(self.state(), state)

    def counters(self) -> dict[str, Any]:
        """Return the strategy's counts, which a checkpoint and the summary keep."""
        return {}

    def load_counters(self, counters: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore the counts that `counters` returned."""

    def metrics(self) -> dict[str, float]:
        """Return the values that the strategy adds to a line of metrics."""
        return {}


def broadcast_target(learner: Learner, comm: Comm, timer: PhaseTimer) -> list[int]:
    """Copy rank 0's weights to every rank's target network, and compare them bit for bit with each rank's own.

    The networks' buffers are compared too. A target network that follows the online network at every update
    (`target_tau` below 1) is not overwritten.

    Returns:
        The ranks whose weights differ from those of most ranks; rank 0 may be among them.
    """
    incoming = learner.parameters.clone()
    with timer.during("comm"):
        comm.broadcast_(incoming)
        same = torch.equal(incoming.view(torch.uint8), learner.parameters.view(torch.uint8))
        mine = (same, sha256(learner.buffers.values()))
        all_same = all(other == (True, mine[1]) for other in comm.all_gather_object(mine))
    if learner.target_tau == 1.0:
        learner.update_target(incoming)
    return [] if all_same else minority(comm.all_gather_object(learner.sha256()))


def compare_learners(learner: Learner, comm: Comm, timer: PhaseTimer) -> list[int]:
    """Compare between ranks, bit for bit, what a checkpoint holds of the learner: networks, buffers and moments.

    Ranks exchange only hashes, so this takes much less time than writing the checkpoint.

    Returns:
        The ranks whose tensors differ from those of most ranks; rank 0 may be among them.
    """
    if comm.size == 1:
        return []
    digest = sha256([*learner.state().values(), *learner.buffers.values()])
    with timer.during("comm"):
        return minority(comm.all_gather_object(digest))


def minority(digests: Sequence[str]) -> list[int]:
    """Return the ranks whose hash is not that of most ranks. `digests`: one per rank."""
    common = Counter(digests).most_common(1)[0][0]
    return [rank for rank, digest in enumerate(digests) if digest != common]


def check_skipped(skipped_in_a_row: int, ranks: Sequence[int], limit: int) -> None:
    """Raise NonFiniteError, which ends the run, if at least `limit` updates in a row were skipped.

    Args:
        skipped_in_a_row: number of updates without a finite gradient, one after another.
        ranks: the ranks whose gradient or loss was not finite.
        limit: the setting `--max-skipped-updates`.

    Raises:
        NonFiniteError: the limit is reached.
    """
    if skipped_in_a_row >= limit:
        began = ", ".join(map(str, ranks)) or "none alone: only the average is not finite"
        raise NonFiniteError(
            f"{skipped_in_a_row} updates in a row had a gradient that is not finite; it began on rank "
            f"{began}. Look for NaN or Inf in that rank's rewards and observations (or numbers above 3.4e+38, which "
            "are Inf in float32), or lower --lr"
        )
