"""How a job ends: its ranks leave together, or one that failed ends the others. Also the messages of wrong input."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable

from hvdqn.comm import Comm, launcher_rank, launcher_size
from hvdqn.config import Config
from hvdqn.envs import kill_all_workers
from hvdqn.errors import (
    EXIT_FAILED,
    EXIT_USER_ERROR,
    DriftError,
    FoundAloneError,
    NonFiniteError,
    StoppedError,
    UserError,
)
from hvdqn.faults import StopSignal
from hvdqn.metrics import PhaseTimer

log = logging.getLogger(__name__)

Work = Callable[[Config, Comm, StopSignal, PhaseTimer], int]
TOGETHER = (UserError, DriftError, NonFiniteError, StoppedError)
"""Exceptions that all ranks raise at once."""


def fail(error: BaseException, comm: Comm, stop: StopSignal, timer: PhaseTimer) -> int:
    """Report an exception and end all ranks; only return the exit code if a program of the user runs a single rank."""
    ends_process = stop.own_process or comm.size > 1  # other ranks wait for this one
    if not ends_process:
        kill_all_workers()
        if isinstance(error, KeyboardInterrupt):
            raise error
    if isinstance(error, FoundAloneError):
        code = refuse_alone(str(error), stop)
    else:
        report_failure(error, comm, timer)
        code = EXIT_FAILED
    if ends_process:
        comm.abort(code)
    return code


def report_failure(error: BaseException, comm: Comm, timer: PhaseTimer) -> None:
    """Log an exception with its traceback; if it came while waiting for other ranks, only that they do not answer."""
    if timer.phase != "comm":
        log.error(f"rank {comm.rank} of {comm.size} failed: {''.join(traceback.format_exception(error))}")
        return
    reason = traceback.format_exception_only(error)[-1].splitlines()[0]
    log.error(f"rank {comm.rank} of {comm.size} failed: the other ranks do not answer: {reason}")
    if comm.size > 1:
        # Launchers use the exit code of the rank that ends first, so let the one that failed end first.
        time.sleep(1)


def run_and_leave(work: Work, config: Config, comm: Comm, stop: StopSignal, timer: PhaseTimer) -> int:
    """Call `work`, or log the error that all ranks raised; disconnect together with them, and return the exit code."""
    try:
        code = work(config, comm, stop, timer)
    except UserError as error:
        code = refuse(str(error), comm.rank)
    except (DriftError, NonFiniteError, StoppedError) as error:
        code = refuse(str(error), comm.rank, EXIT_FAILED)
    leave(comm, timer)
    return code


def leave(comm: Comm, timer: PhaseTimer) -> None:
    """Disconnect together with all other ranks."""
    timer.start("comm")
    comm.barrier()
    comm.close()


def refuse(message: str, rank: int, code: int = EXIT_USER_ERROR) -> int:
    """Log, on rank 0 only, an error that every rank raised; return the exit code. Other ranks wait for rank 0."""
    if rank == 0:
        log.error(message)
    else:
        time.sleep(3)
    return code


def refuse_alone(message: str, stop: StopSignal) -> int:
    """Log an error that perhaps only this rank raised, since it cannot ask the others; return the exit code.

    Usually all ranks raise the same, and rank 0 logs it for all. Another rank waits until rank 0 would have logged it
    and ended the job, and then logs the error itself.
    """
    rank = launcher_rank()
    if rank == 0:
        log.error(message)
        if launcher_size() != 1:
            # Until other ranks raise it too: srun returns the highest exit code, and a rank that it ends has 143.
            time.sleep(3)
        return EXIT_USER_ERROR
    # On a busy machine rank 0 may start seconds later, and it waits 3 s after its message.
    deadline = time.monotonic() + 8.0
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.1)
    if not stop.requested:
        log.error(f"rank {rank} alone: {message}")
    return EXIT_USER_ERROR
