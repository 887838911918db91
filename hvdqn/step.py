"""What one step of a rank's environments returns. Environments make it, replay stores it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bools: TypeAlias = NDArray[np.bool_]
Observation: TypeAlias = NDArray[Any]
"""uint8, bool or float32."""


@dataclass(slots=True)
class Step:
    """The result of one step in every environment of this rank. Arrays are [envs, ...], valid until the next step."""

    reward: NDArray[np.float32]
    """The reward to learn from, clipped if the configuration says so [envs]."""
    terminated: Bools
    """The episode reached a terminal state [envs]."""
    truncated: Bools
    """The episode was cut short, for example by a time limit [envs]."""
    next_observation: Observation
    """The observation that the action led to: the final observation if the episode ended [envs, *shape]."""
    observation: Observation
    """The observation to act on next: a reset observation where `fresh` [envs, *shape]."""
    fresh: Bools
    """`observation` begins a new episode [envs]."""
    valid: Bools
    """False where this step only reset the environment (NEXT_STEP autoreset): there is no transition [envs]."""
    action_mask: Bools | None = None
    """Legal actions at `observation` [envs, *action_shape, actions]; None if all are legal everywhere."""
    next_action_mask: Bools | None = None
    """Legal actions at `next_observation`; all of them where it is terminal."""
