"""Wall time of training by phase."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

Phase = Literal["act", "env", "add", "sample", "compute", "comm", "optimizer", "save", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class PhaseTimer:
    """Measure the wall time of training by phase. One phase runs at any moment, so their seconds sum to the total.

    A new timer runs, in phase `other`. Switching phases is cheap enough for the training loop.

    Attributes:
        phase: the phase that runs now.
        since: `time.perf_counter()` at the last change of phase.
        changes: number of changes of phase. If it does not grow, the watchdog assumes that this rank hangs.
        when_alive: a function that `alive` calls; it redraws the progress display.
    """

    __slots__ = ("_seconds", "changes", "phase", "since", "when_alive")

    def __init__(self) -> None:
        self.phase: Phase = "other"
        self.changes = 0
        self.when_alive: Callable[[], None] = lambda: None
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.since = time.perf_counter()

    def start(self, phase: Phase) -> Phase:
        """Switch to `phase` and return the phase that ran before, so that a caller can switch back."""
        now = time.perf_counter()
        before = self.phase
        self._seconds[before] += now - self.since
        self.phase = phase
        self.changes += 1
        self.since = now
        return before

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Run the body in `phase`, then switch back. After an exception `phase` stays, to show where it was raised."""
        before = self.start(phase)
        yield
        self.start(before)

    def alive(self) -> None:
        """Count as a change of phase, so that the watchdog sees that a long piece of work makes progress."""
        self.changes += 1
        self.when_alive()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase until now, including attempts before a resume."""
        self.start(self.phase)
        return dict(self._seconds)

    def total_seconds(self) -> float:
        """Return the wall seconds of training until now: the sum over all phases."""
        return sum(self.seconds().values())

    def load(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds that a checkpoint recorded with `seconds()`."""
        for phase in PHASES:
            self._seconds[phase] += seconds.get(phase, 0.0)


class WaitHint:
    """Advise the user, once in a run, if a rank waits for other ranks for much of its time.

    Args:
        timer: of this rank.
        engine: the communication engine, as `--comm` names it.
        parameters: number of parameters of the network.
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
        """Return the advice if this rank waited too much since the last call, else an empty string."""
        seconds = self._timer.seconds()
        waited = seconds["comm"] - self._since["comm"]
        share = waited / max(sum(seconds.values()) - sum(self._since.values()), 1e-9)
        self._since = seconds
        if share <= self.SHARE or self._given:
            return ""
        self._given = True
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        remedy = self._remedy
        if load > cores + 0.5:
            remedy = (
                f"the load average of this machine is {load:.1f} on {cores} cores: end other work on it, or start "
                "fewer ranks"
            )
        return f"hint: {share:.0%} of the time went into waiting for other ranks; {remedy}"
