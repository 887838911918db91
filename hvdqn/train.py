"""Train one deep Q-network on all ranks of a job.

    python -m hvdqn.train --preset cartpole                        one process
    horovodrun -np 8 python -m hvdqn.train --preset atari          Horovod, over Gloo or MPI
    mpirun -np 8 python -m hvdqn.train --preset atari              Horovod, or --comm mpi
    srun --mpi=pmix python -m hvdqn.train --preset atari           the same inside a Slurm job
    torchrun --nproc-per-node 8 -m hvdqn.train --preset atari      torch.distributed, no Horovod needed

Every rank runs this file. It connects the ranks, opens the run directory, builds the trainer and trains; the loop is in
`hvdqn/trainer.py`. A program calls `hvdqn.train(...)`, which is `train_here`. Settings and their flags:
`hvdqn/config/settings.py`, or `--help`. Exit codes: 0 finished, 2 wrong input, 75 stopped by a signal after a
checkpoint (start it again with the same run directory to resume), 1 otherwise.
"""

from __future__ import annotations

import gc

gc.disable()  # imports leave no garbage, and searching for it would slow the start of every rank

import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from hvdqn.api import Result, make_config
from hvdqn.callbacks import Callback, check_callback
from hvdqn.comm import Comm, connect, launcher_rank, launcher_size
from hvdqn.config import Config, parse
from hvdqn.envs import find_spec, kill_all_workers
from hvdqn.errors import EXIT_FINISHED, EXIT_REQUEUE, FoundAloneError, LaunchError, UserError
from hvdqn.faults import StopSignal, Watchdog
from hvdqn.job import TOGETHER, Work, fail, leave, refuse_alone, run_and_leave
from hvdqn.logs import setup_logging
from hvdqn.metrics import PhaseTimer, check_tracker
from hvdqn.parts import engine_settings
from hvdqn.paths import folder_remembered
from hvdqn.process import borrowed_process, tune_process
from hvdqn.run_directory import open_run_dir, sole_job
from hvdqn.startup import check_ranks, make_trainer, start_run
from hvdqn.trainer import Trainer

gc.freeze()  # the garbage collector never searches the objects that imports created
gc.enable()


def train_on_ranks(
    config: Config, comm: Comm, stop: StopSignal, timer: PhaseTimer, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """Train, evaluate and record; return the trainer, which is done.

    Raises:
        UserError: on all ranks, if the user's input is wrong.
    """
    check_ranks(config, comm)
    run_dir = open_run_dir(config, comm)
    try:
        seconds = config.parallel.stall_timeout
        heartbeats = run_dir / "heartbeats"
        with sole_job(run_dir, comm), closing(Watchdog(heartbeats, comm, timer, seconds, stop=stop)):
            trainer = start_run(config, comm, run_dir, stop, timer, make_trainer, callbacks)
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
    return trainer


def train(config: Config, comm: Comm, stop: StopSignal, timer: PhaseTimer) -> int:
    """Train, evaluate and record; return the exit code.

    Raises:
        UserError: the input is wrong, on all ranks.
    """
    trainer = train_on_ranks(config, comm, stop, timer)
    return EXIT_REQUEUE if trainer.stopped_by == "signal" else EXIT_FINISHED


@folder_remembered()
def train_here(
    config: Config | str | Path | None = None,
    *,
    env: str | Callable[..., Any] | None = None,
    callbacks: Sequence[Callback] = (),
    signals: bool = False,
    **settings: Any,
) -> Result:
    """Train in this process, which may be a notebook, a thread, or one rank under a launcher; call it on every rank.

    Args:
        config: settings, or a YAML file of them. By default those of `preset`, if it is among `settings`.
        env: id of the environment, or a function of a module that makes one.
        callbacks: called after episodes, logs, evaluations and checkpoints.
        signals: let SIGINT, SIGTERM and SIGUSR2 stop the run after a checkpoint. Only on the main thread.
        **settings: by name, as the keys of a YAML file: `total_env_steps=20_000`.

    Raises:
        UserError: the input is wrong.
        LaunchError: the ranks cannot be connected.
        NonFiniteError, DriftError: training failed on all ranks.
        Exception: what the environment or a callback raised. With several ranks it ends the job instead.
    """
    setup_logging(launcher_rank(), launcher_size())
    made = make_config(config, env, settings)
    for callback in callbacks:
        check_callback(callback, "an entry of callbacks")
    find_spec(made.environment.env)
    with borrowed_process(), closing(StopSignal(own_process=False, listen=signals)) as stop:
        comm = connect(*engine_settings(made))
        setup_logging(comm.rank, comm.size)
        timer = PhaseTimer()
        try:
            recorder = train_on_ranks(made, comm, stop, timer, callbacks).recorder
        except TOGETHER:
            leave(comm, timer)
            raise
        except BaseException as error:
            if comm.size > 1:  # the other ranks wait for this one
                fail(error, comm, stop, timer)
            kill_all_workers()
            if isinstance(error, FoundAloneError):
                raise UserError(str(error)) from error
            raise
        leave(comm, timer)
    return Result(recorder.run_dir, recorder.summary, recorder.returns)


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
        comm = connect(*engine_settings(config))
    except (UserError, LaunchError) as error:
        return refuse_alone(str(error), stop)
    setup_logging(comm.rank, comm.size)
    timer = PhaseTimer()
    try:
        return run_and_leave(work, config, comm, stop, timer)
    except BaseException as error:  # an environment may also raise SystemExit
        return fail(error, comm, stop, timer)


class _CallableModule(ModuleType):
    """This module, which can be called: `hvdqn.train(...)` trains, and `hvdqn.train.main(flags)` is still there."""

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        """See `train_here`."""
        return train_here(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule


if __name__ == "__main__":
    sys.exit(command())
