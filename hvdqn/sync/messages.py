"""Messages between the workers and the server of `--sync server`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from hvdqn.learner import Learner
from hvdqn.sync.statistics import STATISTICS

# Kinds of a push: with a gradient, with statistics alone, or that the worker waits for a synchronization.
GRADIENT, REPORT, WAITING = range(3)


@dataclass
class Push:
    """Header of what a worker sends. All fields are numbers, because they travel as one float64 array."""

    kind: float
    version: float  # of the weights that the gradient was computed with
    target_version: float
    pull: float  # whether the worker wants fresh weights
    env_steps: float  # that the worker took since its last push
    progress: float  # share of the run, for the learning rate
    largest_weight: float  # of its minibatch's importance weights
    finite: float  # whether its loss and gradient are finite


@dataclass
class Reply:
    """Header of what the server answers, in front of weights if they were asked for."""

    env_steps: float
    updates: float
    last_tick: float  # env steps within which a synchronization came due; 0: none is due
    version: float
    target_version: float
    stop: float
    holds_weights: float
    holds_target: float
    skipped_in_a_row: float  # by the rank below; enough of them end the run
    skipped_by: float


class Message:
    """A buffer that holds one header, further numbers, and tensors of the size of the network.

    Args:
        kind: of the header.
        numbers: how many float64 numbers follow the header.
        tensors: how many tensors `[parameters]` follow the numbers.
        learner: whose parameters give the tensors' size and dtype.
    """

    def __init__(self, kind: type[Push] | type[Reply], numbers: int, tensors: int, learner: Learner) -> None:
        n, dtype = learner.parameters.numel(), learner.dtype
        self.head_bytes = 8 * (len(fields(kind)) + numbers)
        self.tensor_bytes = n * dtype.itemsize
        self.buffer: NDArray[np.uint8] = np.zeros(self.head_bytes + tensors * self.tensor_bytes, np.uint8)
        head = self.buffer[: self.head_bytes].view(np.float64)
        self.header, self.numbers = np.split(head, [len(fields(kind))])
        body = torch.from_numpy(self.buffer[self.head_bytes :]).view(dtype)
        self.tensors = [body[i * n : (i + 1) * n] for i in range(tensors)]

    @classmethod
    def push(cls, learner: Learner) -> Message:
        """Make the buffer of a push: its header, `STATISTICS` and a gradient."""
        return cls(Push, len(STATISTICS), 1, learner)

    @classmethod
    def reply(cls, learner: Learner, size: int) -> Message:
        """Make the buffer of a reply: its header, whether each rank takes part, weights and target."""
        return cls(Reply, size, 2, learner)

    def write(self, header: Push | Reply, numbers: Sequence[float]) -> None:
        """Write the header and the numbers behind it."""
        self.header[:] = astuple(header)
        self.numbers[:] = numbers

    def with_tensors(self, count: int) -> NDArray[np.uint8]:
        """Return the part of the buffer that holds the first `count` tensors."""
        return self.buffer[: self.head_bytes + count * self.tensor_bytes]


def expected_traffic(learner: Learner, size: int, pull_every: int) -> tuple[float, float]:
    """Return the messages and bytes between one worker and the server, both ways, per update."""
    tensors = 1 + (1 + (learner.target_tau < 1.0)) / pull_every
    numbers = len(fields(Push)) + len(STATISTICS) + len(fields(Reply)) + size
    return 2.0, 8 * numbers + tensors * learner.parameters.nbytes


def describe(workers: int, pull_every: int) -> str:
    """Return how workers and server agree, for the header of a run."""
    weights = "at every update" if pull_every == 1 else f"every {pull_every} updates"
    return f"rank 0 serves {workers} workers, which push gradients and pull weights {weights}"
