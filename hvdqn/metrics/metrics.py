"""Records of a run, written to all outputs of rank 0."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hvdqn.logs import close_display, open_display
from hvdqn.metrics.console import LINE_EVERY_SECONDS, Console, open_console
from hvdqn.metrics.timing import PhaseTimer
from hvdqn.metrics.writers import METRICS_FILE, JsonLines, Record, TensorBoard, Writer

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger(__name__)


class Metrics:
    """Write the counters and values of training to `metrics.jsonl`, TensorBoard and the console.

    Only rank 0 has outputs. A disk that fails does not end a run: the first error is logged, all are counted in
    `write_failures`, and the next record tries again.

    Args:
        run_dir: existing directory for `metrics.jsonl` and TensorBoard events; None for ranks above 0.
        total_env_steps: where the run ends, for the share done and the time left.
        timer: its total is the `wall_seconds` of every record.
        line_every_seconds: minimum wall time between two progress lines where there is no terminal.
        stream: the console; standard output if None.
        trackers: further outputs of rank 0.

    Attributes:
        write_failures: number of failed writes.
        draw_at: the `time.perf_counter()` at which the training loop calls `show` next; infinite without a console.
    """

    def __init__(
        self,
        run_dir: Path | None,
        total_env_steps: int,
        timer: PhaseTimer,
        *,
        line_every_seconds: float = LINE_EVERY_SECONDS,
        stream: TextIO | None = None,
        trackers: Sequence[Writer] = (),
    ) -> None:
        self.write_failures = 0
        self.draw_at = math.inf
        self._timer = timer
        self._rates_since: tuple[int, int, float] = (0, 0, timer.total_seconds())
        self._console: Console | None = None
        self._writers: list[Writer] = []
        if run_dir is not None:
            self._console = open_console(stream or sys.stdout, total_env_steps, line_every_seconds)
            open_display(self._console)
            self._writers = [
                JsonLines(run_dir / METRICS_FILE),
                TensorBoard(run_dir),
                *trackers,
                self._console,
            ]

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Give the settings of the run to all outputs."""
        for writer in self._writers:
            self._attempt(writer.describe, settings)

    def resume(self, env_steps: int, updates: int) -> None:
        """Drop the records beyond the checkpoint that the run resumes from, so that curves do not overlap."""
        self._rates_since = (env_steps, updates, self._timer.total_seconds())
        for writer in self._writers:
            self._attempt(writer.resume, env_steps)

    def log(self, env_steps: int, updates: int, values: Mapping[str, float]) -> None:
        """Write global counters and named values, with the rates since the last record that had new env steps."""
        wall_seconds = self._timer.total_seconds()
        numbers = {name: v if isinstance(v, int) else float(v) for name, v in values.items()}
        rates = self._rates(env_steps, updates, wall_seconds)
        record = Record(env_steps, updates, wall_seconds, {**rates, **numbers})
        for writer in self._writers:
            self._attempt(writer.write, record)

    def show(self, env_steps: int, updates: int, activity: str = "", last: bool = False) -> None:
        """Redraw the console with these counters, unless it was redrawn a moment ago.

        Args:
            env_steps: global env steps.
            updates: global updates.
            activity: what the ranks do besides training, if anything.
            last: training has ended: the console shows these counters when it is closed, or before.
        """
        if self._console is None or not self._writers:
            return
        if last or time.perf_counter() >= self._console.draw_at:
            self._console.status.activity = activity
            self._attempt(self._console.write, Record(env_steps, updates, self._timer.total_seconds(), {}))
            self._console.status.activity = ""
        self.draw_at = self._console.draw_at

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Give the summary of a run that has ended without an error to all outputs."""
        for writer in self._writers:
            self._attempt(writer.summarize, summary)

    def close(self) -> None:
        """Show the last record if the console has not yet, and remove the bar."""
        for writer in self._writers:
            self._attempt(writer.close)
        self._writers = []
        self.draw_at = math.inf
        if self._console is not None:
            close_display(self._console)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rates(self, env_steps: int, updates: int, wall_seconds: float) -> dict[str, float]:
        since_env_steps, since_updates, since_seconds = self._rates_since
        seconds = wall_seconds - since_seconds
        if env_steps == since_env_steps or seconds <= 0:  # an evaluation's line may follow a training line
            return {}
        self._rates_since = (env_steps, updates, wall_seconds)
        return {
            "env_steps_per_second": (env_steps - since_env_steps) / seconds,
            "updates_per_second": (updates - since_updates) / seconds,
        }

    def _attempt(self, write: Callable[..., None], *arguments: Any) -> None:
        try:
            write(*arguments)
        except OSError as error:
            self.write_failures += 1
            if self.write_failures == 1:
                where = f" {error.filename}" if error.filename else ""
                log.warning(
                    f"cannot write metrics{where}: {error.strerror or error}. Training goes on; records are lost until "
                    "this is fixed"
                )
