"""What goes wrong on shared machines: signals, drifting replicas, errors of one rank."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar

from hvdqn.comm import Comm
from hvdqn.config import UserError
from hvdqn.metrics import PhaseTimer

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


class Watchdog:
    """Ends a job in which some rank stopped moving, and names it.

    A thread on every rank writes a heartbeat file: its phase, how often phases changed, and, by the file's time,
    that the process lives. A rank that has not changed phase for `timeout_seconds` reads all of them. Times are
    compared as the file system gives them, so clocks of hosts may differ.

    Args:
        directory: where all ranks keep their heartbeats.
        comm: the ranks.
        timer: whose phases are watched.
        timeout_seconds: without a change of phase; 0: no watchdog.
    """

    def __init__(self, directory: Path, comm: Comm, timer: PhaseTimer, timeout_seconds: float) -> None:
        self.directory, self.comm, self.timer, self.timeout_seconds = directory, comm, timer, timeout_seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if timeout_seconds > 0:
            self._thread.start()

    def close(self) -> None:
        """Stop watching, and take the heartbeat away."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self._file(self.comm.rank).unlink(missing_ok=True)

    def _file(self, rank: int) -> Path:
        return self.directory / f"rank-{rank:05d}.json"

    def _watch(self) -> None:
        changes, since = -1, time.monotonic()
        while not self._closed.wait(min(1.0, self.timeout_seconds / 4)):
            if self.timer.changes != changes:
                changes, since = self.timer.changes, time.monotonic()
            idle = time.monotonic() - since
            self._beat(idle)
            if idle >= self.timeout_seconds:
                self._end(idle)

    def _beat(self, idle: float) -> None:
        beat = {"phase": self.timer.phase, "idle_seconds": idle}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file(self.comm.rank).write_text(json.dumps(beat), encoding="utf-8")
        except OSError:
            return  # a full disk is no hang

    def _end(self, idle: float) -> None:
        silent, busy = self._diagnose()
        blamed = silent or busy
        speaker = min(
            (rank for rank in range(self.comm.size) if rank not in dict(silent)), default=self.comm.rank
        )
        if self.comm.rank != speaker:
            time.sleep(1.0)
        else:
            what = (
                "; ".join(f"rank {rank} {text}" for rank, text in blamed) or "every rank waits for the others"
            )
            print(
                f"hvdqn: no progress for {idle:.0f} s (--stall-timeout {self.timeout_seconds:g}), rank "
                f"{self.comm.rank} in phase '{self.timer.phase}': {what}. Ending the job; start it again to resume",
                file=sys.stderr,
                flush=True,
            )
        self.comm.abort(EXIT_FAILED)

    def _diagnose(self) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
        """Ranks whose process does not answer, and ranks that live but hang outside of `comm`."""
        silent, busy = [], []
        now = self._age_reference()
        for rank in range(self.comm.size):
            try:
                beat = json.loads(self._file(rank).read_text(encoding="utf-8"))
                age = now - self._file(rank).stat().st_mtime
            except (OSError, ValueError):
                silent.append((rank, "left no heartbeat"))
                continue
            if age > self.timeout_seconds / 2:
                silent.append(
                    (rank, f"does not answer for {age:.0f} s, last seen in phase '{beat['phase']}'")
                )
            elif beat["phase"] != "comm" and beat["idle_seconds"] > self.timeout_seconds / 2:
                busy.append((rank, f"hangs in phase '{beat['phase']}' for {beat['idle_seconds']:.0f} s"))
        return silent, busy

    def _age_reference(self) -> float:
        try:
            return self._file(self.comm.rank).stat().st_mtime
        except OSError:
            return time.time()
