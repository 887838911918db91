"""`hvdqn bench loop`: time the training loop on all ranks of a job.

Imports, building the parts, evaluations, checkpoints and metrics are not timed. Unless --whole-run is given, all
actions are random: if one number of ranks learned better than another, its episodes would be longer, and longer
episodes alone make CartPole faster.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from hvdqn.bench.report import Parser, above_zero, print_table, write_json
from hvdqn.bench.training import (
    Job,
    TrainingRun,
    acting_parts,
    check_config,
    run_on_all_ranks,
    start_training,
)
from hvdqn.comm import Comm
from hvdqn.config import Config
from hvdqn.errors import UserError
from hvdqn.metrics import PHASES
from hvdqn.parts import replay_rows

PROG = "hvdqn bench loop"
WARM_UP_ITERATIONS = 100
ROUNDS = 4
ENDLESS_ENV_STEPS = 10**12
LOCAL_RANK_VARIABLES = ("HOROVOD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_RANK", "SLURM_LOCALID")


@dataclass(frozen=True)
class Span:
    """The time that a number of iterations of the training loop took on this rank."""

    iterations: int
    updates: int
    wall_seconds: float
    seconds: dict[str, float]
    """By phase."""

    def __add__(self, other: Span) -> Span:
        return Span(
            self.iterations + other.iterations,
            self.updates + other.updates,
            self.wall_seconds + other.wall_seconds,
            {phase: self.seconds[phase] + other.seconds[phase] for phase in self.seconds},
        )


@dataclass(frozen=True)
class LoopTiming:
    """The speed of the loop. Rates are global; seconds are means over ranks."""

    env: str
    preset: str
    comm: str
    world_size: int
    envs_per_rank: int
    batch_per_rank: int
    parameters: int
    replay_bytes_per_transition: float
    env_steps: int
    updates: int
    wall_seconds: float
    env_steps_per_second: float
    updates_per_second: float
    seconds_per_iteration: dict[str, float]
    """By phase. One iteration steps every environment once and takes the updates that become due. `comm_exposed` is the
    time that a rank waits for other ranks. `comm_hidden` is communication that overlaps with other phases; the other
    phases add up to the iteration."""

    @property
    def exposed_share(self) -> float:
        """The share of an iteration during which ranks wait for each other."""
        return self.seconds_per_iteration["comm_exposed"] / self.iteration_seconds

    @property
    def iteration_seconds(self) -> float:
        """Seconds of one iteration."""
        phases = self.seconds_per_iteration
        return sum(phases.values()) - phases["comm_hidden"]

    @property
    def updates_per_iteration(self) -> float:
        """Mean number of updates per iteration."""
        return self.updates * self.world_size * self.envs_per_rank / self.env_steps


def as_json(timing: LoopTiming) -> dict[str, Any]:
    """Return the timing as JSON data."""
    return asdict(timing)


def from_json(content: Mapping[str, Any]) -> LoopTiming:
    """Return the timing that `as_json` converted.

    Raises:
        KeyError: a field is missing, so another command wrote the file.
    """
    return LoopTiming(**{field.name: content[field.name] for field in fields(LoopTiming)})


def time_span(run: TrainingRun, iterations: int, overlap: bool) -> Span:
    """Run and time this many iterations; a collective call.

    Raises:
        StoppedError: a rank received a signal to stop.
    """
    clock, timer = run.parts.clock, run.parts.timer
    run.comm.barrier()  # so that no rank waits for a rank that was late before
    updates, before, began = clock.updates, timer.seconds(), time.perf_counter()
    run.train(iterations, overlap)
    wall_seconds, after = time.perf_counter() - began, timer.seconds()
    seconds: dict[str, float] = {phase: after[phase] - before[phase] for phase in PHASES}
    return Span(iterations, clock.updates - updates, wall_seconds, seconds)


def time_loop(run: TrainingRun, seconds: float) -> LoopTiming:
    """Time the loop with random actions after learning has started; a collective call.

    Hidden communication is the time from the launch of an allreduce to its arrival, minus the time that a rank waited
    for it. No engine reports when a message arrived. Without overlap a rank launches and waits at once, so that it
    waits from launch to arrival. Spans with and without overlap alternate, so that both run under the same load.

    Args:
        run: a training that has just started.
        seconds: approximate wall time of the measurement.
    """
    overlap = run.config.parallel.overlap
    run.use_random_actions()
    time_span(run, run.parts.clock.learning_starts // run.env_steps_per_iteration + 1, overlap)
    warm_up = time_span(run, WARM_UP_ITERATIONS, overlap)
    alternate = overlap and run.comm.size > 1
    spans = ROUNDS * (2 if alternate else 1)
    iterations = int(seconds / spans * warm_up.iterations / warm_up.wall_seconds)
    iterations = run.comm.broadcast_object(max(iterations, 1))  # ranks measure different times
    overlapped, waiting = [], []
    for _ in range(ROUNDS):
        overlapped.append(time_span(run, iterations, overlap))
        if alternate:
            waiting.append(time_span(run, iterations, overlap=False))
    return average_over_ranks(run, overlapped, waiting)


def time_whole_run(run: TrainingRun) -> LoopTiming:
    """Time all env steps of the run, including those before learning starts; a collective call."""
    iterations = -(-run.config.run.total_env_steps // run.env_steps_per_iteration)
    return average_over_ranks(run, [time_span(run, iterations, run.config.parallel.overlap)], [])


def average_over_ranks(run: TrainingRun, timed: Sequence[Span], waiting: Sequence[Span]) -> LoopTiming:
    """Return the mean of the times that the ranks measured; a collective call.

    Args:
        run: the training that was timed.
        timed: the spans with the user's settings.
        waiting: the same without overlap; empty if nothing overlaps.
    """
    comm, config, parts = run.comm, run.config, run.parts
    total = sum(timed[1:], timed[0])
    mine = {phase: seconds / total.iterations for phase, seconds in total.seconds.items()}
    mine["comm_exposed"], mine["comm_hidden"] = mine.pop("comm"), 0.0
    if waiting:
        waited = sum(waiting[1:], waiting[0])
        mine["comm_hidden"] = max(waited.seconds["comm"] / waited.iterations - mine["comm_exposed"], 0.0)
    ranks = comm.all_gather_object((total.wall_seconds, mine))
    wall_seconds = sum(seconds for seconds, _ in ranks) / comm.size
    env_steps = total.iterations * run.env_steps_per_iteration
    return LoopTiming(
        env=config.environment.env,
        preset=config.preset,
        comm=comm.name,
        world_size=comm.size,
        envs_per_rank=config.environment.envs_per_rank,
        batch_per_rank=config.batch_per_rank,
        parameters=parts.learner.parameters.numel(),
        replay_bytes_per_transition=acting_parts(parts).replay.nbytes / replay_rows(config, parts.role),
        env_steps=env_steps,
        updates=total.updates,
        wall_seconds=wall_seconds,
        env_steps_per_second=env_steps / wall_seconds,
        updates_per_second=total.updates / wall_seconds,
        seconds_per_iteration={phase: sum(s[phase] for _, s in ranks) / comm.size for phase in mine},
    )


def benchmark_config(config: Config, comm: Comm, whole_run: bool) -> Config:
    """Return the settings without everything that is not timed; a collective call.

    Unless the whole run is timed, learning starts after a few minibatches and the run has no end.

    Raises:
        UserError: on all ranks, if the settings do not fit the ranks.
    """
    config = config.replace(
        eval_every=0, checkpoint_every=0, checkpoint_replay="no", log_every=0, resume="never"
    )
    if not whole_run:
        a_few_minibatches = 10 * comm.size * config.batch_per_rank
        config = config.replace(
            learning_starts=min(config.replay.learning_starts, a_few_minibatches),
            # The measurement may take more env steps than the run, and a schedule must not pass its end.
            total_env_steps=ENDLESS_ENV_STEPS,
        )
    check_config(config, comm, steps_together=True)
    return config


def print_loop(timing: LoopTiming) -> None:
    """Print the seconds of each phase."""
    iteration = timing.iteration_seconds
    rows = [
        (name.replace("_", " "), f"{1e6 * seconds:,.1f}", f"{seconds / iteration:.1%}")
        for name, seconds in timing.seconds_per_iteration.items()
    ]
    print_table(
        f"{timing.env}, {timing.world_size} x {timing.comm}: {timing.env_steps_per_second:,.0f} env steps/s, "
        f"{timing.updates_per_second:,.1f} updates/s; {timing.replay_bytes_per_transition:,.0f} bytes per transition",
        ("phase", "us per iteration", "share"),
        [*rows, ("iteration", f"{1e6 * iteration:,.1f}", "")],
    )


def pin_to_core() -> None:
    """Restrict this rank, and the threads that it will start, to one core of its own.

    Raises:
        UserError: there are more ranks on this host than cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        return  # the launcher has pinned it
    local_rank = next((int(os.environ[name]) for name in LOCAL_RANK_VARIABLES if name in os.environ), 0)
    if local_rank >= len(cores):
        raise UserError(
            f"--pin gives each rank a core, and rank {local_rank} of this host may use {len(cores)}; start fewer ranks"
        )
    os.sched_setaffinity(0, {cores[local_rank]})


def pin_if_asked(options: Namespace) -> None:
    """Pin this rank to a core if `--pin` is given."""
    if options.pin:
        pin_to_core()


def run_benchmark(options: Namespace, _: Sequence[str], job: Job) -> None:
    """Time the loop, then print and write the result on rank 0."""
    config = benchmark_config(job.config, job.comm, options.whole_run)
    with start_training(config, job) as run:
        timing = time_whole_run(run) if options.whole_run else time_loop(run, options.seconds)
    if job.comm.rank == 0:
        print_loop(timing)
        write_json(options.json, as_json(timing))


def main(argv: Sequence[str]) -> int:
    """Run the command on every rank; return the exit code."""
    parser = Parser(PROG, __doc__, "bench-loop.json")
    parser.add_argument("--seconds", type=above_zero, default=8.0, help="duration of the measurement")
    parser.add_argument(
        "--whole-run",
        action="store_true",
        help="time all env steps of the run, including those before learning starts",
    )
    parser.add_argument("--pin", action="store_true", help="give each rank, with all its threads, one core")
    return run_on_all_ranks(parser, argv, run_benchmark, pin_if_asked)
