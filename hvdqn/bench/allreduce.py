"""`hvdqn bench allreduce`: what an averaged gradient costs on this engine, by size; with `--comm mpi` raw MPI too.

Latency is the time from launch to the return of `wait`, all ranks starting together; nothing overlaps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hvdqn.bench import ranks
from hvdqn.bench.report import Parser, above_zero, print_table, write_json
from hvdqn.comm import Comm
from hvdqn.config import Config, acting_ranks, check_engine, check_world
from hvdqn.errors import EXIT_FINISHED
from hvdqn.faults import StopSignal
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts
from hvdqn.train import check_same_config

PROG = "hvdqn bench allreduce"
FLOATS = (1, 1_000, 10_000, 100_000, 1_000_000, 4_000_000)
RAW_MPI = "raw mpi"


@dataclass(frozen=True)
class Allreduce:
    """What messages of float32 cost on one engine."""

    engine: str
    world_size: int
    network_floats: int
    """Floats of this network's message: its gradient and what rides along."""
    seconds: Mapping[int, float]
    """By floats: median over calls, of the slowest rank."""

    @property
    def network_seconds(self) -> float:
        """Of this network's message."""
        return self.seconds[self.network_floats]


def time_calls(call: Callable[[], object], comm: Comm, seconds: float) -> float:
    """Median seconds of a collective call, on the slowest rank; a collective call itself."""

    def once() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    comm.barrier()
    warm = sorted(once() for _ in range(5))
    calls = comm.broadcast_object(min(max(int(seconds / warm[2]), 10), 2_000))
    comm.barrier()
    return max(comm.all_gather_object(statistics.median(once() for _ in range(calls))))


def measure(comm: Comm, device: torch.device, network_floats: int, seconds: float) -> list[Allreduce]:
    """Time the engine of `comm`, and raw MPI where that is what lies under it; a collective call.

    Args:
        comm: the ranks.
        device: where messages lie.
        network_floats: a size to time besides `FLOATS`.
        seconds: for each size, about.
    """
    engine, raw = {}, {}
    for floats in sorted({*FLOATS, network_floats}):
        message = torch.zeros(floats, device=device)
        call = partial(_reduce, comm, message, f"bench.{floats}")
        engine[floats] = time_calls(call, comm, seconds)
        if comm.name == "mpi":
            raw[floats] = time_calls(_raw_mpi(floats), comm, seconds)
    found = [Allreduce(comm.name, comm.size, network_floats, engine)]
    if raw:
        found.append(Allreduce(RAW_MPI, comm.size, network_floats, raw))
    return found


def _reduce(comm: Comm, message: torch.Tensor, name: str) -> None:
    comm.allreduce_sum_async(message, name).wait()


def _raw_mpi(floats: int) -> Callable[[], object]:
    """MPI_Allreduce in place, on host memory."""
    from hvdqn.comm.mpi import start_mpi

    mpi, message = start_mpi(), torch.zeros(floats).numpy()
    return lambda: mpi.COMM_WORLD.Allreduce(mpi.IN_PLACE, message)


def show(found: Sequence[Allreduce]) -> None:
    """Print latency and bandwidth of each engine by message size."""
    header = ["floats", *(f"{one.engine} x {one.world_size}" for one in found)]
    network = {one.network_floats for one in found}
    rows = [
        [
            f"{floats:,}" + " (this network)" * (floats in network),
            *(f"{1e6 * s:,.1f} ({4e-6 * floats / s:,.0f})" for s in (one.seconds[floats] for one in found)),
        ]
        for floats in sorted(found[0].seconds)
    ]
    print_table("Averaging a gradient over ranks: us (MB/s)", header, rows)


def as_json(found: Sequence[Allreduce]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(one) for one in found]


def from_json(found: Sequence[Mapping[str, Any]], engine: str = "") -> list[Allreduce]:
    """Back from JSON, whose keys are text. A name given takes the place of the engine's, not of raw MPI's."""
    return [
        Allreduce(
            engine=engine if engine and one["engine"] != RAW_MPI else one["engine"],
            world_size=one["world_size"],
            network_floats=one["network_floats"],
            seconds={int(floats): seconds for floats, seconds in one["seconds"].items()},
        )
        for one in found
    ]


def time_allreduce(
    seconds: float, json: Path, config: Config, comm: Comm, stop: StopSignal, timer: PhaseTimer
) -> int:
    """Build this configuration's network, time messages of its size and of others; returns the exit code."""
    check_same_config(config, comm)
    check_engine(config, comm.name, comm.size)
    check_world(config, acting_ranks(config, comm.size))
    parts = build_parts(config, comm, timer)
    found = measure(comm, parts.device, parts.learner.message.numel(), seconds)
    parts.envs.close()
    if comm.rank == 0:
        show(found)
        write_json(json, {"allreduce": as_json(found)})
    return EXIT_FINISHED


def main(argv: Sequence[str]) -> int:
    """Entry point of every rank; returns the exit code."""
    parser = Parser(PROG, __doc__, "bench-allreduce.json")
    parser.add_argument("--seconds", type=above_zero, default=0.5, help="for each size")
    return ranks.run(parser, argv, lambda own, _: partial(time_allreduce, own.seconds, own.json))
