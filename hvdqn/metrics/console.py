"""Progress of a run for people: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import time
from typing import Protocol, TextIO

from hvdqn.logs import encodable
from hvdqn.metrics.status import Status
from hvdqn.metrics.writers import Record, Writer


class Console(Writer, Protocol):
    """The writer that people watch. Log messages are printed through it."""

    def print_line(self, text: str) -> None:
        """Print one line."""


def open_console(stream: TextIO, total_env_steps: int, line_every_seconds: float) -> Console:
    """Return a progress bar on a terminal that can redraw it; elsewhere plain lines every few seconds.

    Open MPI gives its ranks a pseudo-terminal and may put tags between the lines, so under mpirun there is no bar.
    """
    under_mpirun = "OMPI_COMM_WORLD_RANK" in os.environ
    if stream.isatty() and not under_mpirun and os.environ.get("TERM", "dumb") != "dumb":
        from hvdqn.metrics.bar import BarConsole  # imports rich, which only a terminal needs

        return BarConsole(stream, total_env_steps)
    return LineConsole(stream, total_env_steps, line_every_seconds)


class LineConsole:
    """Print plain lines for logs and pipes.

    Args:
        stream: where to print.
        total_env_steps: where the run ends.
        every_seconds: minimum wall time between two progress lines.
    """

    def __init__(self, stream: TextIO, total_env_steps: int, every_seconds: float) -> None:
        self._stream = stream
        self._status = Status(total_env_steps)
        self._every_seconds = every_seconds
        self._next = -math.inf
        self._held_back = False

    def resume(self, env_steps: int) -> None:
        """Do nothing: printed lines stay."""

    def write(self, record: Record) -> None:
        """Print a progress line, or hold it back if the last one is too recent."""
        self._status.update(record)
        self._held_back = time.monotonic() < self._next
        if not self._held_back:
            self._print_status()

    def print_line(self, text: str) -> None:
        """Print one line, after a progress line that was held back."""
        if self._held_back:
            self._print_status()
        self._print(text)

    def close(self) -> None:
        """Print the progress line that was held back, so that a log shows the end of the run."""
        if self._held_back:
            self._print_status()

    def _print_status(self) -> None:
        self._held_back = False
        self._next = time.monotonic() + self._every_seconds
        status = self._status
        counters = [f"env steps {status.progress()}", status.speed()]
        self._print("  ".join([*counters, *status.learning(), status.time_left()]))

    def _print(self, text: str) -> None:
        print(encodable(text, self._stream), file=self._stream, flush=True)
