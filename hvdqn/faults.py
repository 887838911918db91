"""What goes wrong on shared machines: signals, drifting replicas, errors of one rank, ranks that hang."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from hvdqn.comm import Comm
from hvdqn.errors import EXIT_FAILED, DriftError, UserError
from hvdqn.metrics import PhaseTimer

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

# A rank that was told to stop waits so long for one that is silent. Schedulers kill 30 s after their signal.
STOP_PATIENCE_SECONDS = 15.0


class StopSignal:
    """Remembers that this rank was asked to stop; the ranks then agree on it through the trailer.

    SIGTERM and SIGUSR2 come from schedulers, SIGINT from the keyboard; a second SIGINT exits at once. A thread
    reads them from a pipe: Python's own handlers run only when the call under way returns, and a call that waits
    for a dead rank never does. At exit the schedulers' are ignored: launchers end the other ranks when the first
    one exits, and must find the same exit code in all.
    """

    def __init__(self) -> None:
        self.name = ""
        self.agreed = False
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, _leave_to_thread)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        atexit.register(_ignore_stop_signals)

    @property
    def received(self) -> bool:
        """Whether this rank votes to stop."""
        return bool(self.name)

    def _listen(self, reader: int) -> None:
        interrupts = 0
        while True:
            for number in os.read(reader, 64):
                if number == signal.SIGINT:
                    interrupts += 1
                if interrupts == 2:
                    os._exit(128 + signal.SIGINT)
                if number in STOP_SIGNALS:  # an environment may have handlers of others
                    self.name = signal.Signals(number).name


def _ignore_stop_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Stand in for the default action, which would end the process."""


def check_replicas(differing_ranks: list[int], env_steps: int) -> None:
    """Refuse to train on when replicas differ.

    Raises:
        DriftError: some rank's weights are not those of the others.
    """
    if differing_ranks:
        ranks = ", ".join(map(str, differing_ranks))
        raise DriftError(
            f"at env step {env_steps} the weights of rank {ranks} differ from the other ranks', which no update can "
            "cause: suspect that host's memory or a library that differs; start again to resume from the last "
            "checkpoint"
        )


def raise_on_all_ranks(comm: Comm, build: Callable[[], T], timer: PhaseTimer | None = None) -> T:
    """Build something on every rank; where one rank's user input is wrong, refuse on all.

    Args:
        comm: the ranks.
        build: what each does.
        timer: to tell the watchdog who still builds, and who waits for others.

    Raises:
        UserError: the first rank's that raised one.
    """
    error = None
    try:
        result = build()
    except UserError as refused:
        error = str(refused)
    with timer.during("comm") if timer else contextlib.nullcontext():
        errors = [text for text in comm.all_gather_object(error) if text is not None]
    if errors:
        raise UserError(errors[0])
    return result


@contextlib.contextmanager
def sole_job(run_dir: Path, comm: Comm, patience_seconds: float = 10.0) -> Iterator[None]:
    """Keep other jobs out of a run directory. However this one ends, the kernel gives it free.

    Args:
        run_dir: on a file system without locks nobody is kept out, which a line says.
        comm: the ranks of this job.
        patience_seconds: how long to wait for a job that may be ending.

    Raises:
        UserError: another job trains there.
    """
    with contextlib.ExitStack() as held:

        def lock() -> None:
            if comm.rank == 0:
                held.enter_context(_locked(run_dir / "lock", patience_seconds))

        raise_on_all_ranks(comm, lock)
        yield


@contextlib.contextmanager
def _locked(path: Path, patience_seconds: float) -> Iterator[None]:
    descriptor = _lock(path, patience_seconds)
    if descriptor is None:
        say = f"hvdqn: warning: there are no locks in '{path.parent}': see to it that no second job trains there"
        print(say, file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _lock(path: Path, patience_seconds: float) -> int | None:
    """The descriptor of a file that this process alone holds; None where that cannot be had."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:  # else who held it took it away
                return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise UserError(
                    f"another job trains in '{path.parent}'; wait for its end, or choose another --run-dir"
                ) from None
            time.sleep(0.1)
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)


@dataclass(frozen=True)
class Heartbeat:
    """What one rank last said of itself."""

    phase: str
    idle_seconds: float  # since it last changed phase
    age_seconds: float  # since it said so


def silent_ranks(beats: Sequence[Heartbeat | None], after_seconds: float) -> list[str]:
    """One clause for each rank whose last heartbeat is older than this; None, no heartbeat at all, is older."""
    return [
        f"rank {rank} does not answer"
        + (f" for {beat.age_seconds:.0f} s, last seen in phase '{beat.phase}'" if beat else "")
        for rank, beat in enumerate(beats)
        if beat is None or beat.age_seconds > after_seconds
    ]


def why_stalled(beats: Sequence[Heartbeat | None], patience_seconds: float) -> list[str]:
    """Which ranks keep the job from moving: those that are silent, or else those that hang in their own work.

    Args:
        beats: every rank's; None where there is none.
        patience_seconds: how long a rank may be without progress.

    Returns:
        One clause for each, or one if all wait for each other. Nothing while any rank makes progress and no rank
        fails to answer, however long the others have waited for it.
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
    """Ends a job in which some rank stopped moving, and names it.

    A thread on every rank writes a heartbeat file: its phase, for how long it has not changed, and, by the
    file's time, that the process lives. A rank that made no progress for `timeout_seconds` reads all of them
    and judges by `why_stalled`. Times are those of the file system, so clocks of hosts may differ. One that was told
    to stop does not wait that long for a rank of which nothing is heard: it will not agree any more.

    Args:
        directory: where all ranks keep their heartbeats.
        comm: the ranks.
        timer: whose phases are watched.
        timeout_seconds: without progress; 0: no watchdog.
        exit_code: of the job that it ends.
        stop: whether this rank was told to stop.
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
        # A change is seen up to one interval late, and the next look comes one later.
        self._patience_seconds = timeout_seconds - 2 * self._interval
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if timeout_seconds > 0:
            self._thread.start()

    def close(self) -> None:
        """Stop watching, and take the heartbeat away."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):
            self._file(self.comm.rank).unlink(missing_ok=True)
            self.directory.rmdir()  # the last rank succeeds

    def _file(self, rank: int) -> Path:
        return self.directory / f"rank-{rank:05d}.json"

    def _watch(self) -> None:
        self._beat(0.0)
        changes, idle, before = -1, 0.0, time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            # A job that was suspended as a whole has not stalled: the time away does not count.
            idle += min(now - before, 2 * self._interval)
            before = now
            if self.timer.changes != changes:
                changes, idle = self.timer.changes, 0.0
            self._beat(idle)
            if idle > self._patience_seconds:
                self._judge(idle)
            elif idle > STOP_PATIENCE_SECONDS and self.stop and self.stop.received and not self.stop.agreed:
                self._judge_silence(idle)

    def _beat(self, idle: float) -> None:
        beat = json.dumps({"phase": self.timer.phase, "idle_seconds": idle}).ljust(96)
        with contextlib.suppress(OSError):  # a full disk is no hang
            self.directory.mkdir(parents=True, exist_ok=True)
            # Not truncated: no reader may find it empty.
            descriptor = os.open(self._file(self.comm.rank), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, beat.encode())
            finally:
                os.close(descriptor)

    def _judge(self, idle: float) -> None:
        beats = self._heartbeats()
        causes = why_stalled(beats, self._patience_seconds)
        if beats[self.comm.rank] is None:
            causes = [f"no heartbeat can be kept in {self.directory}, so who is missing is not known"]
        if causes:
            self._end(f"{idle:.0f} s (--stall-timeout {self.timeout_seconds:g})", causes, beats)

    def _judge_silence(self, idle: float) -> None:
        beats = self._heartbeats()
        causes = silent_ranks(beats, STOP_PATIENCE_SECONDS / 2)
        # A rank without a heartbeat may live, and so may one that writes: a file system may keep its heartbeats back.
        if causes and all(beat and beat.phase != "save" for beat in beats):
            self._end(f"{idle:.0f} s, and told to stop", causes, beats)

    def _end(self, since: str, causes: list[str], beats: Sequence[Heartbeat | None]) -> NoReturn:
        """End the job; of the ranks that live, the first says why."""
        fresh = min(self._patience_seconds, STOP_PATIENCE_SECONDS) / 2
        living = [rank for rank, beat in enumerate(beats) if beat and beat.age_seconds <= fresh]
        if self.comm.rank == min(living, default=self.comm.rank):
            print(
                f"hvdqn: no progress for {since}: {'; '.join(causes)}; "
                f"rank {self.comm.rank} is in phase '{self.timer.phase}'. Ending the job; start it again to resume",
                file=sys.stderr,
                flush=True,
            )
        else:
            time.sleep(3.0)  # one rank speaks for all, and ends all
        self.comm.abort(self.exit_code)

    def _heartbeats(self) -> list[Heartbeat | None]:
        """Every rank's, None where there is none."""
        beats: list[Heartbeat | None] = []
        for rank in range(self.comm.size):
            try:
                beat = json.loads(self._file(rank).read_text(encoding="utf-8"))
                now = self._file(self.comm.rank).stat().st_mtime  # by the same clock as the other's
                age = now - self._file(rank).stat().st_mtime
                beats.append(Heartbeat(beat["phase"], beat["idle_seconds"] + max(age, 0.0), age))
            except (OSError, ValueError):
                beats.append(None)
        return beats
