"""Benchmarks that are work for all ranks of a job, in place of training."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence

from hvdqn import train
from hvdqn.bench.report import Parser
from hvdqn.errors import UserError
from hvdqn.faults import StopSignal


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
    return train.main(flags, job)
