"""Counters in; `metrics.jsonl`, TensorBoard events and console out. Only rank 0 has outputs."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TextIO, get_args

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import RenderableType
    from tensorboard.compat.proto.event_pb2 import Event

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"

Phase = Literal["act", "env", "add", "sample", "compute", "comm", "optimizer", "save", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class PhaseTimer:
    """Where the wall time of training goes. Exactly one phase runs at any moment, so the phases sum to it.

    Built running, in phase `other`. A switch costs about 0.1 us.
    """

    __slots__ = ("_seconds", "_since", "changes", "phase")

    def __init__(self) -> None:
        self.phase: Phase = "other"
        self.changes = 0  # a rank whose count stands still hangs: see `faults.Watchdog`
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._since = time.perf_counter()

    def start(self, phase: Phase) -> Phase:
        """Switch to `phase`; returns the phase that ran before, so that a callee can give the clock back."""
        now = time.perf_counter()
        before = self.phase
        self._seconds[before] += now - self._since
        self.phase = phase
        self.changes += 1
        self._since = now
        return before

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Be in `phase`, then in the one before; an exception leaves `phase` standing, to tell where it came from."""
        before = self.start(phase)
        yield
        self.start(before)

    def alive(self) -> None:
        """Tell the watchdog that a long piece of work moves on."""
        self.changes += 1

    def seconds(self) -> dict[str, float]:
        """Seconds by phase up to now, those of the attempts before a resume included."""
        self.start(self.phase)
        return dict(self._seconds)

    def total_seconds(self) -> float:
        """Wall seconds of training up to now: the sum over all phases."""
        return sum(self.seconds().values())

    def load(self, seconds: Mapping[str, float]) -> None:
        """Add what `seconds()` returned at the checkpoint that this run goes on from."""
        for phase in PHASES:
            self._seconds[phase] += seconds.get(phase, 0.0)


class WaitHint:
    """One line of advice, once in a run, when a rank waits for others for much of its time.

    Args:
        timer: of this rank.
        engine: of its ranks, as `--comm` names it.
        parameters: of the network.
    """

    SHARE = 0.3
    SMALL_PARAMETERS = 500_000

    def __init__(self, timer: PhaseTimer, engine: str, parameters: int) -> None:
        self._timer, self._given = timer, False
        self._since = timer.seconds()
        self._remedy = "a larger --batch-per-rank makes updates rarer at the same --replay-ratio"
        if engine not in ("mpi", "local") and parameters < self.SMALL_PARAMETERS:
            self._remedy = f"for a network this small use mpirun with --comm mpi; {self._remedy}"

    def due(self) -> str:
        """The advice if the time since the last call calls for it; else nothing."""
        seconds = self._timer.seconds()
        waited = seconds["comm"] - self._since["comm"]
        share = waited / max(sum(seconds.values()) - sum(self._since.values()), 1e-9)
        self._since = seconds
        if share <= self.SHARE or self._given:
            return ""
        self._given = True
        return f"hint: {share:.0%} of the time went into waiting for other ranks; {self._remedy}"


@dataclass(frozen=True, slots=True)
class Record:
    """What one call of `Metrics.log` says: global counters, wall time of training, and named values."""

    env_steps: int
    updates: int
    wall_seconds: float
    values: dict[str, int | float]


class Output(Protocol):
    """Somewhere that records go. Any method may raise OSError; `Metrics` survives it."""

    def resume(self, env_steps: int) -> None:
        """Forget what was recorded beyond `env_steps`."""

    def write(self, record: Record) -> None:
        """Put one record out."""

    def close(self) -> None:
        """Put out what was held back."""


class Metrics:
    """Takes the counters of training to every output; without a `run_dir` (ranks above 0) to none.

    A disk that fails must not end a run of days: an output's OSError is said once and counted in
    `write_failures`, and the next record tries again.

    Args:
        run_dir: existing directory for `metrics.jsonl` and TensorBoard events; None: no outputs, no console.
        total_env_steps: where the run ends, for the share done and the time left.
        timer: its total is the `wall_seconds` of every record.
        line_every_seconds: wall time between two console lines where there is no terminal.
        stream: the console; standard output if None.
    """

    def __init__(
        self,
        run_dir: Path | None,
        total_env_steps: int,
        timer: PhaseTimer,
        *,
        line_every_seconds: float = 5.0,
        stream: TextIO | None = None,
    ) -> None:
        self.write_failures = 0
        self._timer = timer
        self._rates_since: tuple[int, int, float] = (0, 0, timer.total_seconds())
        self._console: Console | None = None
        self._outputs: list[Output] = []
        if run_dir is not None:
            self._console = open_console(stream or sys.stdout, total_env_steps, line_every_seconds)
            self._outputs = [JsonLines(run_dir / METRICS_FILE), TensorBoard(run_dir), self._console]

    def resume(self, env_steps: int, updates: int) -> None:
        """Go on from a checkpoint: records beyond `env_steps` are cut, so that curves do not double back."""
        self._rates_since = (env_steps, updates, self._timer.total_seconds())
        for output in self._outputs:
            self._attempt(output.resume, env_steps)

    def log(self, env_steps: int, updates: int, values: Mapping[str, float]) -> None:
        """Record global counters and named values; the rates join them where env steps have moved on."""
        wall_seconds = self._timer.total_seconds()
        numbers = {name: v if isinstance(v, int) else float(v) for name, v in values.items()}
        rates = self._rates(env_steps, updates, wall_seconds)
        record = Record(env_steps, updates, wall_seconds, {**rates, **numbers})
        for output in self._outputs:
            self._attempt(output.write, record)

    def say(self, text: str) -> None:
        """Print one plain line, above the progress bar if there is one."""
        try:
            if self._console is not None:
                self._console.say(text)
        except OSError:
            self.write_failures += 1

    def close(self) -> None:
        """Show the last record that the console held back, and take the bar down."""
        for output in self._outputs:
            self._attempt(output.close)
        self._outputs = []

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rates(self, env_steps: int, updates: int, wall_seconds: float) -> dict[str, float]:
        since_env_steps, since_updates, since_seconds = self._rates_since
        seconds = wall_seconds - since_seconds
        if env_steps == since_env_steps or seconds <= 0:  # such as an evaluation just after a training line
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
                self.say(
                    f"warning: cannot write metrics{where}: {error.strerror or error}. Training goes on; "
                    f"records are lost until this is mended"
                )


class JsonLines:
    """`metrics.jsonl`: one JSON object a line, non-finite numbers as null."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def resume(self, env_steps: int) -> None:
        """Cut lines beyond `env_steps`, and a last line torn by a kill."""
        if not self._path.exists():
            return
        text = self._path.read_bytes()
        kept = b"".join(
            line
            for line in text.splitlines(keepends=True)
            if line.endswith(b"\n") and _env_steps_of(line) <= env_steps
        )
        if kept != text:
            replace_file(self._path, kept)

    def write(self, record: Record) -> None:
        """Append one line."""
        counters = {
            "env_steps": record.env_steps,
            "updates": record.updates,
            "wall_seconds": round(record.wall_seconds, 3),
        }
        line = json.dumps(finite({**counters, **record.values}), allow_nan=False)
        _append(self._path, line.encode() + b"\n")

    def close(self) -> None:
        """Nothing is held back."""


class TensorBoard:
    """An event file in the run directory: scalars `train/*`, `eval/*`, `time/*` over global env steps.

    Written record by record without TensorBoard's own writer: its thread would swallow the disk's errors,
    and threads and forked environments do not go together.
    """

    def __init__(self, directory: Path) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = directory / name
        self._purge_env_steps: int | None = None
        self._begun = False

    def resume(self, env_steps: int) -> None:
        """Have TensorBoard drop what earlier event files hold beyond `env_steps`."""
        self._purge_env_steps = env_steps + 1

    def write(self, record: Record) -> None:
        """Append one event with all scalars of the record."""
        # Imported at the first record: it takes a tenth of a second that start-up should not.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        named = {**record.values, "updates": record.updates, "wall_seconds": record.wall_seconds}
        scalars = [Summary.Value(tag=_tag(name), simple_value=value) for name, value in named.items()]
        event = Event(wall_time=time.time(), step=record.env_steps, summary=Summary(value=scalars))
        events = [event] if self._begun else [*self._header(), event]
        _append(self._path, _framed(events))
        self._begun = True

    def close(self) -> None:
        """Nothing is held back."""

    def _header(self) -> list[Event]:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        header = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if self._purge_env_steps is not None:
            restart = SessionLog(status=SessionLog.START)
            header.append(Event(wall_time=time.time(), step=self._purge_env_steps, session_log=restart))
        return header


def _tag(name: str) -> str:
    if name.startswith("eval_"):
        return "eval/" + name.removeprefix("eval_")
    return ("time/" if "second" in name else "train/") + name


def _framed(events: list[Event]) -> bytes:
    """Events as the length-and-checksum records of an event file."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()


class Status:
    """What both consoles show: newest counters, last known value of each quantity, recent rate."""

    _SHOWN = (
        ("return", "episode_return_mean"),
        ("eval return", "eval_return_mean"),
        ("loss", "loss"),
        ("epsilon", "epsilon"),
    )
    _RATE_WINDOW_SECONDS = 10.0

    def __init__(self, total_env_steps: int) -> None:
        self.total_env_steps = total_env_steps
        self.env_steps = 0
        self._updates = 0
        self._values: dict[str, float] = {}
        self._recent: deque[tuple[float, int]] = deque()

    def update(self, record: Record) -> None:
        """Take in one record; a value that it lacks keeps the last number known."""
        self.env_steps, self._updates = record.env_steps, record.updates
        self._values.update({name: v for name, v in record.values.items() if math.isfinite(v)})
        self._recent.append((record.wall_seconds, record.env_steps))
        while len(self._recent) > 2 and record.wall_seconds - self._recent[1][0] >= self._RATE_WINDOW_SECONDS:
            self._recent.popleft()

    def progress(self) -> str:
        """Such as `12,800/50,000 (25%)`."""
        percent = 100 * self.env_steps // max(1, self.total_env_steps)
        return f"{self.env_steps:,}/{self.total_env_steps:,} ({percent}%)"

    def speed(self) -> str:
        """Env steps per second of the last seconds, such as `8,912/s`."""
        return f"{number(self._rate())}/s"

    def time_left(self) -> str:
        """Such as `left 0:00:04`, at the recent speed."""
        rate = self._rate()
        if not rate > 0:
            return "left ?"
        seconds = math.ceil(max(0, self.total_env_steps - self.env_steps) / rate)
        return f"left {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def learning(self) -> list[str]:
        """Such as `updates 1,421`, `return 143.2`, `loss 0.0213`, as far as they are known."""
        known = [
            f"{label} {number(self._values[name])}" for label, name in self._SHOWN if name in self._values
        ]
        return [f"updates {self._updates:,}", *known]

    def _rate(self) -> float:
        if not self._recent:
            return math.nan
        (first_seconds, first), (last_seconds, last) = self._recent[0], self._recent[-1]
        if last_seconds > first_seconds:
            return (last - first) / (last_seconds - first_seconds)
        return self._values.get("env_steps_per_second", math.nan)


def number(value: float) -> str:
    """A number for people: three digits of small ones, four of others, thousands apart."""
    if not math.isfinite(value):
        return "?"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"


class Console(Output, Protocol):
    """The output that people watch."""

    def say(self, text: str) -> None:
        """Print one plain line."""


def open_console(stream: TextIO, total_env_steps: int, line_every_seconds: float) -> Console:
    """A progress bar on a terminal that can redraw; elsewhere a line every few seconds.

    Open MPI gives ranks a pseudo-terminal whatever its own output is, and puts tags between what they print.
    """
    behind_mpirun = "OMPI_COMM_WORLD_RANK" in os.environ
    if stream.isatty() and not behind_mpirun and os.environ.get("TERM", "dumb") != "dumb":
        return BarConsole(stream, total_env_steps)
    return LineConsole(stream, total_env_steps, line_every_seconds)


class LineConsole:
    """Plain lines for logs and pipes."""

    def __init__(self, stream: TextIO, total_env_steps: int, every_seconds: float) -> None:
        self._stream = stream
        self._status = Status(total_env_steps)
        self._every_seconds = every_seconds
        self._next = -math.inf
        self._held_back = False

    def resume(self, env_steps: int) -> None:
        """What was printed stays printed."""

    def write(self, record: Record) -> None:
        """Print a line if the last one is long enough ago, else hold it back."""
        self._status.update(record)
        self._held_back = time.monotonic() < self._next
        if not self._held_back:
            self._print_status()

    def say(self, text: str) -> None:
        """Print one plain line, after the status line held back if there is one."""
        if self._held_back:
            self._print_status()
        self._print(text)

    def close(self) -> None:
        """Print the line held back, so that a log ends with the end."""
        if self._held_back:
            self._print_status()

    def _print_status(self) -> None:
        self._held_back = False
        self._next = time.monotonic() + self._every_seconds
        status = self._status
        counters = [f"env steps {status.progress()}", status.speed()]
        self._print("  ".join([*counters, *status.learning(), status.time_left()]))

    def _print(self, text: str) -> None:
        print(_encodable(text, self._stream), file=self._stream, flush=True)


class BarConsole:
    """A live bar on a terminal: env steps, speed and time left, with the learning values below.

    Redrawn by `write` alone: rich's refresh thread would compete with training and does not survive forks.
    """

    _REDRAW_SECONDS = 0.1

    def __init__(self, stream: TextIO, total_env_steps: int) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._stream = stream
        self._status = Status(total_env_steps)
        self._live = Live(console=RichConsole(file=stream), auto_refresh=False)
        self._next = -math.inf

    def resume(self, env_steps: int) -> None:
        """What was printed stays printed."""

    def write(self, record: Record) -> None:
        """Redraw the bar, at most ten times a second."""
        self._status.update(record)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._REDRAW_SECONDS
            if not self._live.is_started:
                self._live.start()
                self._live.console.show_cursor(True)  # a run that is killed could not give it back
            self._live.update(self._drawn(), refresh=True)

    def say(self, text: str) -> None:
        """Print one plain line above the bar."""
        safe = _encodable(text, self._stream)
        self._live.console.print(safe, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Draw the bar a last time and give the terminal back."""
        if self._live.is_started:
            self._live.update(self._drawn(), refresh=True)
            self._live.stop()

    def _drawn(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        status = self._status
        row = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None, None, None):
            row.add_column(ratio=ratio, no_wrap=True, overflow="crop")
        bar = ProgressBar(total=max(1, status.total_env_steps), completed=status.env_steps)
        row.add_row("env steps", bar, status.progress(), status.speed(), status.time_left())
        return Group(row, Text("  ".join(status.learning()), no_wrap=True, overflow="crop", style="dim"))


def _encodable(text: str, stream: TextIO) -> str:
    """The text with what the stream cannot encode escaped, as under LC_ALL=C."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line torn by a kill is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line that is not the last is no JSON object; the message names it by number.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    records = []
    for at, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"line {at} is no JSON object")
        records.append(record)
    return records


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` atomically, in the order given, non-finite numbers as null.

    Raises:
        OSError: it cannot be written; a summary from before stays whole.
    """
    text = json.dumps(finite(summary), allow_nan=False, indent=2)
    replace_file(run_dir / SUMMARY_FILE, text.encode() + b"\n")


def _env_steps_of(line: bytes) -> float:
    """Global env steps of a line; infinite for one that is no record."""
    try:
        return float(json.loads(line)["env_steps"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def finite(value: Any) -> Any:
    """The same with non-finite numbers as None, in mappings and lists too."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(path: Path, data: bytes) -> None:
    """Append all of `data` or nothing: what a full disk took of it is cut off again.

    The file is opened each time, so that a disk that was away for a while is found again.
    """
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(data) != len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in place of a file in one step, on disk before it is seen.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
