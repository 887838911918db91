"""Signals that ask a run to stop."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
from types import FrameType

from hvdqn.comm import kill_descendants

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
# Launchers and schedulers may send these to every process of a job.
_GROUP_SIGNALS = (*STOP_SIGNALS, signal.SIGUSR1)


class StopSignal:
    """Record that a signal asked this rank to stop. The ranks agree to stop by a vote that travels with each gradient.

    SIGTERM and SIGUSR2 come from schedulers, SIGINT comes from the keyboard. A second SIGINT exits at once.

    A thread reads the signals from a pipe. Handlers written in Python run only after the current call into a library
    returns, and a collective that waits for a dead rank never returns.

    While the process exits it ignores SIGTERM and SIGUSR2: when the first rank exits, launchers end the others with
    SIGTERM, and all ranks should have the same exit code.

    Signals belong to the main thread, so off the main thread nothing is installed, and no signal stops the run.

    Args:
        own_process: True for a process that does nothing but train. In a notebook (False) a second SIGINT raises
            KeyboardInterrupt, and `close` puts everything back.

    Attributes:
        requested: whether this rank was asked to stop.
        name: of the last signal that asked for it, such as `SIGTERM`; empty without one.
        all_ranks_agreed: the trainer sets this once all ranks have left the training loop. From then on the watchdog
            gives a silent rank the whole `--stall-timeout`, because it may be writing a checkpoint.
    """

    def __init__(self, own_process: bool = True) -> None:
        self.requested = False
        self.name = ""
        self.all_ranks_agreed = False
        self.own_process = own_process
        self._interrupted = self._warned = False
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._install()
            if own_process:
                atexit.register(_ignore_scheduler_signals)

    def _install(self) -> None:
        global _active
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._outer, _active = _active, self
        self._outer_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._outer_handlers = {number: signal.signal(number, _handle) for number in STOP_SIGNALS}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def close(self) -> None:
        """Put back the signal handlers and the wakeup descriptor that were there before."""
        global _active
        if not self._installed:
            return
        self._installed = False
        for number, handler in self._outer_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._outer_wakeup)
        _active = self._outer
        os.write(self._writer, b"\0")  # ends the thread
        os.close(self._writer)

    def note(self, number: int) -> None:
        """Record a signal that Python's handler received.

        Usually the thread has recorded it before. It has not if an environment has removed the wakeup descriptor.
        """
        again = number == signal.SIGINT and self._interrupted
        self._interrupted = self._interrupted or number == signal.SIGINT
        self._record(number)
        if again and not self.own_process:
            raise KeyboardInterrupt

    def reinstall(self) -> None:
        """Replace signal handlers that an environment has installed by those of this class; warn about it once."""
        taken = [number.name for number in STOP_SIGNALS if signal.signal(number, _handle) is not _handle]
        descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        if (taken or descriptor != self._writer) and not self._warned:
            self._warned = True
            log.warning(
                f"the environment has changed how this process handles {', '.join(taken) or 'signals'}: it is changed "
                "back, so that a signal stops the run after a checkpoint"
            )

    def forget(self) -> None:
        """Close the pipe in a forked child: a signal to the child would otherwise be recorded by its parent."""
        signal.set_wakeup_fd(-1)
        os.close(self._reader)
        os.close(self._writer)

    def _record(self, number: int) -> None:
        self.name = signal.Signals(number).name
        self.requested = True

    def _listen(self) -> None:
        interrupts = 0
        while True:
            for number in os.read(self._reader, 64):
                if number == 0:
                    os.close(self._reader)
                    return
                interrupts += number == signal.SIGINT
                if interrupts == 2 and self.own_process:
                    kill_descendants()
                    os._exit(128 + signal.SIGINT)
                if number in STOP_SIGNALS:  # the pipe also carries signals that an environment handles
                    self._record(number)


_active: StopSignal | None = None  # the one that records the signals of this process


def reinstall_handlers() -> None:
    """Install this process's stop handlers again if an environment has replaced them; see `StopSignal.reinstall`."""
    if _active is not None and threading.current_thread() is threading.main_thread():
        _active.reinstall()


def leave_signals_to_rank() -> None:
    """Ignore stop signals in a worker process of this rank: the rank handles them and closes its workers.

    The worker gets a handler that does nothing. SIG_IGN would be inherited by programs that the environment starts.
    """
    for number in _GROUP_SIGNALS:
        signal.signal(number, _handle)
        signal.siginterrupt(number, False)  # system calls of a simulator are not interrupted


def _handle(number: int, frame: FrameType | None) -> None:
    """Record the signal. Replaces the default action, which would end the process."""
    if _active is not None:
        _active.note(number)


def _ignore_scheduler_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


# Environments may fork helper processes. SIGTERM must end a helper: `terminate()` of multiprocessing sends it, and
# `join()` then waits. SIGINT and SIGUSR2 come from a terminal or a scheduler, which send them to all processes but mean
# the rank, and the rank needs its helpers until the last checkpoint. Signals are blocked during the fork, because the
# child would handle one that arrives then as its parent does.

_masks = threading.local()


def _before_fork() -> None:
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _after_fork_in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _after_fork_in_child() -> None:
    global _active
    if _active is not None:
        _active.forget()
        _active = None
    if signal.getsignal(signal.SIGTERM) is _handle:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)
