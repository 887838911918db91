"""Write the files of a run that programs read: `metrics.jsonl`, TensorBoard events and `summary.json`."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, slots=True)
class Record:
    """One call of `Metrics.log`: global counters, wall time of training, and named values."""

    env_steps: int
    updates: int
    wall_seconds: float
    values: dict[str, int | float]


class Writer(Protocol):
    """A destination of records; by default a method does nothing. Any may raise OSError, which `Metrics` catches."""

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Take the settings of the run, before the first record."""
        return

    def resume(self, env_steps: int) -> None:
        """Drop the records beyond `env_steps`."""
        return

    def write(self, record: Record) -> None:
        """Write one record."""

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Take the summary of a run that has ended without an error."""
        return

    def close(self) -> None:
        """Write what `write` has not written yet."""
        return


class JsonLines(Writer):
    """Write `metrics.jsonl`: one JSON object per line, with null for non-finite numbers."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def resume(self, env_steps: int) -> None:
        """Remove the lines beyond `env_steps`, and a last line that is incomplete because a kill interrupted it."""
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


class TensorBoard(Writer):
    """Write an event file: scalars `train/*`, `eval/*`, `time/*` over global env steps; settings as text and hparams.

    It does not use TensorBoard's own writer: that writes in a thread, which hides errors of the disk and does not
    survive a fork. Without the tensorboard package no event file is written, and one warning is logged.
    """

    def __init__(self, directory: Path) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = directory / name
        self._purge_env_steps: int | None = None
        self._header_written = False
        self._installed = True
        self._settings: Mapping[str, Any] = {}

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Keep the settings for the header of the file."""
        self._settings = settings

    def resume(self, env_steps: int) -> None:
        """Make TensorBoard drop what earlier event files hold beyond `env_steps`."""
        self._purge_env_steps = env_steps + 1

    def write(self, record: Record) -> None:
        """Append one event with all scalars of the record."""
        if not self._installed:
            return
        try:  # imported with the first record, so that starting a run does not wait for it
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
        except ImportError as error:
            self._installed = False
            log.warning(f"no TensorBoard events are written ({error}): pip install tensorboard")
            return
        named = {**record.values, "updates": record.updates, "wall_seconds": record.wall_seconds}
        scalars = [Summary.Value(tag=tag_of(name), simple_value=value) for name, value in named.items()]
        event = Event(wall_time=time.time(), step=record.env_steps, summary=Summary(value=scalars))
        events = [event] if self._header_written else [*self._header(), event]
        _append(self._path, _encode(events))
        self._header_written = True

    def _header(self) -> list[Event]:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        header = [Event(wall_time=time.time(), file_version="brain.Event:2")]
        if self._purge_env_steps is not None:
            restart = SessionLog(status=SessionLog.START)
            header.append(Event(wall_time=time.time(), step=self._purge_env_steps, session_log=restart))
        if self._settings:
            header.append(_settings_event(self._settings, self._purge_env_steps or 0))
        return header


def _settings_event(settings: Mapping[str, Any], env_steps: int) -> Event:
    """Return the event with the settings of a run: as text, and for the table of TensorBoard's HPARAMS tab."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    text = "".join(f"    {name}: {value}\n" for name, value in settings.items())  # indented: a block of code
    session = SessionStartInfo(start_time_secs=time.time())
    for name, value in settings.items():
        if isinstance(value, bool):
            session.hparams[name].bool_value = value
        elif isinstance(value, (int, float)):
            session.hparams[name].number_value = value
        else:
            session.hparams[name].string_value = str(value)
    hparams = HParamsPluginData(version=0, session_start_info=session).SerializeToString()
    plugins = {
        "config": SummaryMetadata.PluginData(plugin_name="text"),
        "_hparams_/session_start_info": SummaryMetadata.PluginData(plugin_name="hparams", content=hparams),
    }
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
    values = [
        Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)
        for tag, plugin in plugins.items()
    ]
    return Event(wall_time=time.time(), step=env_steps, summary=Summary(value=values))


def tag_of(name: str) -> str:
    """Return the tag of a value, such as `train/loss`, `eval/return_mean` and `time/env_steps_per_second`."""
    if name.startswith("eval_"):
        return "eval/" + name.removeprefix("eval_")
    return ("time/" if "second" in name else "train/") + name


def _encode(events: list[Event]) -> bytes:
    """Return the events as the records of an event file, with their lengths and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl`, without a last line that is incomplete.

    Raises:
        OSError: the file cannot be read.
        ValueError: another line is not a JSON object; the message has its number.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is no JSON object")
        records.append(record)
    return records


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` in one step, in the given order, with null for non-finite numbers.

    Raises:
        OSError: it cannot be written; an older summary is unchanged.
    """
    text = json.dumps(finite(summary), allow_nan=False, indent=2)
    replace_file(run_dir / SUMMARY_FILE, text.encode() + b"\n")


def _env_steps_of(line: bytes) -> float:
    """Return the global env steps in a line of metrics.jsonl; infinity if the line is not a record."""
    try:
        return float(json.loads(line)["env_steps"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def finite(value: Any) -> Any:
    """Return the value with None for every non-finite number, also inside mappings and lists."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(path: Path, data: bytes) -> None:
    """Append all of `data`, or nothing if the disk is full.

    The file is opened for every call, so that writing works again when a file system returns.
    """
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(data) != len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file in one step; the new content is on the disk before it becomes visible.

    Raises:
        OSError: it cannot be written; the file is unchanged.
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
