"""Check that an environment keeps the rules of Gymnasium, and report in one line which one it breaks.

`check_spaces` runs when an environment is made. `check_first_calls` checks the first `reset` and the first `step` of
the environment and of each of its wrappers, so that the message names the class that breaks the rule. Later calls are
not checked, and cost nothing.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.wrappers import OrderEnforcing, TimeLimit

from hvdqn.errors import UserError

log = logging.getLogger(__name__)

RESET_RESULT = "it must return (observation, info)"
STEP_RESULT = "it must return (observation, reward, terminated, truncated, info)"
SUPPORTED_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
# The longest vector that an observation may become when it is flattened. Discrete spaces become one-hot vectors.
MOST_FLATTENED_NUMBERS = 10_000_000
# Wrappers that `gym.make` adds. They pass on what the environment returns, so error messages name the one below them.
PASS_ON = (OrderEnforcing, TimeLimit)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning once per process, however often environments are made again, as for each evaluation."""
    log.warning(message)


def check_spaces(env: gym.Env[Any, Any], name: str) -> None:
    """Check that an environment has an observation space and an action space.

    Raises:
        UserError: a space is missing, or is no `gymnasium.Space`.
    """
    for attribute in ("observation_space", "action_space"):
        space = getattr(env, attribute, None)
        if not isinstance(space, gym.Space):
            raise UserError(
                f"'{name}' has no {attribute}: {_class_of(env.unwrapped)}.{attribute} is a {_class_of(space)}; "
                "it must be a gymnasium.Space"
            )


def check_observations(space: gym.Space[Any], env: str, where: str = "") -> None:
    """Raise UserError for observation spaces that cannot be flattened to a fixed size, such as text and sequences.

    Args:
        space: the observation space, or a part of it.
        env: the environment's name, for the message.
        where: the place of the part in the whole space, for the message, such as "['camera']".
    """
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        for name, part in parts:
            check_observations(part, env, f"{where}[{name!r}]")
    elif not isinstance(space, SUPPORTED_SPACES):
        raise UserError(
            f"'{env}' observes a {type(space).__name__} space{' at ' + where if where else ''}; hvdqn supports Box, "
            "Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of those: use a --wrapper that drops the rest"
        )


def check_flattened_size(space: gym.Space[Any], env: str) -> None:
    """Raise UserError if a flattened observation would have no numbers, or more than `MOST_FLATTENED_NUMBERS`."""
    numbers = spaces.flatdim(space)
    if numbers == 0:
        raise UserError(f"'{env}' observes {one_line(space, 60)}, which holds no number")
    if numbers > MOST_FLATTENED_NUMBERS:
        raise UserError(
            f"'{env}' observes {one_line(space, 60)}; as a one-hot vector each observation would take {numbers:,} "
            f"numbers, and {MOST_FLATTENED_NUMBERS:,} is the most: use a --wrapper that gives a smaller one"
        )


def check_first_calls(env: gym.Env[Any, Any], name: str) -> None:
    """Arrange that the first `reset` and the first `step` of this environment and of its wrappers are checked.

    Those calls raise UserError if what they return breaks a rule of Gymnasium.
    """
    space = env.observation_space
    for layer in _layers(env):
        _FirstCalls(layer, name, space if layer is env else None, ())


def check_first_vector_calls(vector: VectorEnv[Any, Any, Any], name: str) -> None:
    """Do the same as `check_first_calls` for a vector environment that is not made of single environments."""
    for layer in _layers(vector):
        space = vector.single_observation_space if layer is vector else None
        _FirstCalls(layer, name, space, (vector.num_envs,))


def _layers(env: Any) -> Iterator[Any]:
    """Yield the environment and everything that it wraps, outermost first."""
    yield env
    while isinstance(env, (gym.Wrapper, VectorWrapper)):
        env = env.env
        yield env


class _FirstCalls:
    """Replaces `reset` and `step` of an environment or wrapper, until each has returned once and was checked.

    Args:
        layer: the environment, or one of its wrappers.
        name: the environment's name, for messages.
        space: the space of one observation. None: do not check observations, because a wrapper around this layer may
            still change them.
        batch: shape of the rewards: `(envs,)` for a vector, `()` for a single environment.
    """

    def __init__(self, layer: Any, name: str, space: gym.Space[Any] | None, batch: tuple[int, ...]) -> None:
        self.layer, self.name, self.space, self.batch = layer, name, space, batch
        self.calls = {method: getattr(layer, method) for method in ("reset", "step")}
        self.own = {method: vars(layer)[method] for method in self.calls if method in vars(layer)}
        vars(layer).update(reset=self.reset, step=self.step)

    def reset(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer's own `reset` and check what it returns."""
        try:
            result = self.calls["reset"](*args, **kwargs)
        except TypeError as error:
            unexpected = re.search(
                r"\breset\(\) got an unexpected keyword argument '(seed|options)'", str(error)
            )
            if not unexpected:
                raise
            rule = f"takes no '{unexpected[1]}'; write reset(self, *, seed=None, options=None)"
            raise self._broken("reset", rule) from error
        pair = isinstance(result, (tuple, list)) and len(result) == 2
        if not pair or not isinstance(result[1], (dict, type(None))):
            raise self._broken("reset", f"returned {_describe(result)}; {RESET_RESULT}")
        if self.space is not None:
            self._check_observation("reset", result[0], self.space)
        self._remove("reset")
        return result

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer's own `step` and check what it returns."""
        result = self.calls["step"](*args, **kwargs)
        if not isinstance(result, (tuple, list)) or len(result) != 5:
            old = ", as Gym did before 0.26" if isinstance(result, tuple) and len(result) == 4 else ""
            raise self._broken("step", f"returned {_describe(result)}{old}; {STEP_RESULT}")
        observation, reward, terminated, truncated, info = result
        if not isinstance(info, dict):
            raise self._broken("step", f"returned an info that is a {_class_of(info)}; it must be a dict")
        self._check_flags(terminated=terminated, truncated=truncated)
        if self.space is not None:
            self._check_observation("step", observation, self.space)
            if self.batch:
                self._check_rewards(reward)
        self._remove("step")
        return result

    def _check_observation(self, method: str, observation: Any, space: gym.Space[Any]) -> None:
        if not isinstance(space, spaces.Box):
            try:
                spaces.flatten(space, observation)
            except Exception as error:
                why = f"{_class_of(error)}: {one_line(error)}"
                raise self._broken(
                    method,
                    f"returned an observation that does not fit its observation_space ({why}); correct one of them",
                ) from error
            return
        try:
            array = np.asarray(observation)
        except ValueError:  # a list of lists of different lengths
            array = np.array(None)
        expected = (*self.batch, *space.shape)
        if array.shape != expected:
            what = f"shape {array.shape}, its observation_space needs {expected}"
        elif not np.can_cast(array.dtype, space.dtype, "same_kind"):
            what = f"dtype {array.dtype}, its observation_space has {space.dtype}"
        else:
            self._check_overflow(method, array)
            return
        raise self._broken(
            method, f"returned an observation of {what}; correct one of them, or use a --wrapper"
        )

    def _check_overflow(self, method: str, array: npt.NDArray[Any]) -> None:
        largest = np.abs(array, where=np.isfinite(array), out=np.zeros(array.shape, np.float64)).max(
            initial=0.0
        )
        if largest > np.finfo(np.float32).max:
            raise UserError(
                f"'{self.name}': {self._layer_class()}.{method}() returned an observation with numbers up to "
                f"{largest:.3g}; networks compute in float32, which holds up to 3.4e+38: use a --wrapper that makes "
                "them smaller"
            )

    def _check_flags(self, **flags: Any) -> None:
        for flag, value in flags.items():
            if np.size(value) != np.prod(self.batch, dtype=int):
                count = "one for each environment" if self.batch else "True or False"
                raise self._broken("step", f"returned {np.size(value)} values as {flag}; it must be {count}")

    def _check_rewards(self, reward: Any) -> None:
        array = np.asarray(reward)
        if array.shape != self.batch or array.dtype.kind not in "biuf":
            raise self._broken(
                "step",
                f"returned a reward of shape {array.shape} and dtype {array.dtype}; it must be {self.batch} numbers",
            )

    def _broken(self, method: str, rule: str) -> UserError:
        return UserError(f"'{self.name}' breaks a rule of Gymnasium: {self._layer_class()}.{method}() {rule}")

    def _layer_class(self) -> str:
        layer = self.layer
        while isinstance(layer, PASS_ON):
            layer = layer.env
        return _class_of(layer)

    def _remove(self, method: str) -> None:
        """Give the layer its own `reset` or `step` back."""
        if method in self.own:
            vars(self.layer)[method] = self.own[method]
        else:
            vars(self.layer).pop(method, None)


def to_number(reward: Any, name: str) -> float:
    """Return a reward as a float. It may be anything that holds one number, such as an array of shape (1,).

    Raises:
        UserError: the reward of the environment called `name` is no number, or more than one.
    """
    value = reward[0] if isinstance(reward, (list, tuple)) and len(reward) == 1 else reward
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        raise UserError(
            f"'{name}' gives a reward that is {_describe(reward)}; it must be one number: correct it, "
            "or use a --wrapper"
        ) from None


def _describe(value: Any) -> str:
    """Return a value's type and size in words for an error message, such as "a tuple of 4 values"."""
    if isinstance(value, (tuple, list)):
        return f"a {_class_of(value)} of {len(value)} values"
    if hasattr(value, "shape"):
        return f"a {_class_of(value)} of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {_class_of(value)}"


def _class_of(value: Any) -> str:
    return type(value).__name__


def one_line(message: object, width: int = 200) -> str:
    """Return the message on one line, cut to `width` characters."""
    text = " ".join(str(message).split())
    return text if len(text) <= width else text[: width - 3] + "..."
