"""Project the cost of an allreduce, and the efficiency of each rank, to more ranks than were measured.

Two models of an allreduce of n bytes over p ranks, where alpha is the latency of one message in seconds and beta the
seconds per byte (Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH";
their gamma, the time to add one byte, cannot be measured separately from beta, which includes it):

    ring    T(p) = 2 (p - 1) alpha + 2 (p - 1) / p * n * beta     reduce-scatter, then allgather, around a ring
    tree    T(p) = ceil(log2 p) * (alpha + n * beta)               recursive doubling

alpha and beta follow from a line through the measured times, T = a + b n, so that each model gives the line itself at
the number of ranks that was measured.

A sum has two levels: within each host of r ranks, which takes a measured time T_host, and between the h = ceil(p / r)
hosts, one rank of each, for which the models stand. An iteration takes its own work and the communication that nothing
hides:

    exposed(p) = max(T_host - hidden, 0) + max(T(h) - window, 0)      without the second term if h = 1
    efficiency(p) = work / (work + updates * exposed(p))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Model = Literal["ring", "tree"]
MODELS: tuple[Model, ...] = ("ring", "tree")
FORMULAS: Mapping[Model, str] = {
    "ring": "ring: T(p) = 2(p-1) alpha + 2(p-1)/p n beta",
    "tree": "tree: T(p) = ceil(log2 p) (alpha + n beta)",
}
SOURCE = "Thakur, Rabenseifner and Gropp 2005"
ASSUMPTION = (
    "Assumed: every host has as many ranks as this one, every link between hosts is like those measured (without "
    "--between: like those within this host), messages do not disturb each other, all ranks are equally fast, each "
    "rank's own work stays the same, and as much of a sum is hidden as in this measurement."
)


@dataclass(frozen=True)
class Line:
    """T = latency + seconds_per_byte * n, at one number of ranks."""

    latency: float
    seconds_per_byte: float


@dataclass(frozen=True)
class Work:
    """The work of one rank in one iteration."""

    seconds: float
    """Without communication."""
    updates: float
    hidden_seconds: float
    """The part of one sum within a host that overlaps with other work."""
    window_seconds: float = 0.0
    """The part of one sum between hosts that can overlap with other work."""


@dataclass(frozen=True)
class Levels:
    """What was measured of the two levels of a sum."""

    within: Line
    ranks_per_host: int
    between: Line
    hosts: int
    """Between which `between` was measured, one rank on each."""

    def seconds(self, model: Model, ranks: int, message_bytes: int) -> tuple[float, float]:
        """Return the seconds of a sum over `ranks` within a host and between hosts."""
        within = self.within.latency + self.within.seconds_per_byte * message_bytes
        hosts = math.ceil(ranks / self.ranks_per_host)
        if hosts == 1:
            return within, 0.0
        return within, allreduce_seconds(model, self.between, self.hosts, hosts, message_bytes)


def fit(seconds_by_bytes: Mapping[int, float]) -> Line:
    """Fit a line to measured times by least squares of the relative errors, as sizes span six orders of magnitude.

    Neither the latency nor the slope is negative, even if noise would make it so.

    Args:
        seconds_by_bytes: the times of at least two message sizes.
    """
    sizes = np.array(list(seconds_by_bytes), np.float64)
    seconds = np.array(list(seconds_by_bytes.values()), np.float64)
    terms = np.stack([1.0 / seconds, sizes / seconds], axis=1)
    latency, per_byte = np.linalg.lstsq(terms, np.ones(len(sizes)), rcond=None)[0]
    return Line(max(float(latency), 0.0), max(float(per_byte), 0.0))


def coefficients(model: Model, ranks: int) -> tuple[float, float]:
    """Return the two numbers by which a model multiplies alpha and n * beta at this number of ranks."""
    if model == "ring":
        return 2.0 * (ranks - 1), 2.0 * (ranks - 1) / ranks
    rounds = float(math.ceil(math.log2(ranks)))
    return rounds, rounds


def allreduce_seconds(model: Model, line: Line, measured_ranks: int, ranks: int, message_bytes: int) -> float:
    """Return T(ranks) of a model that gives `line` at the number of ranks that was measured, which is 2 or more."""
    latencies, transfers = coefficients(model, measured_ranks)
    alpha, beta = line.latency / latencies, line.seconds_per_byte / transfers
    latencies, transfers = coefficients(model, ranks)
    return latencies * alpha + transfers * beta * message_bytes


def efficiency(work: Work, within: float, between: float = 0.0) -> float:
    """Return the rate of one rank of many, divided by the rate of a single rank.

    Args:
        work: of an iteration.
        within: seconds of a sum within a host.
        between: seconds of a sum between hosts.
    """
    exposed = max(within - work.hidden_seconds, 0.0) + max(between - work.window_seconds, 0.0)
    return work.seconds / (work.seconds + work.updates * exposed)


@dataclass(frozen=True)
class Projected:
    """The projection of one model to one number of ranks."""

    model: Model
    ranks: int
    allreduce_seconds: float
    efficiency: float


def project(levels: Levels, message_bytes: int, work: Work, ranks: Sequence[int]) -> list[Projected]:
    """Return the projections of both models to each number of ranks."""
    projections = []
    for model in MODELS:
        for count in ranks:
            within, between = levels.seconds(model, count, message_bytes)
            projections.append(Projected(model, count, within + between, efficiency(work, within, between)))
    return projections
