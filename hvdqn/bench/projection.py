"""Project the cost of an allreduce, and the efficiency of each rank, to more ranks than were measured.

Two models of an allreduce of n bytes over p ranks, where alpha is the latency of one message in seconds and beta the
seconds per byte (Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH";
their gamma, the time to add one byte, cannot be measured separately from beta, which includes it):

    ring    T(p) = 2 (p - 1) alpha + 2 (p - 1) / p * n * beta     reduce-scatter, then allgather, around a ring
    tree    T(p) = ceil(log2 p) * (alpha + n * beta)               recursive doubling

alpha and beta follow from a line through the measured times, T = a + b n, so that each model gives the line itself at
the number of ranks that was measured. An iteration takes its own work and the communication that nothing hides:

    efficiency(p) = work / (work + updates * max(T(p) - hidden, 0))
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
    "Assumed: every link between ranks is like those measured (on one host: shared memory, no network), messages do "
    "not disturb each other, all ranks are equally fast, each rank's own work stays the same, and as much of an "
    "allreduce is hidden as in this measurement."
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
    """The part of one allreduce that overlaps with other work."""


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


def efficiency(work: Work, allreduce: float) -> float:
    """Return the rate of one rank of many, divided by the rate of a single rank."""
    exposed = work.updates * max(allreduce - work.hidden_seconds, 0.0)
    return work.seconds / (work.seconds + exposed)


@dataclass(frozen=True)
class Projected:
    """The projection of one model to one number of ranks."""

    model: Model
    ranks: int
    allreduce_seconds: float
    efficiency: float


def project(
    line: Line, measured_ranks: int, message_bytes: int, work: Work, ranks: Sequence[int]
) -> list[Projected]:
    """Return the projections of both models to each number of ranks."""
    projections = []
    for model in MODELS:
        for count in ranks:
            seconds = allreduce_seconds(model, line, measured_ranks, count, message_bytes)
            projections.append(Projected(model, count, seconds, efficiency(work, seconds)))
    return projections
