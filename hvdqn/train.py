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

gc.disable()  # imports leave no garbage, and searching for it would slow the start of every rank

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

gc.freeze()  # the garbage collector never searches the objects that imports created
gc.enable()

log = logging.getLogger(__name__)

Work = Callable[[Config, Comm, StopSignal, PhaseTimer], int]


def train(config: Config, comm: Comm, stop: StopSignal, timer: PhaseTimer) -> int:
    """Open the run directory, train to the end or to a vote to stop, and return the exit code.

    Raises:
        UserError: on all ranks, if the user's input is wrong.
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
            except UserError as error:  # perhaps on this rank alone: the others would train on
                raise FoundAloneError(str(error)) from error
            finally:
                trainer.recorder.metrics.close()  # so that an error is printed below the progress bar
    except UserError:
        # This removes the directory only if it is empty, so an earlier run stays.
        with suppress(OSError):
            run_dir.rmdir()
        raise
    return EXIT_REQUEUE if trainer.stopped_by == "signal" else EXIT_FINISHED


def main(argv: Sequence[str] | None = None, work: Work = train) -> int:
    """Run one rank in a program or notebook of the user; return its exit code.

    This restores signal handlers and settings of the process at the end. Off the main thread it does not touch them, so
    that no signal stops the run.

    Args:
        argv: the flags; None: those of this process.
        work: called with the configuration, the collectives, the stop signal and the timer once ranks are connected.
    """
    with borrowed_process(), closing(StopSignal(own_process=False)) as stop:
        return run(argv, work, stop)


def command(argv: Sequence[str] | None = None, work: Work = train) -> int:
    """Run one rank as the `hvdqn train` command: as `main`, but never restore signal handlers and process settings."""
    tune_process()
    return run(argv, work, StopSignal())


@folder_remembered()
def run(argv: Sequence[str] | None, work: Work, stop: StopSignal) -> int:
    """Read the settings, connect the ranks and call `work`; return the exit code."""
    try:
        setup_logging(launcher_rank(), launcher_size())
        config = parse(sys.argv[1:] if argv is None else argv)
        find_spec(config.environment.env)  # raises for an unknown id now: connecting takes seconds
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
    timer.start("comm")
    comm.barrier()
    comm.close()
    return code


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


if __name__ == "__main__":
    sys.exit(command())
