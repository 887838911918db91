"""Progress of a run for people: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import shutil
import time
from contextlib import suppress
from typing import Protocol, TextIO

from hvdqn.logs import encodable
from hvdqn.metrics.status import Status
from hvdqn.metrics.writers import Record, Writer

LINE_EVERY_SECONDS = 30.0  # where there is no terminal


class Console(Writer, Protocol):
    """The interface of the progress displays. Log messages are printed through them.

    Attributes:
        status: the counters and values that the display shows.
        draw_at: before this `time.perf_counter()`, `write` draws nothing.
    """

    status: Status
    draw_at: float

    def print_line(self, text: str) -> None:
        """Print one line."""


def open_console(stream: TextIO, total_env_steps: int, line_every_seconds: float) -> Console:
    """Return a `BarConsole` if `stream` is a terminal that can redraw a line, else a `LineConsole`."""
    if can_redraw(stream):
        from hvdqn.metrics.bar import BarConsole  # imports rich, which only a terminal needs

        return BarConsole(stream, total_env_steps)
    return LineConsole(stream, total_env_steps, line_every_seconds)


def can_redraw(stream: TextIO) -> bool:
    """Return True if the stream is a terminal that can redraw a line and that a user watches.

    Open MPI gives its ranks a pseudo-terminal and may put tags between the lines. `srun --unbuffered` gives ranks one
    whose output ends in a file.
    """
    under_mpirun = "OMPI_COMM_WORLD_RANK" in os.environ
    dumb = os.environ.get("TERM", "dumb") == "dumb"
    return stream.isatty() and not under_mpirun and not dumb and not in_batch_job()


def in_batch_job() -> bool:
    """Return whether a scheduler runs this process without the terminal of a user."""
    environ = os.environ
    # Slurm and Grid Engine set ENVIRONMENT.
    if environ.get("ENVIRONMENT") == "BATCH" or environ.get("PBS_ENVIRONMENT") == "PBS_BATCH":
        return True
    if "SLURM_JOB_ID" in environ:
        in_salloc_shell = environ.get("SLURM_JOB_NAME") == "interactive" and "SLURM_STEP_ID" not in environ
        return "SLURM_PTY_PORT" not in environ and not in_salloc_shell  # `srun --pty` sets SLURM_PTY_PORT
    return "LSB_JOBID" in environ and environ.get("LSB_INTERACTIVE") != "Y"


class LineConsole(Writer):
    """Print plain lines for logs and pipes.

    Args:
        stream: where to print.
        total_env_steps: where the run ends.
        every_seconds: minimum wall time between two progress lines.
    """

    def __init__(self, stream: TextIO, total_env_steps: int, every_seconds: float) -> None:
        self._stream = stream
        self.status = Status(total_env_steps)
        self.draw_at = -math.inf
        self._every_seconds = every_seconds
        self._held_back = False
        self._printed_env_steps = -1

    def write(self, record: Record) -> None:
        """Print a progress line, or keep the record for later if the last line is too recent."""
        self.status.update(record)
        if time.perf_counter() >= self.draw_at:
            self._print_status()
        elif record.values or record.env_steps != self._printed_env_steps:
            self._held_back = True

    def print_line(self, text: str) -> None:
        """Print one line; a progress line that was kept for later is printed first."""
        if self._held_back:
            self._print_status()
        self._print(text)

    def close(self) -> None:
        """Print the progress line that was kept for later, so that a log shows the end of the run."""
        if self._held_back:
            self._print_status()

    def _print_status(self) -> None:
        self._held_back = False
        self.draw_at = time.perf_counter() + self._every_seconds
        status = self.status
        self._printed_env_steps = status.env_steps
        counters = [f"env steps {status.progress()}", status.speed()]
        self._print("  ".join([*counters, *status.learning(), status.time_left(), *status.activities()]))

    def _print(self, text: str) -> None:
        print(encodable(text, self._stream), file=self._stream, flush=True)


class ProgressLine:
    """Show the progress of a command other than training, such as `hvdqn eval`.

    A terminal shows one line that is redrawn every second. A file or a pipe gets a line every 30 s.

    Args:
        stream: where to print. A stream that fails is ignored.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._redraws = can_redraw(stream)
        self._draw_at = -math.inf

    def show(self, text: str) -> None:
        """Show a text, unless the last one was shown less than an interval ago."""
        now = time.perf_counter()
        if now < self._draw_at:
            return
        self._draw_at = now + (1.0 if self._redraws else LINE_EVERY_SECONDS)
        text = encodable(text, self._stream)
        if self._redraws:
            text = text[: shutil.get_terminal_size().columns - 1]
        with suppress(OSError):
            print(
                f"\r\x1b[K{text}" if self._redraws else text,
                end="" if self._redraws else "\n",
                file=self._stream,
            )
            self._stream.flush()

    def close(self) -> None:
        """Remove the line from a terminal."""
        if self._redraws:
            with suppress(OSError):
                print("\r\x1b[K", end="", file=self._stream, flush=True)
