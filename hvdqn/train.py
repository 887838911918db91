"""Train one deep Q-network on all ranks of a job.

    python -m hvdqn.train --preset cartpole                        one process
    horovodrun -np 8 python -m hvdqn.train --preset atari          Horovod, over Gloo or MPI
    mpirun -np 8 python -m hvdqn.train --preset atari              Horovod, or --comm mpi
    srun --mpi=pmix python -m hvdqn.train --preset atari           the same inside a Slurm job
    torchrun --nproc-per-node 8 -m hvdqn.train --preset atari      torch.distributed, no Horovod needed

Every rank runs this file. It connects the ranks, opens the run directory, builds the trainer and trains; the loop is in
`hvdqn/trainer.py`. Settings and their flags: `hvdqn/config/settings.py`, or `--help`. Exit codes: 0 finished, 2 wrong
input, 75 stopped by a signal after a checkpoint (start it again with the same run directory to resume), 1 otherwise.
"""

from __future__ import annotations

import gc

gc.disable()  # imports leave nothing to collect, and looking for it would slow the start of every rank

import logging
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing, suppress

from hvdqn.comm import Comm, connect, launcher_rank, launcher_size
from hvdqn.config import Config, parse
from hvdqn.envs import find_spec, kill_all_workers
from hvdqn.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    DriftError,
    FoundAloneError,
    LaunchError,
    NonFiniteError,
    StoppedError,
    UserError,
)
from hvdqn.faults import StopSignal, Watchdog
from hvdqn.logs import setup_logging
from hvdqn.metrics import PhaseTimer, check_tracker
from hvdqn.parts import device_kind
from hvdqn.paths import folder_remembered
from hvdqn.process import borrowed_process, tune_process
from hvdqn.run_directory import open_run_dir, sole_job
from hvdqn.startup import check_ranks, make_trainer, start_run

gc.freeze()  # objects made by imports are never looked at again
gc.enable()

log = logging.getLogger(__name__)

Work = Callable[[Config, Comm, StopSignal, PhaseTimer], int]


def train(config: Config, comm: Comm, stop: StopSignal, timer: PhaseTimer) -> int:
    """Train, evaluate and record; return the exit code.

    Raises:
        UserError: the input is wrong, on all ranks.
    """
    check_ranks(config, comm)
    run_dir = open_run_dir(config, comm)
    try:
        seconds = config.parallel.stall_timeout
        heartbeats = run_dir / "heartbeats"
        with sole_job(run_dir, comm), closing(Watchdog(heartbeats, comm, timer, seconds, stop=stop)):
            trainer = start_run(config, comm, run_dir, stop, timer, make_trainer)
            try:
                trainer.complete()
            except UserError as error:  # perhaps only this rank has found it: the others do not know
                raise FoundAloneError(str(error)) from error
            finally:
                trainer.recorder.metrics.close()  # so that an error is printed below the progress bar
    except UserError:
        # Removes the directory if it is empty: a run that was there before stays.
        with suppress(OSError):
            run_dir.rmdir()
        raise
    return EXIT_REQUEUE if trainer.stopped_by == "signal" else EXIT_FINISHED


def main(argv: Sequence[str] | None = None, work: Work = train) -> int:
    """Run one rank in a program or notebook of the user; return its exit code.

    Signal handlers and settings of the process are put back at the end. Off the main thread they are left alone, and
    no signal stops the run.

    Args:
        argv: the flags; those of this process if None.
        work: what the ranks do once they are connected.
    """
    with borrowed_process(), closing(StopSignal(own_process=False)) as stop:
        return run(argv, work, stop)


def command(argv: Sequence[str] | None = None, work: Work = train) -> int:
    """Run one rank as the `hvdqn train` command does: as `main`, but this process belongs to it until it exits."""
    tune_process()
    return run(argv, work, StopSignal())


@folder_remembered()
def run(argv: Sequence[str] | None, work: Work, stop: StopSignal) -> int:
    """Connect the ranks and do the work; return the exit code."""
    try:
        setup_logging(launcher_rank(), launcher_size())
        config = parse(sys.argv[1:] if argv is None else argv)
        find_spec(config.environment.env)  # before connecting, which takes seconds
        check_tracker(config.run.track)
        comm = connect(config.parallel.comm, device_kind(config), config.parallel.stall_timeout)
    except (UserError, LaunchError) as error:
        return refuse_alone(str(error), stop)
    setup_logging(comm.rank, comm.size)
    timer = PhaseTimer()
    try:
        return run_and_leave(work, config, comm, stop, timer)
    except BaseException as error:  # an environment may also raise SystemExit
        return fail(error, comm, stop, timer)


def fail(error: BaseException, comm: Comm, stop: StopSignal, timer: PhaseTimer) -> int:
    """Report an exception and end the job; return the exit code only in a program of the user without other ranks."""
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
    """Report an exception with its traceback, or that other ranks do not answer: the rank that failed reports more."""
    if timer.phase != "comm":
        log.error(f"rank {comm.rank} of {comm.size} failed: {''.join(traceback.format_exception(error))}")
        return
    reason = traceback.format_exception_only(error)[-1].splitlines()[0]
    log.error(f"rank {comm.rank} of {comm.size} failed: the other ranks do not answer: {reason}")
    if comm.size > 1:
        # Launchers use the exit code of the rank that ends first: let that be the one that failed.
        time.sleep(1)


def run_and_leave(work: Work, config: Config, comm: Comm, stop: StopSignal, timer: PhaseTimer) -> int:
    """Do the work, or report what all ranks found wrong; leave the job together with all other ranks."""
    try:
        code = work(config, comm, stop, timer)
    except UserError as error:
        code = refuse(str(error), comm.rank)
    except (DriftError, NonFiniteError, StoppedError) as error:
        code = refuse(str(error), comm.rank, EXIT_FAILED)
    timer.start("comm")
    comm.barrier()
    comm.close()
    return code


def refuse(message: str, rank: int, code: int = EXIT_USER_ERROR) -> int:
    """Report once what every rank found wrong, and return the exit code; other ranks give rank 0 time for that."""
    if rank == 0:
        log.error(message)
    else:
        time.sleep(3)
    return code


def refuse_alone(message: str, stop: StopSignal) -> int:
    """Report what this rank found wrong before the ranks were connected, or while they train; return the exit code.

    Mostly all ranks find the same, and rank 0 reports it for all. A rank that found something wrong alone waits until
    rank 0 would have reported and ended the job, then reports it itself.
    """
    rank = launcher_rank()
    if rank == 0:
        log.error(message)
        if launcher_size() != 1:
            # Until the others find it, too: srun returns the highest code, and that of a rank it ended is 143.
            time.sleep(3)
        return EXIT_USER_ERROR
    # On a busy machine rank 0 may start seconds later, and then waits itself.
    deadline = time.monotonic() + 8.0
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.1)
    if not stop.requested:
        log.error(f"rank {rank} alone: {message}")
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(command())
