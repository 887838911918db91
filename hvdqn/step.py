"""Define `Step`, the result of one step of a rank's environments, which replay stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bools: TypeAlias = NDArray[np.bool_]
Observation: TypeAlias = NDArray[Any]
"""Observations of this rank's environments [envs, *shape], of dtype uint8, bool or float32."""


@dataclass(slots=True)
class Step:
    """The result of one step in every environment of this rank. Its arrays may be overwritten by the next step."""

    reward: NDArray[np.float32]
    """The reward to learn from, clipped if the configuration says so [envs]."""
    terminated: Bools
    """Whether the episode reached a terminal state [envs]."""
    truncated: Bools
    """Whether the episode was cut short, for example by a time limit [envs]."""
    next_observation: Observation
    """The observation that the action led to: the final observation if the episode ended [envs, *shape]."""
    observation: Observation
    """The observation to act on next: the first one of a new episode where `fresh` [envs, *shape]."""
    fresh: Bools
    """Whether `observation` begins a new episode [envs]."""
    valid: Bools
    """Whether this step is a transition; False if it only reset the environment (NEXT_STEP autoreset) [envs]."""
    action_mask: Bools | None = None
    """Legal actions at `observation` [envs, *action_shape, actions]; None if all are legal everywhere."""
    next_action_mask: Bools | None = None
    """Legal actions at `next_observation`; all of them where it is terminal."""
