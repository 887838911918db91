"""Start a run: check that all ranks agree, build the trainer, and restore the newest checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import torch

from hvdqn.callbacks import Callback, load_callbacks
from hvdqn.checkpoint import Checkpoint, Checkpoints, find_newest, reset_environments, restore
from hvdqn.clock import Clock
from hvdqn.comm import Comm
from hvdqn.config import Config, check_engine, check_groups, check_world, fitting_preset
from hvdqn.envs import global_generators_kept, make_environments
from hvdqn.errors import UserError
from hvdqn.faults import StopSignal, raise_on_all_ranks
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts
from hvdqn.prefill import prefill
from hvdqn.provenance import Launch
from hvdqn.rank import Parts
from hvdqn.recorder import Recorder
from hvdqn.role import assign_role
from hvdqn.run_directory import record_config
from hvdqn.summary import log_header
from hvdqn.trainer import ServingTrainer, Trainer

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Trainer)


def check_ranks(config: Config, comm: Comm) -> None:
    """Check that all ranks have equal settings, which fit the engine and the number of ranks.

    All ranks must call it together.

    Raises:
        UserError: on all ranks, if a check fails.
    """
    check_same_config(config, comm)
    check_engine(config, comm.name, comm.size)
    check_groups(config, comm.size)
    check_world(config, assign_role(config.parallel.sync, comm.rank, comm.size).of)


def check_same_config(config: Config, comm: Comm) -> None:
    """Check that all ranks were started with the same settings.

    Raises:
        UserError: on all ranks, naming the first setting that differs.
    """
    everyone = comm.all_gather_object(config.flat())
    for rank, settings in enumerate(everyone):
        differing = [name for name, value in settings.items() if value != everyone[0][name]]
        if differing:
            name = differing[0]
            raise UserError(
                f"ranks were started with different settings: --{name.replace('_', '-')} is {everyone[0][name]!r} on "
                f"rank 0 and {settings[name]!r} on rank {rank}; start all ranks with one command line"
            )


def compare_cpus(config: Config, comm: Comm, device: torch.device) -> list[str]:
    """Return a warning if torch uses different CPU instructions on different ranks, else an empty list.

    Results then differ by rounding, so that weights drift apart which must be equal. All ranks must call this together.
    """
    everyone = comm.all_gather_object(torch.backends.cpu.get_cpu_capability())
    if len(set(everyone)) == 1 or config.parallel.sync != "gradients" or device.type != "cpu":
        return []
    ranks = {name: [str(rank) for rank, other in enumerate(everyone) if other == name] for name in everyone}
    described = ", ".join(f"{name} on rank {', '.join(found)}" for name, found in ranks.items())
    common = "avx2" if set(ranks) == {"AVX2", "AVX512"} else "default"
    return [
        f"the ranks' CPUs have different instructions ({described}), which round differently: weights that must be "
        f"equal will differ, which ends the run. Set ATEN_CPU_CAPABILITY={common} on all ranks"
    ]


def check_that_it_learns(config: Config, clock: Clock) -> None:
    """Check that the run does not end before its first update.

    Raises:
        UserError: the run would end before its first update.
    """
    if clock.updates_owed(config.run.total_env_steps) == 0:
        raise UserError(
            f"{config.run.total_env_steps:,} env steps end before the first update: with this n-step and these "
            f"environments learning starts at {clock.learning_starts:,}, and an update takes "
            f"{clock.global_batch / config.replay.replay_ratio:,.6g} more; raise --total-env-steps"
        )


def check_evaluation(config: Config, parts: Parts) -> None:
    """Check, before training, that evaluations can be played where `--eval-env` and `--eval-env-kwargs` say.

    Raises:
        UserError: the environment cannot be made, or its observations or actions are not those of training.
    """
    environment = config.evaluation_environment()
    if environment is config.environment or parts.acting is None:
        return
    trained = parts.acting.envs
    try:
        with global_generators_kept(), closing(make_environments(environment, 1, 0, training=False)) as envs:
            found = envs.observation_shape, envs.observation_dtype, envs.num_actions, envs.action_shape
    except UserError as error:
        raise UserError(f"the environment of evaluations: {error}") from error
    wanted = trained.observation_shape, trained.observation_dtype, trained.num_actions, trained.action_shape
    if found != wanted:
        described = [
            f"{dtype} observations {list(shape)} and {n} actions"
            + "".join(f" in {d} dimensions" for d in actions)
            for shape, dtype, n, actions in (found, wanted)
        ]
        raise UserError(
            f"evaluations in '{environment.env}' have {described[0]}, and training has {described[1]}; give an "
            "--eval-env and --eval-env-kwargs with the same"
        )


def make_trainer(config: Config, comm: Comm, stop: StopSignal, parts: Parts, recorder: Recorder) -> Trainer:
    """Create the trainer for this rank: `ServingTrainer` if it only serves other ranks, else `Trainer`."""
    kind = Trainer if parts.role.acts else ServingTrainer
    return kind(config, comm, stop, parts, recorder)


def named_callbacks(config: Config, comm: Comm) -> list[Callback]:
    """Return the callbacks that the settings name; a collective call if there are any.

    Raises:
        UserError: on all ranks.
    """
    return raise_on_all_ranks(comm, lambda: load_callbacks(config)) if config.run.callback else []


def start_run(
    config: Config,
    comm: Comm,
    run_dir: Path,
    stop: StopSignal,
    timer: PhaseTimer,
    make: Callable[[Config, Comm, StopSignal, Parts, Recorder], T],
    callbacks: Sequence[Callback] = (),
) -> T:
    """Build this rank's parts and trainer, and begin the run or resume it from its newest checkpoint.

    All ranks must call it together.

    Args:
        config: the checked configuration, the same on every rank.
        comm: the collectives over all ranks.
        run_dir: the directory that the run is recorded in.
        stop: holds whether this rank received a signal to stop.
        timer: counts this rank's seconds by phase.
        make: creates the trainer, as `make_trainer` does.
        callbacks: of the program; those of `--callback` are added.

    Raises:
        UserError: on all ranks, if the user's input is wrong.
    """
    callbacks = [*callbacks, *named_callbacks(config, comm)]
    launch = Launch(comm)
    checkpoints = Checkpoints(run_dir / "checkpoints", comm, config.run.checkpoint_keep, timer)
    checkpoint, warnings = find_newest(config, checkpoints, run_dir)
    parts = build_parts(config, comm, timer, checkpoint.env_steps if checkpoint else 0)
    check_that_it_learns(config, parts.clock)
    if config.evaluation_environment() is not config.environment:
        raise_on_all_ranks(comm, lambda: check_evaluation(config, parts), timer)
    # A run that has already finished keeps its config.yaml, since it does not train with the new settings.
    if checkpoint is None or checkpoint.env_steps < config.run.total_env_steps:
        record_config(config, comm, run_dir, launch.describe(), anew=checkpoint is None)
    recorder = Recorder(config, comm, run_dir, parts, checkpoints, stop, callbacks)
    trainer = make(config, comm, stop, parts, recorder)
    begin(trainer, checkpoint, [*warnings, *compare_cpus(config, comm, parts.device)])
    return trainer


def begin_with(config: Config, comm: Comm, parts: Parts) -> list[str]:
    """Fill replay with the transitions of `--prefill`; return a line of text on each thing that a new run begins with.

    Raises:
        UserError: on all ranks, if they cannot be read or do not fit.
    """
    lines = [f"the weights are those of {config.run.init_from}"] if config.run.init_from else []
    if config.run.prefill:
        held = raise_on_all_ranks(comm, lambda: prefill(config, parts), parts.timer)
        total = sum(comm.all_gather_object(held))
        lines.append(f"replay begins with {total:,} transitions of {config.run.prefill}")
    return lines


def begin(trainer: Trainer, checkpoint: Checkpoint | None, warnings: Sequence[str]) -> None:
    """Begin the run, or resume it from a checkpoint, and log its header.

    Args:
        trainer: this rank's trainer, just created.
        checkpoint: the checkpoint to resume from; None: begin the run.
        warnings: lines to log below the header.
    """
    config, comm, parts, recorder = trainer.config, trainer.comm, trainer.parts, trainer.recorder
    changes: list[str] = []
    if checkpoint is None:
        changes = begin_with(config, comm, parts)
        raise_on_all_ranks(comm, lambda: reset_environments(parts), parts.timer)
        preset = fitting_preset(config.environment.env)
        if not config.preset and preset:
            changes.append(f"--preset {preset} has tuned settings for {config.environment.env}")
    else:
        recorder.progress, changes = restore(parts, checkpoint, config, comm, recorder.totals)
        recorder.saved_at_env_steps = parts.clock.env_steps
    recorder.resume()
    log_header(config, comm, parts, recorder.run_dir)
    for line in warnings:
        log.warning(line)
    for line in changes:
        log.info(line)
    total = config.run.total_env_steps
    if parts.clock.env_steps >= total:
        log.info(
            f"this run has had its {total:,} env steps: raise --total-env-steps to go on, or choose another "
            f"--run-dir for another run"
        )
    recorder.decide_on_replay()
    if parts.clock.env_steps and parts.clock.due(config.run.eval_every):
        trainer.evaluate()  # a signal may have ended the evaluation that was due at this env step
    trainer.stop_if_return_reached()
