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
    """An action space as integers: Discrete, MultiDiscrete, MultiBinary, or Box with a few values of each dimension.

    Args:
        space: of one environment.
        name: of the environment, for messages.
        bins: number of evenly spaced values of each dimension of a Box, both of its bounds included (Seyde et al. 2023,
            "Solving Continuous Control via Q-Learning").

    Attributes:
        shape: `()` for Discrete actions, else `(dimensions,)`.
        count: number of actions in each dimension, the largest if they differ.
        translates: whether the environment has other names for its actions than these integers.
        exists: `[*shape, count]`, False where a dimension has fewer actions than others; None if all have as many.
        total: number of actions of all dimensions together.
        values: the environment's names of the actions `[*shape, count]`; None if they are these integers.
        space_shape: shape of an action of the environment.

    Raises:
        UserError: a DQN cannot act in this space.
    """

    def __init__(self, space: Any, name: str = "the environment", bins: int = 0) -> None:
        self.name = name
        if bins and not isinstance(space, spaces.Box):
            raise UserError(
                f"--action-bins divides the dimensions of a Box action space, and '{name}' has {one_line(space)}; "
                "leave it out"
            )
        sizes = _sizes(space, name, bins)
        self.shape: tuple[int, ...] = () if isinstance(space, spaces.Discrete) else (len(sizes),)
        self.count, self.total = int(sizes.max()), int(sizes.sum())
        exists: Bools = np.arange(self.count) < sizes[:, None]
        self.exists = None if exists.all() else exists
        self.space_shape: tuple[int, ...] = space.shape
        self._dimension = () if self.shape == () else (np.arange(len(sizes)),)
        self.values = _environment_values(space, self.count)
        self.translates = self.values is not None

    def to_environment(self, actions: Integers) -> NDArray[Any]:
        """Return the environments' own actions `[envs, ...]` for integers `[envs, *shape]`."""
        if self.values is None:
            return actions
        index = (*self._dimension, actions)
        chosen: NDArray[Any] = self.values[index]
        return chosen.reshape(len(actions), *self.space_shape)

    def read_masks(self, masks: Any, *batch: int) -> Bools:
        """Return masks as booleans `[*batch, *shape, count]`; of one environment if `batch` is empty.

        Args:
            masks: booleans, or numbers 0 and 1, one for each action; those of all dimensions in a row, or padded to
                `[*batch, *shape, count]`, or for one environment a list with an array for each dimension.
            batch: number of environments.

        Raises:
            UserError: they have another shape or dtype.
        """
        array, padded = _as_array(masks), (*batch, *self.shape, self.count)
        fits = array.shape in (padded, (*batch, self.total)) and array.dtype.kind in "biuf"
        if not fits or (array.dtype != np.bool_ and not ((array == 0) | (array == 1)).all()):
            raise UserError(
                f"'{self.name}' gives an action_mask of shape {array.shape} and dtype {array.dtype}; it must hold "
                f"{self.total} booleans or numbers 0 and 1, one for each action"
            )
        if self.exists is None:
            return array.astype(np.bool_).reshape(padded)
        legal = np.zeros(padded, np.bool_)
        legal[..., self.exists] = array[..., self.exists] if array.shape == padded else array
        return legal


def _sizes(space: Any, name: str, bins: int) -> Integers:
    """Return the number of actions of each dimension, `[dimensions]`.

    Raises:
        UserError: a DQN cannot act in this space.
    """
    if isinstance(space, spaces.Discrete):
        return np.array([space.n], np.int64)
    if isinstance(space, (spaces.MultiDiscrete, spaces.MultiBinary)):
        sizes = space.nvec if isinstance(space, spaces.MultiDiscrete) else np.full(space.shape, 2)
        return np.asarray(sizes, np.int64).ravel()
    if isinstance(space, spaces.Box) and not space.is_bounded():
        raise UserError(
            f"'{name}' has the action space {one_line(space)}, which is unbounded; use a --wrapper such as "
            "gymnasium.wrappers:RescaleAction"
        )
    if isinstance(space, spaces.Box) and bins:
        return np.full(math.prod(space.shape), bins, np.int64)
    raise UserError(
        f"'{name}' has the action space {one_line(space)}; DQN needs Discrete actions: "
        + ("give --action-bins 3" if isinstance(space, spaces.Box) else "choose another environment")
        + ", or use a --wrapper that makes them Discrete"
    )


def _environment_values(space: Any, count: int) -> NDArray[Any] | None:
    """Return what the environment calls each action, `[*shape, count]`; None if it counts from 0 as well."""
    if isinstance(space, spaces.Box):
        values = np.linspace(space.low.ravel(), space.high.ravel(), count, axis=-1, dtype=np.float64)
        return (values if space.dtype.kind == "f" else np.rint(values)).astype(space.dtype)
    first = np.asarray(getattr(space, "start", 0))
    if not first.any() and len(space.shape) < 2:
        return None
    if isinstance(space, spaces.Discrete):
        return np.arange(count) + int(space.start)
    return (np.broadcast_to(first, space.shape).reshape(-1, 1) + np.arange(count)).astype(space.dtype)


def draw_legal(rng: np.random.Generator, mask: Bools) -> Integers:
    """Return random legal actions, all equally likely: a mask `[envs, *shape, count]` gives `[envs, *shape]`."""
    drawn: Integers = np.where(mask, rng.random(mask.shape), -1.0).argmax(axis=-1)
    return drawn


def _as_array(masks: Any) -> NDArray[Any]:
    try:
        return np.asarray(masks)
    except ValueError:  # arrays of different lengths, one for each dimension
        try:
            return np.concatenate([np.ravel(mask) for mask in masks])
        except ValueError:
            return np.asarray(None)
