"""Signals that ask a run to stop."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopSignal:
    """Record that a signal asked this rank to stop. The ranks then agree on stopping through the trailer.

    SIGTERM and SIGUSR2 come from schedulers, SIGINT comes from the keyboard. A second SIGINT exits at once.

    A thread reads the signals from a pipe. Handlers written in Python would run only after the current call into a
    library returns, and a collective that waits for a dead rank never returns.

    While the process exits it ignores SIGTERM and SIGUSR2: when the first rank exits, launchers end the others with
    SIGTERM, and all ranks should have the same exit code.

    Attributes:
        requested: whether this rank was asked to stop.
        name: of the last signal that asked for it, such as `SIGTERM`; empty without one.
        all_ranks_agreed: the trainer sets this once all ranks have left the training loop. From then on the watchdog
            gives a silent rank the whole `--stall-timeout`, because it may be writing a checkpoint.
    """

    def __init__(self) -> None:
        self.requested = False
        self.name = ""
        self.all_ranks_agreed = False
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, _ignore_in_main_thread)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        atexit.register(_ignore_scheduler_signals)

    def _listen(self, reader: int) -> None:
        interrupts = 0
        while True:
            for number in os.read(reader, 64):
                if number == signal.SIGINT:
                    interrupts += 1
                if interrupts == 2:
                    os._exit(128 + signal.SIGINT)
                if number in STOP_SIGNALS:  # the pipe also carries signals that an environment handles
                    self.name = signal.Signals(number).name
                    self.requested = True


def _ignore_scheduler_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _ignore_in_main_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing, in place of the default action, which would end the process."""
