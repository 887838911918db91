"""`hvdqn bench`: rates, seconds by phase, memory, and the cost of averaging a gradient on each engine.

Under a launcher it measures the engine that connects its ranks. Without a launcher it measures one process, and starts
a job of two ranks for every engine that is installed.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import hvdqn.bench
from hvdqn.bench import allreduce, loop
from hvdqn.bench.allreduce import AllreduceTiming
from hvdqn.bench.jobs import available_engines, run_bench_job
from hvdqn.bench.report import Parser, above_zero, one_or_more, print_message, write_json
from hvdqn.bench.training import Job, gradient_floats, run_on_all_ranks, start_training
from hvdqn.errors import StoppedError, UserError
from hvdqn.faults import StopSignal

PROG = "hvdqn bench"


def run_benchmark(options: Namespace, flags: Sequence[str], job: Job) -> None:
    """Time the loop and the engines; print and write the result on rank 0."""
    config = loop.benchmark_config(job.config, job.comm, whole_run=False)
    with start_training(config, job) as run:
        loop_timing = loop.time_loop(run, options.seconds)
    is_rank_0 = job.comm.rank == 0
    if is_rank_0:
        loop.print_loop(loop_timing)
    if job.comm.size > 1:
        floats = gradient_floats(run.parts, job.comm)
        timings = allreduce.time_engine(job.comm, run.parts.device, floats, options.allreduce_seconds)
    else:
        timings = time_installed_engines(options, flags, job.stop)
    if is_rank_0:
        if timings:
            allreduce.print_allreduce(timings)
        content = {"loop": loop.as_json(loop_timing), "allreduce": allreduce.as_json(timings)}
        write_json(options.json, content)


def time_installed_engines(
    options: Namespace, flags: Sequence[str], stop: StopSignal
) -> list[AllreduceTiming]:
    """Time every installed engine, each in a job of its own; report and skip one that fails.

    Raises:
        StoppedError: this process received a signal to stop.
    """
    timings = []
    for name in available_engines():
        args = ["allreduce", "--seconds", str(options.allreduce_seconds), *flags]
        try:
            result = run_bench_job(args, name, options.np, stopped=lambda: stop.requested)
        except UserError as error:
            if stop.requested:
                raise StoppedError("stopped by a signal before the measurement was complete") from None
            print_message(f"{name} is left out: {error}")
        else:
            timings += allreduce.from_json(result["allreduce"], name)
    return timings


def main(argv: Sequence[str]) -> int:
    """Run the command on every rank; return the exit code."""
    parser = Parser(PROG, f"{__doc__}\n{hvdqn.bench.__doc__}", "bench.json")
    parser.add_argument("--seconds", type=above_zero, default=8.0, help="duration of the loop's measurement")
    parser.add_argument(
        "--allreduce-seconds", type=above_zero, default=0.5, help="duration for each message size"
    )
    parser.add_argument("--np", type=one_or_more, default=2, help="ranks of the jobs that time the engines")
    return run_on_all_ranks(parser, argv, run_benchmark)
