"""Wrap a Gymnasium vector environment so that `step` returns the same `Step` for every autoreset mode."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from hvdqn.envs import snapshot
from hvdqn.envs.actions import Actions
from hvdqn.envs.atari import AtariVector
from hvdqn.envs.atari_variant import LIFE_LOST
from hvdqn.envs.contract import warn_once
from hvdqn.envs.episode_info import info_of
from hvdqn.envs.global_random import seed_global_generators
from hvdqn.envs.masks import ACTION_MASK, Masks
from hvdqn.envs.process_settings import process_settings_kept
from hvdqn.envs.spaces import Spaces, describe_actions, describe_space, source_of
from hvdqn.errors import UserError
from hvdqn.step import Bools, Observation, Step

log = logging.getLogger(__name__)

MAX_TEXT_BYTES = 50_000_000
"""The most JSON text that the state of a rank's environments may take: a file of a checkpoint holds 100 MB of it."""


class Episode(NamedTuple):
    """An episode that has ended."""

    episode_return: float
    """Undiscounted and unclipped."""
    length: int
    """In env steps."""
    env: int
    """Index of the environment in its rank."""
    info: dict[str, Any]
    """Numbers, text and arrays of numbers in the info of the last step."""


class Environments:
    """Steps the vectorized environments of one rank.

    Observations are single frames, without frame stack, in the dtype that `stored_dtype` returns. Images keep their
    shape; all other observations are flattened. Actions are integers `[envs, *action_shape]`, each in [0, num_actions):
    see `actions`.

    Args:
        vector: any Gymnasium vector environment with a Box observation space.
        seed: the seed of the first `reset`; each environment's own seed is derived from it.
        actions: its action space; by default that of the vector's environments.
        description: one line that describes the environments, for the log.
        clip_rewards: whether to clip `Step.reward` to [-1, 1]; the returns in `Episode` are never clipped.
        continues_exactly: tests on small copies whether a restored state reproduces the same steps. None: `state`
            always returns None.
    """

    def __init__(
        self,
        vector: VectorEnv[Any, Any, Any],
        seed: int,
        *,
        actions: Actions | None = None,
        description: str = "",
        clip_rewards: bool = False,
        continues_exactly: Callable[[], bool] | None = None,
    ):
        box = vector.single_observation_space
        assert isinstance(box, gym.spaces.Box)
        self.actions = actions or Actions(vector.single_action_space)
        self.num_envs = vector.num_envs
        self.num_actions, self.action_shape = self.actions.count, self.actions.shape
        self.action_mask: Bools | None = None
        """Legal actions at the current observations `[envs, *action_shape, num_actions]`; None: all are legal."""
        self._masks = Masks(self.actions, self.num_envs)
        self.description = description
        self.is_image = is_image(box)
        self.observation_shape = box.shape if self.is_image else (math.prod(box.shape),)
        self.observation_dtype = stored_dtype(box)
        self._vector = vector
        self._seed = seed
        self._clip_rewards = clip_rewards
        self._continues_exactly = continues_exactly
        self._restores_exactly: bool | None = None  # unknown until `state` is called for the first time
        self._make_step = {
            AutoresetMode.NEXT_STEP: self._step_next_step,
            AutoresetMode.SAME_STEP: self._step_same_step,
            AutoresetMode.DISABLED: self._step_disabled,
        }[AutoresetMode(vector.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))]
        self._step_async = getattr(vector, "step_async", None)
        self._step_wait = getattr(vector, "step_wait", None)
        self._seeded = False
        self._pending: NDArray[Any] | None = None  # the actions that `send` sent
        self._episodes: list[Episode] = []
        self._all = _constant(self.num_envs, True)
        self._none = _constant(self.num_envs, False)
        self._shape = (self.num_envs, *self.observation_shape)
        self._observation: Observation = np.zeros(self._shape, self.observation_dtype)
        self._clear()

    @property
    def spaces(self) -> Spaces:
        """What a policy must know of these environments."""
        return Spaces(
            self.observation_shape,
            self.is_image,
            self.num_actions,
            str(self.observation_dtype),
            describe_space(source_of(self._vector.single_observation_space)),
            int(getattr(self._vector.single_action_space, "start", 0)) if self.action_shape == () else 0,
            self.action_shape,
            describe_actions(self._vector.single_action_space),
        )

    def reset(self, seed: int | None = None) -> Observation:
        """Start a new episode in every env and return the first observations, `[envs, *observation_shape]`.

        The first call seeds the envs with the constructor's seed. Later calls continue the envs' random generators,
        unless they pass a `seed`. Episodes that a reset cuts off are not reported.
        """
        entropy = self._seed if seed is None else seed
        seeds: list[int] | None = None
        if seed is not None or not self._seeded:
            seeds = [int(s) >> 1 for s in np.random.SeedSequence(entropy).generate_state(self.num_envs)]
        # Other native vectors take a single seed and derive the seeds of their envs from it.
        takes_list = isinstance(self._vector, (SyncVectorEnv, AsyncVectorEnv, AtariVector))
        if seeds is not None and not isinstance(self._vector, AsyncVectorEnv):
            seed_global_generators(seeds[0], own_process=False)
        with process_settings_kept():
            observation, infos = self._vector.reset(seed=seeds if takes_list or seeds is None else seeds[0])  # type: ignore[arg-type]
        self.action_mask = self._masks.of_reset(infos)
        self._clear()
        self._seeded = True
        self._observation = self._to_storage(observation)
        return self._observation

    def step(self, action: NDArray[np.int64]) -> Step:
        """Take one action in every env. `action`: int64 `[envs, *action_shape]`, each in [0, num_actions)."""
        self.send(action)
        return self.receive()

    def send(self, action: NDArray[np.int64]) -> None:
        """Start a step with these actions, int64 `[envs, *action_shape]`; `receive` returns its result.

        ALE's threads and the worker processes of an async vector compute it in the background meanwhile. Other
        environments step in `receive`.
        """
        assert self._pending is None, "send was called twice without receive"
        self._pending = self.actions.to_environment(action) if self.actions.translates else action
        if self._step_async is not None:
            self._step_async(self._pending)

    def receive(self) -> Step:
        """Wait for the step that `send` started and return its result."""
        assert self._pending is not None, "receive was called without send"
        observation, reward, terminated, truncated, infos = (
            self._vector.step(self._pending) if self._step_wait is None else self._step_wait()
        )
        self._pending = None
        step = self._make_step(self._to_storage(observation), reward, terminated, truncated, infos)
        if self.action_mask is not None or ACTION_MASK in infos:
            self._masks.add_to(step, infos, self.action_mask)
            self.action_mask = step.action_mask
        if self._clip_rewards:
            step.reward = np.minimum(np.maximum(step.reward, -1.0), 1.0)
        step.reward = step.reward.astype(np.float32, copy=False)
        self._observation = step.observation
        return step

    def pop_episodes(self) -> list[Episode]:
        """Return the episodes that ended since the last call; a lost life does not end an episode here."""
        episodes, self._episodes = self._episodes, []
        return episodes

    def with_raw_rewards(self, seed: int) -> Environments:
        """Return environments that step the same vector, for an evaluation. This object must be reset afterwards."""
        return Environments(self._vector, seed, actions=self.actions, description=self.description)

    @property
    def observation(self) -> Observation:
        """The current observations, `[envs, *observation_shape]`."""
        return self._observation

    def render(self) -> Any:
        """Return what the first env renders, by convention a picture `[height, width, 3]`, or None.

        Works for sync vectors whose envs were made with `render_mode="rgb_array"`.
        """
        frames = self._vector.render()
        return None if frames is None else frames[0]

    @property
    def render_fps(self) -> float:
        """The frames per second that the environment's metadata names; 15 if it names none."""
        fps = self._vector.metadata.get("render_fps")
        if isinstance(fps, (int, float, np.integer, np.floating)) and 0 < fps < math.inf:
            return float(fps)
        return 15.0

    def close(self) -> None:
        """Close the envs, and end their processes and threads; log a warning if that fails."""
        try:
            self._vector.close()
        except (Exception, SystemExit) as error:
            warn_once(f"the environments could not be closed: {error!r}")

    def state(self) -> dict[str, Any] | None:
        """Return the state to continue exactly from, as plain data, or None if the envs cannot do that.

        Some environments keep state where `snapshot` cannot find it, such as in a simulator behind a handle or in a
        random generator of their module. The first call therefore tests on a small copy whether a restored state
        reproduces the same steps.
        """
        if self._restores_exactly is False:
            return None
        state = self._save()
        if state is None:
            return None
        text_bytes, _ = snapshot.sizes(state)
        if text_bytes > MAX_TEXT_BYTES:
            log.warning(
                f"the environments' lists and text would take {text_bytes / 1e6:.0f} MB, a checkpoint holds up to "
                f"{MAX_TEXT_BYTES / 1e6:.0f} MB: checkpoints leave them out, and a resumed run begins new episodes"
            )
            self._restores_exactly = False
        elif self._restores_exactly is None:
            self._restores_exactly = self._continues_exactly is not None and self._continues_exactly()
        return state if self._restores_exactly else None

    def saved_bytes(self) -> int:
        """Return about how many bytes the state takes in a checkpoint; 0 if it cannot be saved."""
        text_bytes, array_bytes = snapshot.sizes(self._save())
        return text_bytes + array_bytes if text_bytes <= MAX_TEXT_BYTES else 0

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned, for environments that were made with the same config.

        Raises:
            ValueError: the state is of other environments, or of another number of them.
        """
        shape = state["observation"].shape
        if shape != self._shape:
            raise ValueError(f"the saved state has observations of shape {shape}, not {self._shape}")
        self.reset()  # some envs create attributes in their first reset, and `snapshot.load` only fills existing ones
        mask = state.get("action_mask")
        if (mask is None) != (self.action_mask is None):
            raise ValueError("the saved state and the environments do not both have action masks")
        self._load_vector(state["vector"])
        self._observation = state["observation"].copy()
        self.action_mask = mask
        self._done = state["done"].copy()
        self._returns = state["returns"].copy()
        self._lengths = state["lengths"].copy()
        # Version 0.1 saved no infos.
        self._episodes = [Episode(*(*episode, {})[:4]) for episode in state["finished"]]

    def _save(self) -> dict[str, Any] | None:
        """Return the state without testing whether it is complete, or None if it is not plain data."""
        assert self._pending is None, "state was called between send and receive"
        if isinstance(self._vector, (SyncVectorEnv, AsyncVectorEnv)):
            states = self._vector.call("save_state")
            vector: Any = None if None in states else snapshot.share_arrays(states)
        else:
            vector = snapshot.save(self._vector)
        if vector is None:
            return None
        masks = {} if self.action_mask is None else {"action_mask": self.action_mask.copy()}
        return {
            **masks,
            "vector": vector,
            "observation": self._observation.copy(),
            "done": self._done.copy(),
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
            "finished": [list(episode) for episode in self._episodes],
        }

    def _load_vector(self, state: Any) -> None:
        if isinstance(self._vector, (SyncVectorEnv, AsyncVectorEnv)):
            for error in filter(None, self._vector.call("load_state", state)):
                raise ValueError(error)
        else:
            snapshot.load(self._vector, state)

    def _clear(self) -> None:
        """Discard the running episodes, the finished ones and a step that `send` started."""
        self._pending = None
        self._done = self._none
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)
        self._episodes = []

    def _to_storage(self, observation: Any) -> Observation:
        """Convert observations to the stored dtype and shape; copy only if they differ."""
        stored: Observation = np.asarray(observation, self.observation_dtype)
        return stored if stored.shape == self._shape else stored.reshape(self._shape)

    def _step_next_step(
        self, observation: Observation, reward: NDArray[Any], terminated: Bools, truncated: Bools, infos: Any
    ) -> Step:
        """Build the Step, with rewards not clipped yet, in NEXT_STEP mode.

        An env whose episode ended in the last call was only reset in this one, so it has no transition.
        """
        fresh, done = self._done, terminated | truncated
        valid = ~fresh if np.count_nonzero(fresh) else self._all
        self._done = done
        self._lengths += valid
        self._count(reward, done, infos)
        return Step(reward, terminated, truncated, observation, observation, fresh, valid)

    def _step_same_step(
        self,
        observation: Observation,
        reward: NDArray[Any],
        terminated: Bools,
        truncated: Bools,
        infos: dict[str, Any],
    ) -> Step:
        """Build the Step, with rewards not clipped yet, in SAME_STEP mode: `infos` holds the final observations."""
        self._lengths += 1
        done = terminated | truncated
        if not np.count_nonzero(done):
            self._returns += reward
            return Step(reward, terminated, truncated, observation, observation, self._none, self._all)
        if "final_obs" not in infos:
            raise UserError(
                "the environment's own vector resets in the step that ends an episode, and its infos have no "
                "'final_obs': correct it, or use --vectorization sync or async"
            )
        next_observation = observation.copy()
        for env in np.flatnonzero(done):
            next_observation[env] = np.reshape(infos["final_obs"][env], self.observation_shape)
        last = infos.get("final_info", {})
        self._count(reward, done & ~np.asarray(last.get(LIFE_LOST, False)), last)
        return Step(reward, terminated, truncated, next_observation, observation, done, self._all)

    def _step_disabled(
        self, observation: Observation, reward: NDArray[Any], terminated: Bools, truncated: Bools, infos: Any
    ) -> Step:
        """Build the Step, with rewards not clipped yet, in DISABLED mode: reset the envs whose episode ended."""
        self._lengths += 1
        next_observation, done = observation, terminated | truncated
        self._count(reward, done, infos)
        if np.count_nonzero(done):
            next_observation = observation.copy()
            first, first_infos = self._vector.reset(options={"reset_mask": done.copy()})
            self._masks.after_manual_reset(infos, first_infos, done)
            mask = done.reshape(-1, *(1 for _ in self.observation_shape))
            observation = np.where(mask, self._to_storage(first), next_observation)
        return Step(reward, terminated, truncated, next_observation, observation, done, self._all)

    def _count(self, reward: NDArray[Any], ended: Bools, infos: Any) -> None:
        """Add unclipped rewards `[envs]` to the running returns, and record the episodes where `ended` `[envs]`.

        `infos`: of the vector, of the last step of those episodes.
        """
        self._returns += reward
        if np.count_nonzero(ended):
            for env in np.flatnonzero(ended).tolist():
                info = info_of(infos, env)
                self._episodes.append(Episode(float(self._returns[env]), int(self._lengths[env]), env, info))
            self._returns[ended] = 0.0
            self._lengths[ended] = 0


def stored_dtype(space: gym.spaces.Box) -> np.dtype[Any]:
    """Return the dtype in which observations are stored: bool, uint8 if the space reaches 255, else float32.

    Networks divide uint8 by 255, which would shrink smaller numbers, such as those of cards or tiles, to almost 0.
    """
    if space.dtype == np.bool_ or (space.dtype == np.uint8 and space.high.max(initial=0) == 255):
        return np.dtype(space.dtype)
    return np.dtype(np.float32)


def is_image(space: gym.spaces.Box) -> bool:
    """Return True for spaces with three dimensions, or with two of uint8; all others are treated as vectors."""
    return len(space.shape) == 3 or (len(space.shape) == 2 and space.dtype == np.uint8)


def _constant(num_envs: int, value: bool) -> Bools:
    """Return an array `[envs]` filled with `value`; it is read-only, because many steps share it."""
    array = np.full(num_envs, value)
    array.flags.writeable = False
    return array
