"""Wrap every single environment: save and load its state, reduce its infos, and convert the exceptions it raises."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from hvdqn.envs import snapshot
from hvdqn.envs.actions import Actions
from hvdqn.envs.atari_variant import LIFE_LOST
from hvdqn.envs.contract import one_line, to_number, warn_once
from hvdqn.envs.episode_info import EPISODE_INFO, plain_info
from hvdqn.envs.global_random import seed_global_generators
from hvdqn.envs.masks import ACTION_MASK, EnvironmentMask


class SingleEnvironment(gym.Wrapper[Any, Any, Any, Any]):
    """The outermost wrapper of one environment in a vector: it saves the state, and drops infos that hvdqn never reads.

    Args:
        env: the environment, with the user's wrappers.
        index: the environment's number in its vector.
        name: the environment's name, for messages.
        own_process: whether it runs in a process of its own, as in an async vector.
        actions: the environment's action space.
    """

    def __init__(
        self, env: gym.Env[Any, Any], index: int, name: str, own_process: bool, actions: Actions
    ) -> None:
        super().__init__(env)
        self._index, self._name, self._own_process = index, name, own_process
        self._mask = EnvironmentMask(env, actions)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; see `gym.Env`. Of its info only the action mask is kept, if there is one."""
        if self._own_process and seed is not None:
            seed_global_generators(seed, own_process=True)
        try:
            observation, info = self.env.reset(seed=seed, options=options)
        except BaseException as error:
            raise as_exception(error)  # noqa: B904 - the same error, or one with its traceback
        mask = self._mask.read(info)
        return observation, {} if mask is None else {ACTION_MASK: mask}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """See `gym.Env`. The info holds the action mask, if any, and of an episode's last step what logs see of it."""
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except BaseException as error:
            raise as_exception(error)  # noqa: B904
        if not isinstance(reward, float):
            reward = to_number(reward, self._name)
        mask = self._mask.read(info, may_lack=bool(terminated))
        kept: dict[str, Any] = {} if mask is None else {ACTION_MASK: mask}
        if not (terminated or truncated):
            return observation, reward, False, False, kept
        # Copy, because the reset that follows may write to the same buffer.
        final = np.array(observation)
        kept |= {LIFE_LOST: bool(info.get(LIFE_LOST)), EPISODE_INFO: (plain_info(info),)}
        return final, reward, bool(terminated), bool(truncated), kept

    def close(self) -> None:
        """Close the environment. One that fails to close must not end a run whose training is over."""
        try:
            super().close()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if not self._own_process:
                warn_once(describe_close_failure(self._name, error))

    def save_state(self) -> dict[str, Any] | None:
        """Return the environment's state as `snapshot.save` does, or None if it cannot be saved."""
        return snapshot.save(self.env)

    def load_state(self, states: list[dict[str, Any]]) -> str:
        """Load this environment's state, number `index` of `states`; return an error message, or "" if it fits.

        It takes the states of all environments, because `VectorEnv.call` passes the same arguments to each.
        """
        try:
            snapshot.load(self.env, states[self._index])
        except ValueError as error:  # an exception would end the worker of an async vector
            return str(error)
        return ""


def as_exception(error: BaseException) -> BaseException:
    """Return an environment's error, or a RuntimeError with its traceback if it is a SystemExit or the like.

    SystemExit would end this rank alone, without a message, and with the exit code that the environment chose.
    """
    if isinstance(error, (Exception, KeyboardInterrupt)):
        return error
    what = (
        f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
    )
    replaced = RuntimeError(f"the environment raised {what}").with_traceback(error.__traceback__)
    replaced.__suppress_context__ = True
    return replaced


def describe_close_failure(name: str, error: BaseException) -> str:
    """Return a warning that this environment raised an error in `close`."""
    error = as_exception(error)
    return f"'{name}' could not be closed: {type(error).__name__}: {one_line(error)}"
