"""Translate between the integers that a DQN chooses and the actions of an environment, and read masks of actions.

Everywhere outside of this package, actions are integers `[envs, *shape]`: `shape` is `()` for a Discrete space, and
`(dimensions,)` for one with several dimensions. Masks are `[envs, *shape, count]`, True where an action is legal.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from hvdqn.envs.contract import one_line
from hvdqn.errors import UserError
from hvdqn.step import Bools

Integers: TypeAlias = NDArray[np.int64]


class Actions:
    """An action space as integers.

    Args:
        space: of one environment.
        name: of the environment, for messages.

    Attributes:
        shape: `()` for Discrete actions, else `(dimensions,)`.
        count: number of actions in each dimension, the largest if they differ.
        exists: `[*shape, count]`, False where a dimension has fewer actions than others; None if all have as many.

    Raises:
        UserError: a DQN cannot act in this space.
    """

    def __init__(self, space: Any, name: str = "the environment") -> None:
        self.name = name
        if not isinstance(space, spaces.Discrete):
            raise UserError(
                f"'{name}' has the action space {one_line(space)}; DQN needs Discrete actions: "
                "choose another environment, or use a --wrapper that makes them Discrete"
            )
        self.shape: tuple[int, ...] = ()
        self.count = int(space.n)
        self.exists: Bools | None = None
        self._first = int(space.start)

    def to_environment(self, actions: Integers) -> NDArray[Any]:
        """Return the environments' own actions `[envs, ...]` for integers `[envs, *shape]`."""
        return actions + self._first if self._first else actions

    def read_masks(self, masks: Any, *batch: int) -> Bools:
        """Return masks as booleans `[*batch, *shape, count]`; of one environment if `batch` is empty.

        Args:
            masks: booleans, or numbers 0 and 1, one for each action.
            batch: number of environments.

        Raises:
            UserError: they have another shape or dtype.
        """
        array = _as_array(masks)
        flat = array.dtype.kind in "biuf" and array.size == math.prod(batch) * self.count
        if (
            not flat
            or array.shape[: len(batch)] != batch
            or (array.dtype != np.bool_ and not _is_binary(array))
        ):
            raise UserError(
                f"'{self.name}' gives an action_mask of shape {array.shape} and dtype {array.dtype}; it must hold "
                f"{self.count} booleans or numbers 0 and 1, one for each action"
            )
        return array.astype(np.bool_).reshape(*batch, *self.shape, self.count)


def draw_actions(
    rng: np.random.Generator, shape: tuple[int, ...], count: int, mask: Bools | None
) -> Integers:
    """Return random actions of this shape, all legal ones equally likely.

    Args:
        rng: draws them.
        shape: `[envs, *shape]`.
        count: number of actions.
        mask: of legal actions `[envs, *shape, count]`; None: all are legal.
    """
    if mask is None:
        return rng.integers(count, size=shape)
    drawn: Integers = np.where(mask, rng.random(mask.shape), -1.0).argmax(axis=-1)
    return drawn


def _as_array(masks: Any) -> NDArray[Any]:
    try:
        return np.asarray(masks)
    except ValueError:  # lists of different lengths
        return np.asarray(None)


def _is_binary(array: NDArray[Any]) -> bool:
    return bool(((array == 0) | (array == 1)).all())
