"""The progress bar on a terminal, drawn by rich."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from hvdqn.logs import encodable
from hvdqn.metrics.status import Status
from hvdqn.metrics.writers import Record, Writer


class BarConsole(Writer):
    """Show a bar with env steps, speed and time left, and below it updates, return, loss and epsilon.

    Only `write` redraws it: rich's refresh thread would compete with training and does not survive a fork.
    """

    _REDRAW_SECONDS = 1.0

    def __init__(self, stream: TextIO, total_env_steps: int) -> None:
        self._stream = stream
        self.status = Status(total_env_steps)
        self.draw_at = -math.inf
        self._progress = StatusProgress(self.status, stream)

    def write(self, record: Record) -> None:
        """Redraw the bar, at most once a second."""
        self.status.update(record)
        if time.perf_counter() >= self.draw_at:
            self.draw_at = time.perf_counter() + self._REDRAW_SECONDS
            if not self._progress.live.is_started:
                self._progress.live.start()
                self._progress.console.show_cursor(True)  # a run that is killed cannot show it again
            self._progress.draw()

    def print_line(self, text: str) -> None:
        """Print one plain line above the bar."""
        safe = encodable(text, self._stream)
        self._progress.console.print(safe, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Draw the bar a last time and release the terminal."""
        if self._progress.live.is_started:
            self._progress.draw()
            self._progress.stop()


class StatusProgress(Progress):
    """A rich progress display of a `Status`."""

    def __init__(self, status: Status, stream: TextIO) -> None:
        self._status = status  # before super().__init__(), which draws a first frame
        super().__init__(
            TextColumn("env steps", markup=False),
            BarColumn(bar_width=None),
            *(TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in self._fields(status)),
            console=Console(file=stream),
            auto_refresh=False,
            redirect_stderr=sys.stderr.isatty(),  # else errors would go to standard output
            expand=True,
        )
        self._task = self.add_task("", total=max(1, status.total_env_steps), **self._fields(status))

    def draw(self) -> None:
        """Redraw the display from the status."""
        self.update(self._task, completed=self._status.env_steps, **self._fields(self._status))
        self.refresh()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bar, and below it one line with losses and returns and what the ranks do besides training."""
        yield self.make_tasks_table(self.tasks)
        yield Text(
            "  ".join(self._status.learning() + self._status.activities()),
            no_wrap=True,
            overflow="crop",
            style="dim",
        )

    @staticmethod
    def _fields(status: Status) -> dict[str, Any]:
        return {"progress": status.progress(), "speed": status.speed(), "time_left": status.time_left()}
