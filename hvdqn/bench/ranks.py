"""Benchmarks that are work for all ranks of a job, in place of training."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence

from hvdqn import train
from hvdqn.bench.report import Parser
from hvdqn.comm import Comm
from hvdqn.config import Config, UserError
from hvdqn.faults import EXIT_FAILED, StopSignal
from hvdqn.metrics import PhaseTimer


class StoppedError(RuntimeError):
    """A signal came before all was measured; raised on all ranks at once."""


def run(parser: Parser, argv: Sequence[str], work: Callable[[Namespace, list[str]], train.Work]) -> int:
    """Entry point of every rank; returns the exit code.

    Args:
        parser: of the benchmark's own flags; the others are training's.
        argv: all of them.
        work: what the ranks do together, from its own flags and from training's.
    """
    try:
        options, flags = parser.parse_known_args(argv)
        job = work(options, flags)
    except UserError as error:
        return train.refuse_unconnected(str(error), StopSignal())

    def measured(config: Config, comm: Comm, stop: StopSignal, timer: PhaseTimer) -> int:
        try:
            return job(config, comm, stop, timer)
        except StoppedError as error:
            return train.refuse(str(error), comm.rank, EXIT_FAILED)

    return train.main(flags, measured)
