"""Replay: a ring of single observations per env; n-step, frame-stacked minibatches built when sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdqn.replay.frames import Rows
from hvdqn.replay.resharding import reshard
from hvdqn.replay.sampling import UNCORRECTED, Batch, Importance, PrioritizedSampler, Sampler, UniformSampler
from hvdqn.replay.storage import Observations, Ring, State, Step

__all__ = [
    "Batch",
    "Importance",
    "PrioritizedSampler",
    "Replay",
    "Ring",
    "Sampler",
    "Step",
    "UniformSampler",
    "reshard",
]


class Replay:
    """The replay shard of one rank: a ring and what draws from it.

    Args:
        ring: where transitions are kept.
        sampler: how they are drawn.
    """

    def __init__(self, ring: Ring, sampler: Sampler) -> None:
        self.ring = ring
        self.sampler = sampler

    def __len__(self) -> int:
        """Transitions held."""
        return len(self.ring)

    def start(self, observation: Observations) -> None:
        """Begin an episode in every env, with these reset observations [envs, *shape]."""
        self.ring.start(observation)
        self.sampler.follow()

    def add(self, action: npt.NDArray[np.integer[Any]], step: Step) -> None:
        """Store what `action` [envs] led to in every env."""
        self.ring.add(action, step)
        self.sampler.follow()

    def sample(self, batch_size: int, importance: Importance = UNCORRECTED) -> Batch:
        """Draw a minibatch; it is overwritten by the second next.

        Raises:
            ValueError: there is no transition to draw yet.
        """
        return self.sampler.sample(batch_size, importance)

    def update(self, rows: Rows, td_errors: npt.NDArray[np.floating[Any]]) -> None:
        """Tell the absolute TD errors [batch] of `Batch.rows`."""
        self.sampler.update(rows, td_errors)

    def state(self) -> State:
        """Everything an exact resume needs, as views where it is large."""
        return {**self.ring.state(), **self.sampler.state()}

    def load_state(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take back what `state` gave.

        Raises:
            ValueError: the state is of another shape of replay.
        """
        self.ring.load_state(state)
        self.sampler.load_state(state)
