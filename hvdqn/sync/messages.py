"""Lay out the messages between the workers and rank 0, the server, under `--sync server`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from hvdqn.learner import Learner
from hvdqn.sync.statistics import STATISTICS

# A push is a message of a worker to the server. It carries a gradient, or statistics alone, or says that the worker
# waits until all ranks synchronize.
GRADIENT, REPORT, WAITING = range(3)


@dataclass
class Push:
    """The header of a worker's message to the server. All fields are floats, sent as one float64 array."""

    kind: float  # GRADIENT, REPORT or WAITING
    version: float  # the server's number of the weights that the gradient was computed with
    target_version: float  # the server's number of the worker's target network
    pull: float  # 1: the worker asks for the current weights
    env_steps: float  # env steps that the worker took since its last push
    progress: float  # share of the run that has passed, for the learning rate
    largest_weight: float  # the largest importance weight of the worker's minibatch
    finite: float  # 1: the worker's loss and gradient are finite


@dataclass
class Reply:
    """The header of the server's answer to a worker's message; weights follow it if the worker asked for them."""

    env_steps: float  # env steps of the whole job
    updates: float  # updates of the whole job
    last_tick: float  # env steps since before the step that made a synchronization due; 0: none is due
    version: float  # number of the server's weights
    target_version: float  # number of the server's target network
    stop: float  # 1: some rank voted to stop
    holds_weights: float  # 1: the weights follow
    holds_target: float  # 1: the target network follows
    skipped_in_a_row: float  # updates of the rank `skipped_by` skipped in a row, if they end the run; else 0
    skipped_by: float


class Message:
    """A buffer for one message: a header, further numbers, and tensors `[parameters]`.

    Args:
        kind: the class of the header.
        numbers: how many float64 numbers follow the header.
        tensors: how many tensors `[parameters]` follow the numbers.
        learner: a learner with parameters of the size and dtype of these tensors.
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
        """Create the buffer of a worker's message: its header, one number for each of `STATISTICS`, and a gradient."""
        return cls(Push, len(STATISTICS), 1, learner)

    @classmethod
    def reply(cls, learner: Learner, size: int) -> Message:
        """Create the buffer of the server's answer.

        It holds a header, one number for each of `size` ranks (1 if the rank still takes part), the weights and the
        target network.
        """
        return cls(Reply, size, 2, learner)

    def write(self, header: Push | Reply, numbers: Sequence[float]) -> None:
        """Write the header, and the numbers that follow it, into the buffer."""
        self.header[:] = astuple(header)
        self.numbers[:] = numbers

    def with_tensors(self, count: int) -> NDArray[np.uint8]:
        """Return the bytes of the message from its start to the end of its first `count` tensors."""
        return self.buffer[: self.head_bytes + count * self.tensor_bytes]


def expected_traffic(learner: Learner, size: int, pull_every: int) -> tuple[float, float]:
    """Return how many messages and bytes one worker and the server exchange per update, both directions together."""
    tensors = 1 + (1 + (learner.target_tau < 1.0)) / pull_every
    numbers = len(fields(Push)) + len(STATISTICS) + len(fields(Reply)) + size
    return 2.0, 8 * numbers + tensors * learner.parameters.nbytes


def describe(workers: int, pull_every: int) -> str:
    """Return one line for the log that says how often workers push gradients and pull weights."""
    weights = "at every update" if pull_every == 1 else f"every {pull_every} updates"
    return f"rank 0 serves {workers} workers, which push gradients and pull weights {weights}"
