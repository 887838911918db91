"""From what an allreduce costs here to what it would cost on more ranks, and what that leaves of each rank's rate.

Two models of an allreduce of n bytes over p ranks, with alpha the latency of one message in seconds and beta the
seconds of one byte (Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in
MPICH"; their gamma, the time to add one byte, cannot be told from beta by a clock and is in it):

    ring    T(p) = 2 (p - 1) alpha + 2 (p - 1) / p * n * beta     reduce-scatter, then allgather, around a ring
    tree    T(p) = ceil(log2 p) * (alpha + n * beta)               recursive doubling

alpha and beta come from a line through the measured times, T = a + b n, on the ranks that were measured: there each
model gives what was measured. An iteration takes its own work and what of the communication nothing hides:

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
    "not disturb each other, no rank is slower than another, a rank's own work stays the same, and as much of an "
    "allreduce is hidden as was here."
)


@dataclass(frozen=True)
class Line:
    """T = latency + seconds_per_byte * n, on one number of ranks."""

    latency: float
    seconds_per_byte: float


@dataclass(frozen=True)
class Work:
    """What one rank does in one iteration."""

    seconds: float
    """Without communication."""
    updates: float
    hidden_seconds: float
    """Of one allreduce, behind other work."""


def fit(seconds_by_bytes: Mapping[int, float]) -> Line:
    """The line through measured times that is least wrong in proportion: sizes span six orders of magnitude.

    Neither part is negative, also where noise would have it so.

    Args:
        seconds_by_bytes: at least two sizes.
    """
    sizes = np.array(list(seconds_by_bytes), np.float64)
    seconds = np.array(list(seconds_by_bytes.values()), np.float64)
    terms = np.stack([1.0 / seconds, sizes / seconds], axis=1)
    latency, per_byte = np.linalg.lstsq(terms, np.ones(len(sizes)), rcond=None)[0]
    return Line(max(float(latency), 0.0), max(float(per_byte), 0.0))


def steps(model: Model, ranks: int) -> tuple[float, float]:
    """How often alpha and n * beta are paid."""
    if model == "ring":
        return 2.0 * (ranks - 1), 2.0 * (ranks - 1) / ranks
    rounds = float(math.ceil(math.log2(ranks)))
    return rounds, rounds


def allreduce_seconds(model: Model, line: Line, measured_ranks: int, ranks: int, message_bytes: int) -> float:
    """T(ranks), with alpha and beta such that the model gives `line` on the ranks that were measured (2 or more)."""
    latencies, transfers = steps(model, measured_ranks)
    alpha, beta = line.latency / latencies, line.seconds_per_byte / transfers
    latencies, transfers = steps(model, ranks)
    return latencies * alpha + transfers * beta * message_bytes


def efficiency(work: Work, allreduce: float) -> float:
    """Rate of a rank among many over that of a rank alone."""
    exposed = work.updates * max(allreduce - work.hidden_seconds, 0.0)
    return work.seconds / (work.seconds + exposed)


@dataclass(frozen=True)
class Projected:
    """One model at one number of ranks."""

    model: Model
    ranks: int
    allreduce_seconds: float
    efficiency: float


def project(
    line: Line, measured_ranks: int, message_bytes: int, work: Work, ranks: Sequence[int]
) -> list[Projected]:
    """Both models at each number of ranks."""
    found = []
    for model in MODELS:
        for count in ranks:
            seconds = allreduce_seconds(model, line, measured_ranks, count, message_bytes)
            found.append(Projected(model, count, seconds, efficiency(work, seconds)))
    return found
