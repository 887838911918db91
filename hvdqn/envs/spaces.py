"""What a policy must know of its environments: their spaces, and how an observation becomes an input of the network.

All of it is plain data, which a checkpoint keeps, so that a policy needs neither the environment nor its package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation
from numpy.typing import NDArray

from hvdqn.envs.actions import Actions
from hvdqn.errors import UserError

_SOURCE = "flattened_from"


class Spaces(NamedTuple):
    """The spaces of the environments, as plain data."""

    observation_shape: tuple[int, ...]
    """Of the network's input, without frame stack."""
    is_image: bool
    num_actions: int
    observation_dtype: str
    """Of the network's input: bool, uint8 or float32."""
    observation_space: Mapping[str, Any]
    """Of the environment, from `describe_space`."""
    first_action: int
    """Number of the environment's first action, if it is Discrete."""
    action_shape: tuple[int, ...] = ()
    """Of the integers that the network chooses: see `Actions`."""
    action_space: Mapping[str, Any] | None = None
    """Of the environment, from `describe_actions`; None: Discrete."""

    @property
    def are_numbers(self) -> bool:
        """Whether observations are vectors of numbers, and neither images nor one-hot vectors."""
        one_hot = self.observation_space["kind"] in ("Discrete", "MultiDiscrete", "MultiBinary")
        return not self.is_image and not one_hot


def flatten_observations(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Return the environment with flat Box observations; their space remembers the one that it was made from."""
    flat = FlattenObservation(env)
    vars(flat.observation_space)[_SOURCE] = env.observation_space
    return flat


def source_of(space: gym.Space[Any]) -> gym.Space[Any]:
    """Return the space of the environment itself, before `flatten_observations`."""
    source: gym.Space[Any] = vars(space).get(_SOURCE, space)
    return source


def describe_space(space: gym.Space[Any]) -> dict[str, Any]:
    """Return an observation space as plain data for JSON; bounds are left out.

    Raises:
        TypeError: the space is of another kind than those that hvdqn observes.
    """
    if isinstance(space, spaces.Box):
        return {"kind": "Box", "shape": list(space.shape), "dtype": str(np.dtype(space.dtype))}
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": "MultiBinary", "shape": list(space.shape)}
    if isinstance(space, spaces.Dict):
        return {"kind": "Dict", "parts": [[name, describe_space(part)] for name, part in space.items()]}
    if isinstance(space, spaces.Tuple):
        return {"kind": "Tuple", "parts": [describe_space(part) for part in space]}
    raise TypeError(f"a {type(space).__name__} space has no description")


def describe_actions(space: gym.Space[Any]) -> dict[str, Any] | None:
    """Return an action space as plain data for JSON, with bounds; None for Discrete."""
    if isinstance(space, spaces.Discrete):
        return None
    bounds = {"low": space.low.tolist(), "high": space.high.tolist()} if isinstance(space, spaces.Box) else {}
    return {**describe_space(space), **bounds}


def make_actions(known: Spaces, name: str, bins: int) -> Actions:
    """Return the action space of environments.

    Args:
        known: their spaces.
        name: of the environment, for messages.
        bins: `--action-bins`.
    """
    if known.action_space is None:
        return Actions(spaces.Discrete(known.num_actions, start=known.first_action), name)
    return Actions(make_space(known.action_space), name, bins)


def make_space(data: Mapping[str, Any]) -> gym.Space[Any]:
    """Return the space that `describe_space` or `describe_actions` described.

    Raises:
        KeyError, TypeError, ValueError, AssertionError: the data is no such description.
    """
    kind = data["kind"]
    if kind == "Box":
        dtype = np.dtype(data["dtype"])
        low, high = (0, 255) if dtype == np.uint8 else (-np.inf, np.inf)
        if dtype.kind in "iub" and dtype != np.uint8:
            low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if "low" in data:
            return spaces.Box(np.array(data["low"], dtype), np.array(data["high"], dtype), dtype=dtype.type)
        return spaces.Box(low, high, tuple(data["shape"]), dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(data["n"], start=data["start"])
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(data["nvec"], start=np.array(data["start"]))
    if kind == "MultiBinary":
        return spaces.MultiBinary(data["shape"])
    if kind == "Dict":
        named = {name: make_space(part) for name, part in data["parts"]}
        whole = spaces.Dict({})
        whole.spaces = named  # the constructor might sort them
        return whole
    if kind == "Tuple":
        return spaces.Tuple([make_space(part) for part in data["parts"]])
    raise ValueError(f"unknown kind of space {kind!r}")


def to_inputs(known: Spaces, space: gym.Space[Any], observation: Any) -> tuple[NDArray[Any], bool]:
    """Return observations of the environment as inputs of the network `[batch, *observation_shape]`.

    Args:
        known: the spaces that the network was made for.
        space: `make_space(known.observation_space)`.
        observation: one observation, or a batch as a vector environment returns it.

    Returns:
        The inputs, without frame stack, and whether it was a single observation.

    Raises:
        UserError: it does not belong to the space.
    """
    try:
        count = _batch_size(space, observation)
        if isinstance(space, spaces.Box):
            rows = np.asarray(observation)[None] if count is None else np.asarray(observation)
            fits = rows.shape[1:] == space.shape and np.can_cast(rows.dtype, space.dtype, "same_kind")
            if not fits:
                raise ValueError(f"shape {rows.shape[1:]} and dtype {rows.dtype}")
        else:
            batch = [observation] if count is None else [_row(space, observation, i) for i in range(count)]
            rows = np.stack([np.asarray(spaces.flatten(space, one)) for one in batch])
        inputs = rows.astype(known.observation_dtype, copy=False)
        return inputs.reshape(len(inputs), *known.observation_shape), count is None
    except (KeyError, IndexError, TypeError, ValueError, AssertionError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"the observation does not fit ({what}); the policy takes one of {space}, or a batch of them"
        ) from error


def _batch_size(space: gym.Space[Any], observation: Any) -> int | None:
    """Return the number of observations in a batch; None for a single observation."""
    if isinstance(space, spaces.Dict):
        name, part = next(iter(space.items()))
        return _batch_size(part, observation[name])
    if isinstance(space, spaces.Tuple):
        return _batch_size(space[0], observation[0])
    assert space.shape is not None
    return len(observation) if np.ndim(observation) == len(space.shape) + 1 else None


def _row(space: gym.Space[Any], batch: Any, index: int) -> Any:
    """Return one observation of a batch."""
    if isinstance(space, spaces.Dict):
        return {name: _row(part, batch[name], index) for name, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_row(part, values, index) for part, values in zip(space, batch, strict=True))
    return batch[index]
