"""A rank that learns from given minibatches: a learner and a strategy without environments, replay and trainer."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hvdqn.clock import Clock
from hvdqn.comm import Comm
from hvdqn.config import Config
from hvdqn.learner import Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import QNetwork, make_network
from hvdqn.parts import make_learner
from hvdqn.replay import Batch
from hvdqn.sync import Outcome, RankGroup, Strategy, Totals, make_strategy
from hvdqn.sync.statistics import REPORTED

NO_REPORT = (0.0,) * len(REPORTED)
STOP_VOTE = (1.0, *NO_REPORT[1:])
INPUTS, ACTIONS = 4, 3

_seeding = threading.Lock()  # all threads share torch's generator


def make_batch(size: int = 16, seed: int = 0) -> Batch:
    """Return a random minibatch for the network of `small_network`, with some terminations."""
    rng = np.random.default_rng(seed)
    return Batch(
        observation=rng.normal(size=(size, INPUTS)).astype(np.float32),
        action=rng.integers(ACTIONS, size=size),
        reward=rng.normal(size=size).astype(np.float32),
        next_observation=rng.normal(size=(size, INPUTS)).astype(np.float32),
        discount=np.where(rng.random(size) < 0.2, 0, 0.99).astype(np.float32),
        weight=np.ones(size, np.float32),
        row_ids=np.arange(size),
    )


def weighted_batch(size: int, shape: tuple[int, ...], actions: int, rng: np.random.Generator) -> Batch:
    """Return a random minibatch with terminations and importance weights; observations of three axes are images."""

    def observations() -> np.ndarray:
        if len(shape) == 3:
            return rng.integers(256, size=(size, *shape)).astype(np.uint8)
        return rng.normal(size=(size, *shape)).astype(np.float32)

    return Batch(
        observation=observations(),
        action=rng.integers(actions, size=size),
        reward=rng.normal(size=size).astype(np.float32) * 3,
        next_observation=observations(),
        discount=np.where(rng.random(size) < 0.2, 0, 0.97).astype(np.float32),
        weight=rng.uniform(0.1, 1, size).astype(np.float32),
        row_ids=np.arange(size),
    )


def share(batch: Batch, index: int, of: int) -> Batch:
    """Return one of `of` equal shares of a minibatch."""
    size = len(batch.reward)
    rows = slice(index * size // of, (index + 1) * size // of)
    fields = [getattr(batch, name) for name in Batch.__slots__]
    return Batch(*(None if field is None else field[rows] for field in fields))


def nan_batch(seed: int) -> Batch:
    """Return a random minibatch with one reward that is NaN."""
    batch = make_batch(seed=seed)
    batch.reward[3] = np.nan
    return batch


def weighted(batch: Batch, weight: float) -> Batch:
    """Return the minibatch with this importance weight for each of its transitions."""
    return dataclasses.replace(batch, weight=np.full(len(batch.reward), weight, np.float32))


def small_network(config: Config, seed: int) -> QNetwork:
    """Return a network of one hidden layer, initialized from `seed`."""
    network = dataclasses.replace(config.network, hidden=(32,))
    with _seeding:
        torch.manual_seed(seed)
        return make_network(network, "huber", (INPUTS,), 1, is_image=False, actions=ACTIONS)


class LearningRank:
    """One rank's learner and strategy, which it calls as the trainer does. Making one is a collective call.

    Args:
        config: of the job.
        comm: the ranks.
        network: of this rank; the learner loads rank 0's weights into it.
        clock: of this rank; only `--sync server` uses it.
        group: the ranks that hold the network with this one.

    Attributes:
        totals: what the ranks learned.
        stop_voted: whether some rank voted to stop.
    """

    def __init__(
        self,
        config: Config,
        comm: Comm,
        network: QNetwork,
        clock: Clock | None = None,
        group: RankGroup | None = None,
    ) -> None:
        self.comm, self.clock, timer = comm, clock or Clock(1, 1, 1.0, 0), PhaseTimer()
        self.learner: Learner = make_learner(config, comm, network, torch.device("cpu"), group)
        self.strategy: Strategy = make_strategy(config, self.learner, comm, timer, self.clock, group=group)
        self.totals, self.stop_voted = Totals(), False

    def update(self, batch: Batch, reported: Sequence[float] = NO_REPORT) -> None:
        """Take one update with this rank's minibatch."""
        self.launch(batch, reported)
        self.wait()

    def launch(self, batch: Batch, reported: Sequence[float] = NO_REPORT) -> None:
        """Compute the gradient and launch its exchange."""
        learned = self.learner.compute_gradient(batch)
        self.strategy.launch(reported, learned, float(batch.weight.max()), progress=1.0)

    def wait(self) -> None:
        """Finish the update."""
        self.accumulate(self.strategy.wait())

    def serve(self) -> None:
        """Serve once, without a vote to stop."""
        self.accumulate(self.strategy.serve(stop=False))

    def exchange_stats(self, reported: Sequence[float]) -> None:
        """Exchange statistics without a gradient."""
        self.accumulate(self.strategy.exchange_stats(reported))

    def synchronize(self) -> None:
        """Make all ranks hold the same weights."""
        self.accumulate(self.strategy.synchronize())

    def accumulate(self, outcome: Outcome) -> None:
        """Add up what an exchange brought."""
        self.totals.add(outcome)
        self.stop_voted = self.stop_voted or outcome.stop

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint; they are not copies."""
        strategy = {f"sync.{name}": tensor for name, tensor in self.strategy.state().items()}
        return {**self.learner.state(), **strategy}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned."""
        self.learner.load_state(state)
        self.strategy.load_state({name: state[f"sync.{name}"] for name in self.strategy.state()})

    def sha256(self) -> str:
        """Return the digest of the weights."""
        return self.learner.sha256()
