"""`hvdqn bench`: rates, seconds by phase, memory, and what averaging a gradient costs on each engine.

Under a launcher it measures the engine that connects its ranks. Without one it measures one process, and starts jobs of
two ranks for every engine that is installed.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial

import hvdqn.bench
from hvdqn.bench import allreduce, loop, ranks
from hvdqn.bench.allreduce import Allreduce
from hvdqn.bench.jobs import available, bench
from hvdqn.bench.report import Parser, above_zero, one_or_more, write_json
from hvdqn.comm import Comm
from hvdqn.config import Config
from hvdqn.errors import EXIT_FINISHED, StoppedError, UserError
from hvdqn.faults import StopSignal
from hvdqn.metrics import PhaseTimer

PROG = "hvdqn bench"


def costs(
    options: Namespace,
    flags: Sequence[str],
    config: Config,
    comm: Comm,
    stop: StopSignal,
    timer: PhaseTimer,
) -> int:
    """Measure, print, write; returns the exit code."""
    timed, training = loop.built_and_timed(options.seconds, False, config, comm, stop, timer)
    if comm.rank == 0:
        loop.show(timed)
    if comm.size > 1:
        message = training.learner.message
        found = allreduce.measure(comm, message.device, message.numel(), options.allreduce_seconds)
    else:
        found = engines(options, flags, stop)
    if comm.rank == 0:
        if found:
            allreduce.show(found)
        write_json(options.json, {"loop": loop.as_json(timed), "allreduce": allreduce.as_json(found)})
    return EXIT_FINISHED


def engines(options: Namespace, flags: Sequence[str], stop: StopSignal) -> list[Allreduce]:
    """Time every engine that is installed, each in a job of its own; one that fails is said and left out.

    Raises:
        StoppedError: this process was told to stop.
    """
    found = []
    for name in available():
        words = ["allreduce", "--seconds", str(options.allreduce_seconds), *flags]
        try:
            job = bench(words, name, options.np, stopped=lambda: stop.requested)
        except UserError as error:
            if stop.requested:
                raise StoppedError("stopped by a signal before all was measured") from None
            print(f"{name} is left out: {error}", file=sys.stderr)
        else:
            found += allreduce.from_json(job["allreduce"], name)
    return found


def main(argv: Sequence[str]) -> int:
    """Entry point of every rank; returns the exit code."""
    parser = Parser(PROG, f"{__doc__}\n{hvdqn.bench.__doc__}", "bench.json")
    parser.add_argument("--seconds", type=above_zero, default=8.0, help="how long to run the loop")
    parser.add_argument("--allreduce-seconds", type=above_zero, default=0.5, help="for each message size")
    parser.add_argument("--np", type=one_or_more, default=2, help="ranks of the jobs that time the engines")
    return ranks.run(parser, argv, lambda own, flags: partial(costs, own, flags))
