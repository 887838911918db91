"""`hvdqn bench solve`: seconds of training until the greedy policy reaches a return. Evaluations stop the clock.

mpirun -np 2 hvdqn bench solve --preset cartpole --comm mpi
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hvdqn.bench import ranks
from hvdqn.bench.loop import prepared, run_span
from hvdqn.bench.report import Parser, one_or_more, print_table, write_json
from hvdqn.comm import Comm
from hvdqn.config import Config
from hvdqn.errors import EXIT_FINISHED
from hvdqn.faults import StopSignal
from hvdqn.metrics import PhaseTimer
from hvdqn.train import Training, start

PROG = "hvdqn bench solve"


def train_until(training: Training, goal: float, every_env_steps: int) -> tuple[float, float]:
    """Train until an evaluation reaches the goal or the env steps are spent; a collective call.

    Returns:
        Seconds of training, and the last evaluation's mean return.
    """
    config, clock = training.config, training.clock
    seconds, mean = 0.0, float("-inf")
    while clock.env_steps < config.run.total_env_steps and mean < goal:
        left = min(every_env_steps, config.run.total_env_steps - clock.env_steps)
        seconds += run_span(training, -(-left // clock.envs), config.parallel.overlap).wall_seconds
        training.agree()
        evaluation = training.evaluator.run(training.learner.online)
        assert evaluation is not None  # nobody asked to leave off
        training.metrics.say(f"{clock.env_steps:,} env steps, {seconds:.1f} s of training, {evaluation}")
        mean = evaluation.mean
    return seconds, mean


def solve(
    goal: float, every: int, json: Path, config: Config, comm: Comm, stop: StopSignal, timer: PhaseTimer
) -> int:
    """Build the parts, train, print and write what was found; returns the exit code."""
    config = prepared(config, comm, whole=True)
    with tempfile.TemporaryDirectory(prefix="hvdqn-bench-") as folder:
        training = start(Training, config, comm, Path(comm.broadcast_object(folder)), stop, timer)
        seconds, mean = train_until(training, goal, every)
        training.metrics.close()
        training.parts.envs.close()
    solved = mean >= goal
    if comm.rank == 0:
        env_steps = training.clock.env_steps
        rows = [(f"{seconds:.2f}", f"{env_steps:,}", f"{mean:.1f}", "yes" if solved else "NO")]
        title = f"{config.environment.env}, {comm.size} x {comm.name}, seed {config.run.seed}"
        print_table(title, ("seconds of training", "env steps", "greedy return", "solved"), rows)
        found = {
            "training_seconds": seconds,
            "env_steps": env_steps,
            "eval_return_mean": mean,
            "solved": solved,
        }
        write_json(json, {"env": config.environment.env, "world_size": comm.size, "comm": comm.name, **found})
    return EXIT_FINISHED


def main(argv: Sequence[str]) -> int:
    """Entry point of every rank; returns the exit code."""
    parser = Parser(PROG, __doc__, "bench-solve.json")
    parser.add_argument(
        "--goal", type=float, default=475.0, help="mean return of --eval-episodes greedy episodes"
    )
    parser.add_argument("--every", type=one_or_more, default=2_000, help="env steps between evaluations")
    return ranks.run(parser, argv, lambda own, _: partial(solve, own.goal, own.every, own.json))
