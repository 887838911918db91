"""Watch all ranks from a thread on each, and end the job when a rank hangs or does not answer."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hvdqn.comm import Comm
from hvdqn.errors import EXIT_FAILED
from hvdqn.faults.signals import StopSignal
from hvdqn.metrics import PhaseTimer

log = logging.getLogger(__name__)

# How long a rank that was asked to stop waits for a silent rank. Schedulers kill 30 s after their signal.
STOP_PATIENCE_SECONDS = 15.0


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat of one rank."""

    phase: str
    idle_seconds: float  # since the rank last changed phase
    age_seconds: float  # since the heartbeat was written


def silent_ranks(beats: Sequence[Heartbeat | None], after_seconds: float) -> list[str]:
    """Return one clause for each rank that has no heartbeat (None), or one older than `after_seconds`."""
    return [
        f"rank {rank} does not answer"
        + (f" for {beat.age_seconds:.0f} s, last seen in phase '{beat.phase}'" if beat else "")
        for rank, beat in enumerate(beats)
        if beat is None or beat.age_seconds > after_seconds
    ]


def why_stalled(beats: Sequence[Heartbeat | None], patience_seconds: float) -> list[str]:
    """Return why the job makes no progress: the silent ranks, or else the ranks that hang in their own work.

    Args:
        beats: the heartbeat of every rank; None where there is none.
        patience_seconds: how long a rank may make no progress.

    Returns:
        One clause for each of these ranks, or a single clause if all ranks wait for each other. An empty list if no
        rank is silent and some rank makes progress, however long the others have waited for it.
    """
    silent = silent_ranks(beats, patience_seconds / 2)
    hanging = [
        f"rank {rank} hangs in phase '{beat.phase}' for {beat.idle_seconds:.0f} s"
        for rank, beat in enumerate(beats)
        if beat and beat.phase != "comm" and beat.idle_seconds > patience_seconds
    ]
    if silent or hanging:
        return silent or hanging
    if all(beat and beat.idle_seconds > patience_seconds for beat in beats):
        return ["every rank waits for the others"]
    return []


class Watchdog:
    """End a job in which a rank makes no progress, and name that rank.

    A thread on every rank writes a heartbeat file with its phase and the time since its last progress. The
    modification time of the file shows that the process lives. A rank without progress for `timeout_seconds` reads
    the heartbeats of all ranks and decides with `why_stalled`. All times are those of the shared file system, so the
    clocks of the hosts may differ.

    A rank that was asked to stop waits only `STOP_PATIENCE_SECONDS` for a silent rank: that rank cannot agree to stop
    any more, and the scheduler is about to kill the job.

    Args:
        directory: shared by all ranks, for their heartbeats.
        comm: the ranks.
        timer: this rank's phases; a change of phase is progress.
        timeout_seconds: maximum time without progress; 0 disables the watchdog.
        exit_code: the exit code of a job that the watchdog ends.
        stop: holds whether this rank was asked to stop.
    """

    def __init__(
        self,
        directory: Path,
        comm: Comm,
        timer: PhaseTimer,
        timeout_seconds: float,
        exit_code: int = EXIT_FAILED,
        stop: StopSignal | None = None,
    ) -> None:
        self.directory, self.comm, self.timer, self.timeout_seconds = directory, comm, timer, timeout_seconds
        self.exit_code, self.stop = exit_code, stop
        self._interval = min(1.0, timeout_seconds / 8)
        # Progress is seen up to one interval late, and the next check comes one interval later.
        self._patience_seconds = timeout_seconds - 2 * self._interval
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if timeout_seconds > 0:
            self._thread.start()

    def close(self) -> None:
        """Stop watching and remove this rank's heartbeat."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):
            self._file(self.comm.rank).unlink(missing_ok=True)
            self.directory.rmdir()  # succeeds on the last rank

    def _file(self, rank: int) -> Path:
        return self.directory / f"rank-{rank:05d}.json"

    def _watch(self) -> None:
        self._write_heartbeat(0.0)
        changes, idle, before = -1, 0.0, time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            # A job that was suspended as a whole has not stalled: limit what one interval can add.
            idle += min(now - before, 2 * self._interval)
            before = now
            if self.timer.changes != changes:
                changes, idle = self.timer.changes, 0.0
            self._write_heartbeat(idle)
            if idle > self._patience_seconds:
                self._check_progress(idle)
            elif idle > STOP_PATIENCE_SECONDS and self._stop_not_agreed():
                self._check_silence(idle)

    def _stop_not_agreed(self) -> bool:
        return self.stop is not None and self.stop.requested and not self.stop.all_ranks_agreed

    def _write_heartbeat(self, idle: float) -> None:
        beat = json.dumps({"phase": self.timer.phase, "idle_seconds": idle}).ljust(96)
        with contextlib.suppress(OSError):  # a full disk does not mean that the rank hangs
            self.directory.mkdir(parents=True, exist_ok=True)
            # Overwritten without truncating, so that no reader finds an empty file.
            descriptor = os.open(self._file(self.comm.rank), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, beat.encode())
            finally:
                os.close(descriptor)

    def _check_progress(self, idle: float) -> None:
        """End the job, unless `why_stalled` finds that some rank makes progress.

        Args:
            idle: seconds without progress on this rank.
        """
        beats = self._read_heartbeats()
        causes = why_stalled(beats, self._patience_seconds)
        if beats[self.comm.rank] is None:
            causes = [
                f"no heartbeat can be written to {self.directory}, so it is unknown which rank is missing"
            ]
        if causes:
            self._end(f"{idle:.0f} s (--stall-timeout {self.timeout_seconds:g})", causes, beats)

    def _check_silence(self, idle: float) -> None:
        """End the job if a rank is silent; called only after this rank was asked to stop.

        Args:
            idle: seconds without progress on this rank.
        """
        beats = self._read_heartbeats()
        causes = silent_ranks(beats, STOP_PATIENCE_SECONDS / 2)
        # A rank without a heartbeat may be starting; one that writes a checkpoint may have a slow file system.
        if causes and all(beat and beat.phase != "save" for beat in beats):
            self._end(f"{idle:.0f} s after a signal to stop", causes, beats)

    def _end(self, since: str, causes: list[str], beats: Sequence[Heartbeat | None]) -> NoReturn:
        """End the job. The lowest rank that lives prints the reason."""
        fresh = min(self._patience_seconds, STOP_PATIENCE_SECONDS) / 2
        living = [rank for rank, beat in enumerate(beats) if beat and beat.age_seconds <= fresh]
        if self.comm.rank == min(living, default=self.comm.rank):
            log.error(
                f"no progress for {since}: {'; '.join(causes)}; rank {self.comm.rank} is in phase "
                f"'{self.timer.phase}'. Ending the job; start it again to resume"
            )
        else:
            time.sleep(3.0)  # leave the message and the end of the job to the other rank
        self.comm.abort(self.exit_code)

    def _read_heartbeats(self) -> list[Heartbeat | None]:
        """Return the heartbeat of every rank, None where there is none."""
        beats: list[Heartbeat | None] = []
        for rank in range(self.comm.size):
            try:
                beat = json.loads(self._file(rank).read_text(encoding="utf-8"))
                now = self._file(self.comm.rank).stat().st_mtime  # from the same clock as the other file's
                age = now - self._file(rank).stat().st_mtime
                beats.append(Heartbeat(beat["phase"], beat["idle_seconds"] + max(age, 0.0), age))
            except (OSError, ValueError):
                beats.append(None)
        return beats
