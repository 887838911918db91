"""`hvdqn bench loop`: time the training loop itself, on all ranks of a job. The other benchmarks start it.

Evaluations, checkpoints and records are left out, and so is what comes before the loop: imports, building the parts.
Except in whole runs, all actions are random, whatever the network chose: where one number of ranks learns better than
another its episodes are longer, and on CartPole that alone makes a rank 5% faster.
"""

from __future__ import annotations

import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from hvdqn.bench import ranks
from hvdqn.bench.report import Parser, above_zero, print_table, write_json
from hvdqn.comm import Comm
from hvdqn.config import Config, acting_ranks, check_world
from hvdqn.errors import EXIT_FINISHED, StoppedError, UserError
from hvdqn.faults import StopSignal
from hvdqn.metrics import PHASES, PhaseTimer
from hvdqn.parts import make_epsilons
from hvdqn.train import Training, Work, check_same_config, start

PROG = "hvdqn bench loop"
WARM_UP_ITERATIONS = 100
ROUNDS = 4
ENDLESS_ENV_STEPS = 10**12


@dataclass(frozen=True)
class Span:
    """What a stretch of the loop took on this rank."""

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
class Loop:
    """How fast the loop ran. Rates are global; seconds are means over ranks."""

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
    """By phase. One iteration is one step of every environment and the updates that it made due. `comm_exposed` is what
    a rank waits for others; `comm_hidden` travels behind other work, and all but it sum to the iteration."""

    @property
    def exposed_share(self) -> float:
        """Share of an iteration that ranks wait for each other."""
        return self.seconds_per_iteration["comm_exposed"] / self.iteration_seconds

    @property
    def iteration_seconds(self) -> float:
        """Of one iteration."""
        phases = self.seconds_per_iteration
        return sum(phases.values()) - phases["comm_hidden"]

    @property
    def updates_per_iteration(self) -> float:
        """Mean number of updates that an iteration made due."""
        return self.updates * self.world_size * self.envs_per_rank / self.env_steps


def as_json(loop: Loop) -> dict[str, Any]:
    """For JSON."""
    return asdict(loop)


def from_json(content: Mapping[str, Any]) -> Loop:
    """Back from JSON.

    Raises:
        KeyError: something is missing: the file was written by another command.
    """
    return Loop(**{field.name: content[field.name] for field in fields(Loop)})


def run_span(training: Training, iterations: int, overlap: bool) -> Span:
    """Run the loop for so many iterations; a collective call.

    Raises:
        StoppedError: a rank was told to stop.
    """
    training.config = training.config.replace(overlap=overlap)
    clock, timer = training.clock, training.timer
    training.comm.barrier()  # nobody's time holds another's lateness from before
    updates, before, began = clock.updates, timer.seconds(), time.perf_counter()
    training.run(clock.env_steps + iterations * clock.envs)
    if training.learner.stop_voted:
        raise StoppedError("stopped by a signal before all was measured")
    wall_seconds, after = time.perf_counter() - began, timer.seconds()
    seconds: dict[str, float] = {phase: after[phase] - before[phase] for phase in PHASES}
    return Span(iterations, clock.updates - updates, wall_seconds, seconds)


def play_at_random(training: Training) -> None:
    """From now on every action that was chosen is replaced by a random one."""
    config = training.config.replace(exploration="linear", epsilon_start=1.0, epsilon_end=1.0)
    training.parts.epsilons = make_epsilons(config, training.comm)


def measure(training: Training, seconds: float) -> Loop:
    """Time the loop after learning has started; a collective call.

    Hidden communication is the time from an allreduce's launch to its arrival, less what a rank waited for it. No
    engine says when a message arrived. Without overlap a rank launches and waits at once, so that what it waits then
    is the time from launch to arrival. Stretches with and without overlap take turns: both see the same machine.

    Args:
        training: begun.
        seconds: of wall time, about.
    """
    clock, overlap = training.clock, training.config.parallel.overlap
    play_at_random(training)
    run_span(training, clock.learning_starts // clock.envs + 1, overlap)
    warm = run_span(training, WARM_UP_ITERATIONS, overlap)
    paired = overlap and training.comm.size > 1
    pace = warm.wall_seconds / warm.iterations
    # Rank 0's choice, for the ranks' watches differ.
    iterations = training.comm.broadcast_object(max(int(seconds / ROUNDS / (1 + paired) / pace), 1))
    timed, waiting = [], []
    for _ in range(ROUNDS):
        timed.append(run_span(training, iterations, overlap))
        if paired:
            waiting.append(run_span(training, iterations, overlap=False))
    return summarise(training, timed, waiting)


def whole_run(training: Training) -> Loop:
    """Time all env steps of the run, those before learning starts too; a collective call."""
    iterations = -(-training.config.run.total_env_steps // training.clock.envs)
    return summarise(training, [run_span(training, iterations, training.config.parallel.overlap)], [])


def summarise(training: Training, timed: Sequence[Span], waiting: Sequence[Span]) -> Loop:
    """The mean over ranks of what they timed; a collective call.

    Args:
        training: what ran.
        timed: as it is meant to run.
        waiting: the same without overlap; none where nothing overlaps.
    """
    comm, config, learner = training.comm, training.config, training.learner
    total = sum(timed[1:], timed[0])
    mine = {phase: total.seconds[phase] / total.iterations for phase in total.seconds}
    mine["comm_exposed"], mine["comm_hidden"] = mine.pop("comm"), 0.0
    if waiting:
        waited = sum(waiting[1:], waiting[0])
        mine["comm_hidden"] = max(waited.seconds["comm"] / waited.iterations - mine["comm_exposed"], 0.0)
    ranks = comm.all_gather_object((total.wall_seconds, mine))
    wall_seconds = sum(seconds for seconds, _ in ranks) / comm.size
    env_steps = total.iterations * training.clock.envs
    return Loop(
        env=config.environment.env,
        preset=config.preset,
        comm=comm.name,
        world_size=comm.size,
        envs_per_rank=config.environment.envs_per_rank,
        batch_per_rank=config.replay.batch_per_rank,
        parameters=learner.parameters.numel(),
        replay_bytes_per_transition=training.replay.nbytes / (config.replay.replay_capacity // comm.size),
        env_steps=env_steps,
        updates=total.updates,
        wall_seconds=wall_seconds,
        env_steps_per_second=env_steps / wall_seconds,
        updates_per_second=total.updates / wall_seconds,
        seconds_per_iteration={p: sum(seconds[p] for _, seconds in ranks) / comm.size for p in mine},
    )


def prepared(config: Config, comm: Comm, whole: bool) -> Config:
    """The run without what is not timed; but for whole runs learning starts as soon as a few minibatches are there.

    Raises:
        UserError: not enough replay for this many ranks.
    """
    config = config.replace(
        eval_every=0, checkpoint_every=0, checkpoint_replay="no", log_every=0, resume="never"
    )
    if not whole:
        filled = 10 * comm.size * config.replay.batch_per_rank
        # The loop goes on for as long as it is timed, and schedules must not run past their end.
        config = config.replace(
            learning_starts=min(config.replay.learning_starts, filled), total_env_steps=ENDLESS_ENV_STEPS
        )
    check_same_config(config, comm)
    if config.parallel.sync == "server":
        raise UserError("a benchmark times ranks that step together; use --sync gradients or parameters")
    check_world(config, acting_ranks(config, comm.size))
    return config


def built_and_timed(
    seconds: float, whole: bool, config: Config, comm: Comm, stop: StopSignal, timer: PhaseTimer
) -> tuple[Loop, Training]:
    """Build the parts and time the loop; a collective call."""
    config = prepared(config, comm, whole)
    with tempfile.TemporaryDirectory(prefix="hvdqn-bench-") as folder:
        run_dir = Path(comm.broadcast_object(folder))
        training = start(Training, config, comm, run_dir, stop, timer)
        loop = whole_run(training) if whole else measure(training, seconds)
        training.metrics.close()
        training.parts.envs.close()
    return loop, training


def time_loop(
    seconds: float, whole: bool, json: Path, config: Config, comm: Comm, stop: StopSignal, timer: PhaseTimer
) -> int:
    """Time the loop, print and write what was found; returns the exit code."""
    loop, _ = built_and_timed(seconds, whole, config, comm, stop, timer)
    if comm.rank == 0:
        show(loop)
        write_json(json, as_json(loop))
    return EXIT_FINISHED


def show(loop: Loop) -> None:
    """Print the table."""
    iteration = loop.iteration_seconds
    rows = [
        (name.replace("_", " "), f"{1e6 * seconds:,.1f}", f"{seconds / iteration:.1%}")
        for name, seconds in loop.seconds_per_iteration.items()
    ]
    print_table(
        f"{loop.env}, {loop.world_size} x {loop.comm}: {loop.env_steps_per_second:,.0f} env steps/s, "
        f"{loop.updates_per_second:,.1f} updates/s; {loop.replay_bytes_per_transition:,.0f} bytes per transition",
        ("phase", "us per iteration", "share"),
        [*rows, ("iteration", f"{1e6 * iteration:,.1f}", "")],
    )


def pin_to_core() -> None:
    """Keep this rank, and the threads that its engine will start, on one core of its own.

    Raises:
        UserError: there are more ranks on this host than cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        return  # the launcher has bound it
    local_rank = next((int(os.environ[name]) for name in _LOCAL_RANK if name in os.environ), 0)
    if local_rank >= len(cores):
        raise UserError(
            f"--pin gives each rank a core, and rank {local_rank} of this host may use {len(cores)}; start fewer ranks"
        )
    os.sched_setaffinity(0, {cores[local_rank]})


_LOCAL_RANK = ("HOROVOD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_RANK", "SLURM_LOCALID")


def main(argv: Sequence[str]) -> int:
    """Entry point of every rank; returns the exit code."""
    parser = Parser(PROG, __doc__, "bench-loop.json")
    parser.add_argument("--seconds", type=above_zero, default=8.0, help="how long to measure")
    parser.add_argument(
        "--whole-run", action="store_true", help="time all env steps of the run, filling replay too"
    )
    parser.add_argument("--pin", action="store_true", help="one core for each rank and all of its threads")
    return ranks.run(parser, argv, _work)


def _work(own: Namespace, _: Sequence[str]) -> Work:
    if own.pin:
        pin_to_core()
    return partial(time_loop, own.seconds, own.whole_run, own.json)
