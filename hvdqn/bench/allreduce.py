"""`hvdqn bench allreduce`: time the sum of a gradient over ranks, by message size; with `--comm mpi` also raw MPI.

The latency is the time from the launch of an allreduce to the return of `wait`. All ranks start together and do
nothing else meanwhile.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from hvdqn.bench.report import Parser, above_zero, print_table, write_json
from hvdqn.bench.training import Job, check_config, gradient_floats, run_on_all_ranks
from hvdqn.comm import Comm
from hvdqn.parts import build_parts

PROG = "hvdqn bench allreduce"
FLOATS = (1, 1_000, 10_000, 100_000, 1_000_000, 4_000_000)
RAW_MPI = "raw mpi"
WARM_UP_CALLS = 5
LEAST_CALLS, MOST_CALLS = 10, 2_000


@dataclass(frozen=True)
class AllreduceTiming:
    """The latency of summing float32 messages over ranks, by message size, on one engine."""

    engine: str
    world_size: int
    network_floats: int
    """Size of this network's message: its gradient and trailer."""
    seconds: Mapping[int, float]
    """By message size in floats: the median over calls, on the slowest rank."""

    @property
    def network_seconds(self) -> float:
        """The latency of the message that one update of this network sends, in seconds."""
        return self.seconds[self.network_floats]


def time_call(call: Callable[[], object], comm: Comm, seconds: float) -> float:
    """Return the median seconds of a collective call on the slowest rank; a collective call itself.

    Args:
        call: what to time.
        comm: the ranks.
        seconds: approximate duration of the measurement.
    """

    def time_once() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    comm.barrier()
    warm_up = statistics.median(time_once() for _ in range(WARM_UP_CALLS))
    calls = comm.broadcast_object(min(max(int(seconds / warm_up), LEAST_CALLS), MOST_CALLS))
    comm.barrier()
    return max(comm.all_gather_object(statistics.median(time_once() for _ in range(calls))))


def time_engine(
    comm: Comm, device: torch.device, network_floats: int, seconds: float
) -> list[AllreduceTiming]:
    """Time the engine of `comm`, and raw MPI if the engine is mpi; a collective call.

    Args:
        comm: the ranks.
        device: the device of the messages.
        network_floats: a message size to time besides `FLOATS`.
        seconds: approximate duration for each size.
    """
    engine, raw = {}, {}
    for floats in sorted({*FLOATS, network_floats}):
        message = torch.zeros(floats, device=device)
        engine[floats] = time_call(partial(_allreduce, comm, message, f"bench.{floats}"), comm, seconds)
        if comm.name == "mpi":
            raw[floats] = time_call(_raw_mpi_allreduce(floats), comm, seconds)
    timings = [AllreduceTiming(comm.name, comm.size, network_floats, engine)]
    if raw:
        timings.append(AllreduceTiming(RAW_MPI, comm.size, network_floats, raw))
    return timings


def _allreduce(comm: Comm, message: torch.Tensor, name: str) -> None:
    comm.allreduce_sum_async(message, name).wait()


def _raw_mpi_allreduce(floats: int) -> Callable[[], object]:
    """Return a function that calls MPI_Allreduce in place, in host memory."""
    from hvdqn.comm.mpi import start_mpi

    mpi, message = start_mpi(), torch.zeros(floats).numpy()
    return lambda: mpi.COMM_WORLD.Allreduce(mpi.IN_PLACE, message)


def print_allreduce(timings: Sequence[AllreduceTiming]) -> None:
    """Print the latency and bandwidth of each engine by message size."""
    header = ["floats", *(f"{timing.engine} x {timing.world_size}" for timing in timings)]
    network_floats = {timing.network_floats for timing in timings}
    rows = []
    for floats in sorted(timings[0].seconds):
        label = f"{floats:,} (this network)" if floats in network_floats else f"{floats:,}"
        latencies = [timing.seconds[floats] for timing in timings]
        rows.append([label, *(f"{1e6 * s:,.1f} ({4e-6 * floats / s:,.0f})" for s in latencies)])
    print_table("Averaging a gradient over ranks: us (MB/s)", header, rows)


def as_json(timings: Sequence[AllreduceTiming]) -> list[dict[str, Any]]:
    """Return the timings as JSON data."""
    return [asdict(timing) for timing in timings]


def from_json(content: Sequence[Mapping[str, Any]], engine: str = "") -> list[AllreduceTiming]:
    """Return the timings that `as_json` converted; the keys of JSON objects are text.

    Args:
        content: the JSON data.
        engine: if given, replaces the name of the engine, but not that of raw MPI.
    """
    return [
        AllreduceTiming(
            engine=engine if engine and timing["engine"] != RAW_MPI else timing["engine"],
            world_size=timing["world_size"],
            network_floats=timing["network_floats"],
            seconds={int(floats): seconds for floats, seconds in timing["seconds"].items()},
        )
        for timing in content
    ]


def run_benchmark(options: Namespace, _: Sequence[str], job: Job) -> None:
    """Time messages of this configuration's network and of other sizes; print and write the result on rank 0."""
    check_config(job.config, job.comm)
    parts = build_parts(job.config, job.comm, job.timer)
    timings = time_engine(job.comm, parts.device, gradient_floats(parts, job.comm), options.seconds)
    if parts.acting is not None:
        parts.acting.envs.close()
    if job.comm.rank == 0:
        print_allreduce(timings)
        write_json(options.json, {"allreduce": as_json(timings)})


def main(argv: Sequence[str]) -> int:
    """Run the command on every rank; return the exit code."""
    parser = Parser(PROG, __doc__, "bench-allreduce.json")
    parser.add_argument("--seconds", type=above_zero, default=0.5, help="duration for each message size")
    return run_on_all_ranks(parser, argv, run_benchmark)
