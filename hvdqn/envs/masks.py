"""Find the masks of legal actions that environments give with their observations.

A mask may be an `action_mask` in the infos, as in Gymnasium and PettingZoo, an `action_mask` in a Dict of observations,
or what a method `action_masks()` returns. `Masks` sorts those of a vector environment by what they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from hvdqn.envs.actions import Actions
from hvdqn.errors import UserError
from hvdqn.step import Bools, Step

ACTION_MASK = "action_mask"


class MaskFromObservation(gym.Wrapper[Any, Any, Any, Any]):
    """Moves the `action_mask` of Dict observations to the info. A Dict of one other entry becomes that entry."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Dict)
        others = {key: space for key, space in env.observation_space.items() if key != ACTION_MASK}
        self.observation_space = spaces.Dict(others) if len(others) > 1 else next(iter(others.values()))

    @staticmethod
    def applies_to(space: gym.Space[Any]) -> bool:
        """Return True for a Dict space with an `action_mask` and something else."""
        return isinstance(space, spaces.Dict) and ACTION_MASK in space.spaces and len(space.spaces) > 1

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """See `gym.Env`."""
        return self._split(*self.env.reset(seed=seed, options=options))

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """See `gym.Env`."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        observation, info = self._split(observation, info)
        return observation, reward, terminated, truncated, info

    def _split(self, observation: Any, info: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        rest, mask = split_mask(observation)
        return rest, {**(info or {}), ACTION_MASK: mask}


def split_mask(observation: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return Dict observations without their `action_mask`, and that; one other entry is returned by itself."""
    rest = {key: value for key, value in observation.items() if key != ACTION_MASK}
    return rest if len(rest) > 1 else next(iter(rest.values())), observation[ACTION_MASK]


class EnvironmentMask:
    """Reads the mask of one environment after each of its calls.

    Args:
        env: with the user's wrappers.
        actions: its action space.
    """

    def __init__(self, env: gym.Env[Any, Any], actions: Actions) -> None:
        self._actions = actions
        self._method: Callable[[], Any] | None = None
        if env.has_wrapper_attr("action_masks") and callable(method := env.get_wrapper_attr("action_masks")):
            self._method = method
        self._expected: bool | None = None  # unknown until the first reset

    def read(self, info: Any, may_lack: bool = False) -> Bools | None:
        """Return the mask that belongs to this info, `[*shape, count]`; None if the environment gives none.

        Args:
            info: that of the call, a dict or None.
            may_lack: whether there is no need for a mask, because the episode has terminated.

        Raises:
            UserError: masks come only sometimes, or have the wrong shape or dtype.
        """
        mask = info.get(ACTION_MASK) if info else None
        if mask is None and self._method is not None:
            mask = self._method()
        if self._expected is None:
            self._expected = mask is not None
        if (mask is not None) != self._expected and not may_lack:
            raise UserError(masks_lack(self._actions.name))
        return None if mask is None or not self._expected else self._actions.read_masks(mask)


def masks_lack(name: str) -> str:
    """Return the message about an environment that gives masks only sometimes."""
    return (
        f"'{name}' gives an action_mask with some observations and not with others; it must come with each, also that "
        "of reset and a truncated episode's last"
    )


class Masks:
    """Sorts the masks in the infos of a vector environment: those to act with, and those of final observations.

    Args:
        actions: the action space of one environment.
        num_envs: number of environments.
    """

    def __init__(self, actions: Actions, num_envs: int) -> None:
        self._actions, self._num_envs = actions, num_envs
        self._given = False  # whether the environments give masks
        self._none = np.zeros(num_envs, np.bool_)

    def of_reset(self, infos: dict[str, Any] | None) -> Bools | None:
        """Return the masks of a reset's observations `[envs, *shape, count]`; None if all actions are legal."""
        self._given = bool(infos) and ACTION_MASK in infos  # type: ignore[operator]
        if self._given:
            return self._read(infos or {}, self._none)
        exists = self._actions.exists
        return None if exists is None else np.broadcast_to(exists, (self._num_envs, *exists.shape))

    def add_to(self, step: Step, infos: dict[str, Any], before: Bools | None) -> None:
        """Set the masks of a step.

        Args:
            step: with everything but its masks.
            infos: of the step; `final_info` holds what belongs to final observations, if the environment was reset.
            before: the masks before this step, which stay where environments give none.

        Raises:
            UserError: masks come only sometimes, have the wrong shape or dtype, or allow no action.
        """
        if not self._given:
            if ACTION_MASK in infos:
                raise UserError(masks_lack(self._actions.name))
            step.action_mask = step.next_action_mask = before
            return
        was_reset = step.fresh & step.valid
        # Nothing is chosen or estimated in a terminal state.
        step.action_mask = self._read(infos, step.terminated & ~was_reset)
        step.next_action_mask = step.action_mask
        if np.count_nonzero(was_reset):
            final = self._read(infos.get("final_info", {}), step.terminated | ~was_reset)
            step.next_action_mask = _merge(was_reset, final, step.action_mask)

    def after_manual_reset(self, infos: dict[str, Any], first: dict[str, Any], done: Bools) -> None:
        """Add to a step's infos those of the reset that followed, as if the environment had reset itself.

        Args:
            infos: of the step.
            first: of the reset.
            done: the environments that were reset `[envs]`.
        """
        if self._given and ACTION_MASK in first:
            mask, given = self._read_any(infos)
            first_mask, first_given = self._read_any(first)
            infos["final_info"] = {ACTION_MASK: mask, f"_{ACTION_MASK}": given}
            infos[ACTION_MASK] = _merge(done, first_mask, mask)
            infos[f"_{ACTION_MASK}"] = np.where(done, first_given, given)

    def _read_any(self, infos: dict[str, Any]) -> tuple[Bools, Bools]:
        """Return the masks `[envs, *shape, count]`, and which environments gave one `[envs]`."""
        if ACTION_MASK not in infos:
            shape = (self._num_envs, *self._actions.shape, self._actions.count)
            return np.zeros(shape, np.bool_), self._none
        masks = self._actions.read_masks(infos[ACTION_MASK], self._num_envs)
        return masks, np.asarray(infos.get(f"_{ACTION_MASK}", ~self._none))

    def _read(self, infos: dict[str, Any], may_lack: Bools) -> Bools:
        """Return the masks `[envs, *shape, count]`; where one may lack `[envs]`, all actions count as legal then."""
        masks, given = self._read_any(infos)
        unusable = ~(given & masks.any(axis=-1).reshape(self._num_envs, -1).all(axis=1))
        if not np.count_nonzero(unusable):
            return masks
        wrong = np.flatnonzero(unusable & ~may_lack)
        if wrong.size and not given[wrong[0]]:
            raise UserError(masks_lack(self._actions.name))
        if wrong.size:
            raise UserError(
                f"'{self._actions.name}' gives an action_mask that allows no action in a state that is not terminal "
                f"(env {wrong[0]}); it must allow one, or the episode must be terminated"
            )
        exists = self._actions.exists
        masks[unusable] = True if exists is None else exists
        return masks


def _merge(where: Bools, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """Return rows of `one` where `where` is True `[envs]`, and of `other` elsewhere `[envs, ...]`."""
    return np.where(where.reshape(-1, *(1 for _ in one.shape[1:])), one, other)
