"""A minibatch of transitions, and the settings of its importance weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hvdqn.step import Bools

Floats: TypeAlias = npt.NDArray[np.float32]
Rows: TypeAlias = npt.NDArray[np.int64]
ObservationBatch: TypeAlias = npt.NDArray[Any] | Tensor


@dataclass(slots=True)
class Batch:
    """A minibatch of n-step transitions. `sample` returns the same arrays, overwritten, at every second call."""

    observation: ObservationBatch
    """[batch, *shape], or [batch, frame_stack, *shape] with the oldest frame first. A tensor if replay is on a GPU."""
    action: npt.NDArray[np.int64]
    """The action taken at each observation [batch, *action_shape]: [batch], or [batch, dimensions]."""
    reward: Floats
    """Discounted sum of the rewards between `observation` and `next_observation` [batch]."""
    next_observation: ObservationBatch
    """The observation n_step steps later, or the final one if the episode ended before; same shape. `[0, *shape]` if
    there is nothing to bootstrap from: `reward` is the whole return, and `discount` 0 (see `Rollout`)."""
    discount: Floats
    """What the value of `next_observation` is multiplied by: gamma ** steps, 0 after a termination [batch]."""
    weight: Floats
    """Importance weights [batch]. Not normalized: the learner divides them by the maximum over all ranks."""
    row_ids: Rows
    """Numbers that name the transitions to `update_priorities` [batch]."""
    action_mask: Bools | None = None
    """Legal actions at `observation` [batch, *action_shape, actions]; None if all are legal everywhere."""
    next_action_mask: Bools | None = None
    """Legal actions at `next_observation`, among which the bootstrap value is found; same shape."""


@dataclass(frozen=True, slots=True)
class Importance:
    """The settings of importance weights. All ranks must use equal ones, or the job's gradient is biased.

    Args:
        beta: exponent of the correction; 1 corrects fully, 0 not at all.
        n_global: number of transitions in the replays of all ranks together.
        size: number of ranks that sample, all with the same batch size.
    """

    beta: float = 0.0
    n_global: int = 1
    size: int = 1


NO_CORRECTION = Importance()
"""Gives every transition the weight 1."""
