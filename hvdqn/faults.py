"""What goes wrong on shared machines: signals, drifting replicas, errors of one rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from hvdqn.comm import Comm
from hvdqn.config import UserError

T = TypeVar("T")

EXIT_FINISHED, EXIT_FAILED, EXIT_USER_ERROR, EXIT_REQUEUE = 0, 1, 2, 75


class StopSignal:
    """Remembers that this rank was asked to stop; the ranks then agree on it through the trailer.

    SIGTERM and SIGUSR2 come from schedulers, SIGINT from the keyboard. A second SIGINT exits at once.
    """

    def __init__(self) -> None:
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            os._exit(128 + number)
        self.name = signal.Signals(number).name

    @property
    def received(self) -> bool:
        """Whether this rank votes to stop."""
        return bool(self.name)


class DriftError(RuntimeError):
    """Replicas that must be equal bit for bit are not."""


def check_replicas(differing_ranks: list[int], env_steps: int) -> None:
    """Refuse to train on when replicas differ.

    Raises:
        DriftError: some rank's weights are not rank 0's.
    """
    if differing_ranks:
        ranks = ", ".join(map(str, differing_ranks))
        raise DriftError(
            f"at env step {env_steps} the weights of rank {ranks} differ from rank 0's, which no update can cause: "
            "suspect that host's memory or a library that differs; resume from the last checkpoint"
        )


def together(comm: Comm, build: Callable[[], T]) -> T:
    """Build something on every rank; where one rank's user input is wrong, refuse on all.

    Raises:
        UserError: the first rank's that raised one.
    """
    result, error = None, None
    try:
        result = build()
    except UserError as refused:
        error = str(refused)
    errors = [text for text in comm.all_gather_object(error) if text is not None]
    if errors:
        raise UserError(errors[0])
    assert result is not None
    return result
