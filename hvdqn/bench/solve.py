"""`hvdqn bench solve`: time the training until the greedy policy reaches a return, without the evaluations.

mpirun -np 2 hvdqn bench solve --preset cartpole --comm mpi
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from hvdqn.bench.loop import benchmark_config, time_span
from hvdqn.bench.report import Parser, one_or_more, print_table, write_json
from hvdqn.bench.training import Job, TrainingRun, run_on_all_ranks, start_training

PROG = "hvdqn bench solve"


def train_until(run: TrainingRun, goal: float, every_env_steps: int) -> tuple[float, float]:
    """Train until an evaluation reaches the goal or the run ends; a collective call.

    Returns:
        Seconds of training, and the mean return of the last evaluation.
    """
    clock, total_env_steps = run.parts.clock, run.config.run.total_env_steps
    seconds, mean = 0.0, float("-inf")
    while clock.env_steps < total_env_steps and mean < goal:
        env_steps = min(every_env_steps, total_env_steps - clock.env_steps)
        iterations = -(-env_steps // run.env_steps_per_iteration)
        seconds += time_span(run, iterations, run.config.parallel.overlap).wall_seconds
        mean = run.evaluate(seconds).mean
    return seconds, mean


def run_benchmark(options: Namespace, _: Sequence[str], job: Job) -> None:
    """Train until the goal; print and write the result on rank 0."""
    config, comm = benchmark_config(job.config, job.comm, whole_run=True), job.comm
    with start_training(config, job) as run:
        seconds, mean = train_until(run, options.goal, options.every)
    if comm.rank > 0:
        return
    env, env_steps, solved = config.environment.env, run.parts.clock.env_steps, mean >= options.goal
    print_table(
        f"{env}, {comm.size} x {comm.name}, seed {config.run.seed}",
        ("seconds of training", "env steps", "greedy return", "solved"),
        [(f"{seconds:.2f}", f"{env_steps:,}", f"{mean:.1f}", "yes" if solved else "NO")],
    )
    content = {
        "env": env,
        "world_size": comm.size,
        "comm": comm.name,
        "training_seconds": seconds,
        "env_steps": env_steps,
        "eval_return_mean": mean,
        "solved": solved,
    }
    write_json(options.json, content)


def main(argv: Sequence[str]) -> int:
    """Run the command on every rank; return the exit code."""
    parser = Parser(PROG, __doc__, "bench-solve.json")
    parser.add_argument(
        "--goal", type=float, default=475.0, help="mean return of --eval-episodes greedy episodes"
    )
    parser.add_argument("--every", type=one_or_more, default=2_000, help="env steps between evaluations")
    return run_on_all_ranks(parser, argv, run_benchmark)
