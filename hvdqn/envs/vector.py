"""The step contract: what one call of `step` did to every env, whichever way the vector resets itself."""

from __future__ import annotations

import atexit
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from hvdqn.envs import snapshot
from hvdqn.envs.atari import LIFE_LOST, AtariVector
from hvdqn.step import Bools, Observation, Step


class Episode(NamedTuple):
    """An episode that has ended: its undiscounted, unclipped return, its env steps, and which env played it."""

    episode_return: float
    length: int
    env: int


class Environments:
    """The envs of one rank. Observations are single frames, kept as `stored_dtype` says.

    Args:
        vector: any Gymnasium vector environment with Box observations and Discrete actions.
        seed: of this rank and this use of environments; each env gets its own seed from it.
        description: what this is, in one line.
        clip_rewards: clip `Step.reward` to [-1, 1]. Finished episodes report raw returns.
        twin: makes a small copy of these environments from a seed; without one, `state` is None.
    """

    def __init__(
        self,
        vector: VectorEnv[Any, Any, Any],
        seed: int,
        *,
        description: str = "",
        clip_rewards: bool = False,
        twin: Callable[[int], Environments] | None = None,
    ):
        self.envs = vector.num_envs
        self.description = description
        box, discrete = vector.single_observation_space, vector.single_action_space
        assert isinstance(box, gym.spaces.Box)
        assert isinstance(discrete, gym.spaces.Discrete)
        self.actions = int(discrete.n)
        self.is_image = is_image(box)
        self.observation_shape = box.shape if self.is_image else (math.prod(box.shape),)
        self.observation_dtype = stored_dtype(box)
        self._vector = vector
        self._seed = seed
        self._clip_rewards = clip_rewards
        self._twin = twin
        self._exact: bool | None = None  # whether `state` may be given out; found out once
        self._first_action = int(discrete.start)
        self._receive = {
            AutoresetMode.NEXT_STEP: self._receive_next_step,
            AutoresetMode.SAME_STEP: self._receive_same_step,
            AutoresetMode.DISABLED: self._receive_disabled,
        }[AutoresetMode(vector.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))]
        self._begin = getattr(vector, "step_async", None)
        self._end = getattr(vector, "step_wait", None)
        self._seeded = False
        self._pending: NDArray[np.int64] | None = None
        self._finished: list[Episode] = []
        self._all = _constant(self.envs, True)
        self._none = _constant(self.envs, False)
        self._shape = (self.envs, *self.observation_shape)
        self._observation: Observation = np.zeros(self._shape, self.observation_dtype)
        self._clear()
        if isinstance(vector, AsyncVectorEnv):
            atexit.register(self._kill_workers)

    def reset(self, seed: int | None = None) -> Observation:
        """Begin an episode in every env; nothing is finished by it.

        The first call seeds the envs from the constructor's seed. Later calls let their random streams go on,
        unless they are given a `seed`.

        Returns:
            observation: [envs, *observation_shape].
        """
        entropy = self._seed if seed is None else seed
        seeds: list[int] | None = None
        if seed is not None or not self._seeded:
            seeds = [int(s) >> 1 for s in np.random.SeedSequence(entropy).generate_state(self.envs)]
        per_env = isinstance(self._vector, (SyncVectorEnv, AsyncVectorEnv, AtariVector))
        observation, _ = self._vector.reset(seed=seeds if per_env or seeds is None else seeds[0])  # type: ignore[arg-type]
        self._clear()
        self._seeded = True
        self._observation = self._stored(observation)
        return self._observation

    def step(self, action: NDArray[np.int64]) -> Step:
        """Take one action in every env. `action`: int64 [envs], each in [0, actions)."""
        self.send(action)
        return self.receive()

    def send(self, action: NDArray[np.int64]) -> None:
        """Begin a step. Where the vector runs beside this thread (ALE, async), it works from here on."""
        assert self._pending is None, "two actions sent, no step received"
        self._pending = action + self._first_action if self._first_action else action
        if self._begin is not None:
            self._begin(self._pending)

    def receive(self) -> Step:
        """Finish the step that `send` began."""
        assert self._pending is not None, "a step received before an action was sent"
        observation, reward, terminated, truncated, infos = (
            self._vector.step(self._pending) if self._end is None else self._end()
        )
        self._pending = None
        step = self._receive(self._stored(observation), reward, terminated, truncated, infos)
        self._observation = step.observation
        return step

    def finished(self) -> list[Episode]:
        """The episodes that ended since the last call. A game of several lives is one episode."""
        episodes, self._finished = self._finished, []
        return episodes

    @property
    def observation(self) -> Observation:
        """What to act on next: [envs, *observation_shape]."""
        return self._observation

    def picture(self) -> NDArray[np.uint8] | None:
        """What the first env looks like, `[H, W, 3]`; None where it does not draw itself.

        For sync vectors made with `render_mode` "rgb_array".
        """
        rendered = self._vector.render()
        if rendered is None or rendered[0] is None:
            return None
        picture = np.asarray(rendered[0])
        return picture if picture.dtype == np.uint8 else (255 * picture).astype(np.uint8)

    @property
    def frames_per_second(self) -> float:
        """At which the environment wants to be seen."""
        return float(self._vector.metadata.get("render_fps", 15))

    def close(self) -> None:
        """End the envs, and their processes and threads."""
        if isinstance(self._vector, AsyncVectorEnv):
            atexit.unregister(self._kill_workers)
        self._vector.close()

    def state(self) -> dict[str, Any] | None:
        """Everything needed to go on exactly here, as plain data (see `snapshot`), or None where that cannot be.

        It is given out only after a rehearsal on a small copy has shown that a saved state, put into other
        environments, leads to the very same steps: state hidden where no walk finds it (a simulator behind a
        handle, a module's own random stream) is found out that way.
        """
        state = self._save()
        if state is not None and self._exact is None:
            self._exact = self._twin is not None and _continues_exactly(self._twin)
        return state if self._exact else None

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, in environments made by the same config.

        Raises:
            ValueError: the state is of other environments, or of another number of them.
        """
        shape = state["observation"].shape
        if shape != self._shape:
            raise ValueError(f"the saved state has observations {shape}, not {self._shape}")
        self.reset()  # so that all that an env makes at its first reset is there to be filled
        self._load_vector(state["vector"])
        self._observation = state["observation"].copy()
        self._done = state["done"].copy()
        self._returns = state["returns"].copy()
        self._lengths = state["lengths"].copy()
        self._finished = [Episode(*episode) for episode in state["finished"]]

    def _save(self) -> dict[str, Any] | None:
        assert self._pending is None, "state asked for between send and receive"
        if isinstance(self._vector, (SyncVectorEnv, AsyncVectorEnv)):
            states = self._vector.call("save_state")
            vector: Any = None if None in states else list(states)
        else:
            vector = snapshot.save(self._vector)
        if vector is None:
            return None
        return {
            "vector": vector,
            "observation": self._observation.copy(),
            "done": self._done.copy(),
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
            "finished": [list(episode) for episode in self._finished],
        }

    def _load_vector(self, state: Any) -> None:
        if isinstance(self._vector, (SyncVectorEnv, AsyncVectorEnv)):
            for complaint in filter(None, self._vector.call("load_state", state)):
                raise ValueError(complaint)
        else:
            snapshot.load(self._vector, state)

    def _clear(self) -> None:
        self._pending = None
        self._done = self._none
        self._returns = np.zeros(self.envs)
        self._lengths = np.zeros(self.envs, np.int64)
        self._finished = []

    def _stored(self, observation: Any) -> Observation:
        """In the dtype and shape in which it is remembered; no copy where it has them."""
        stored: Observation = np.asarray(observation, self.observation_dtype)
        return stored if stored.shape == self._shape else stored.reshape(self._shape)

    def _learned(self, reward: NDArray[Any]) -> NDArray[np.float32]:
        if self._clip_rewards:
            reward = np.minimum(np.maximum(reward, -1.0), 1.0)
        return reward.astype(np.float32, copy=False)

    def _receive_next_step(
        self, observation: Observation, reward: NDArray[Any], terminated: Bools, truncated: Bools, _: Any
    ) -> Step:
        """An env that ended in the call before was only reset in this one; its action went nowhere."""
        fresh, done = self._done, terminated | truncated
        valid = ~fresh if np.count_nonzero(fresh) else self._all
        self._done = done
        self._lengths += valid
        self._count(reward, done)
        return Step(self._learned(reward), terminated, truncated, observation, observation, fresh, valid)

    def _receive_same_step(
        self,
        observation: Observation,
        reward: NDArray[Any],
        terminated: Bools,
        truncated: Bools,
        infos: dict[str, Any],
    ) -> Step:
        """An env that ended was reset in the same call; where it ended is in `infos`."""
        self._lengths += 1
        done = terminated | truncated
        if not np.count_nonzero(done):
            self._returns += reward
            return Step(
                self._learned(reward), terminated, truncated, observation, observation, self._none, self._all
            )
        next_observation = observation.copy()
        for env in np.flatnonzero(done):
            next_observation[env] = np.reshape(infos["final_obs"][env], self.observation_shape)
        life_lost = infos.get("final_info", {}).get(LIFE_LOST, False)
        self._count(reward, done & ~np.asarray(life_lost))
        return Step(
            self._learned(reward), terminated, truncated, next_observation, observation, done, self._all
        )

    def _receive_disabled(
        self, observation: Observation, reward: NDArray[Any], terminated: Bools, truncated: Bools, _: Any
    ) -> Step:
        """The vector resets nothing by itself: reset here whatever ended."""
        self._lengths += 1
        next_observation, done = observation, terminated | truncated
        self._count(reward, done)
        if np.count_nonzero(done):
            next_observation = observation.copy()
            begun, _ = self._vector.reset(options={"reset_mask": done.copy()})
            mask = done.reshape(-1, *(1 for _ in self.observation_shape))
            observation = np.where(mask, self._stored(begun), next_observation)
        return Step(
            self._learned(reward), terminated, truncated, next_observation, observation, done, self._all
        )

    def _count(self, reward: NDArray[Any], ended: Bools) -> None:
        """Add raw rewards to the running returns, and write down the episodes that ended."""
        self._returns += reward
        if np.count_nonzero(ended):
            for env in np.flatnonzero(ended).tolist():
                self._finished.append(Episode(float(self._returns[env]), int(self._lengths[env]), env))
            self._returns[ended] = 0.0
            self._lengths[ended] = 0

    def _kill_workers(self) -> None:
        """At an exit without `close`: the workers ignore the SIGTERM that Python would send and wait for."""
        for process in self._vector.processes:  # type: ignore[attr-defined]
            process.kill()


def stored_dtype(space: gym.spaces.Box) -> np.dtype[Any]:
    """Bytes up to 255 and booleans stay, all else becomes float32.

    Networks divide bytes by 255, which would make smaller numbers, such as those of cards or of tiles, next to nothing.
    """
    if space.dtype == np.bool_ or (space.dtype == np.uint8 and space.high.max(initial=0) == 255):
        return np.dtype(space.dtype)
    return np.dtype(np.float32)


def is_image(space: gym.spaces.Box) -> bool:
    """Three dimensions of any type, or two of bytes; everything else is a vector."""
    return len(space.shape) == 3 or (len(space.shape) == 2 and space.dtype == np.uint8)


def _constant(envs: int, value: bool) -> Bools:
    """Shared by many steps, so nobody may write to it."""
    array = np.full(envs, value)
    array.flags.writeable = False
    return array


_REHEARSED_STEPS = 100
# A rank that was told to stop has less than a minute for its checkpoint, and slow environments would take that long.
_REHEARSAL_SECONDS = 15.0


def _continues_exactly(twin: Callable[[int], Environments]) -> bool:
    """Whether a state saved after some steps makes other environments go on with the very same steps and episodes.

    Environments too slow to show it within `_REHEARSAL_SECONDS` count as not exact.
    """
    with closing(twin(1)) as played, closing(twin(2)) as fresh:
        deadline = time.monotonic() + _REHEARSAL_SECONDS
        rng = np.random.default_rng(0)
        actions = rng.integers(played.actions, size=(2 * _REHEARSED_STEPS, played.envs))
        played.reset()
        for action in actions[:_REHEARSED_STEPS]:
            played.step(action)
            if time.monotonic() > deadline:
                return False
        state = played._save()
        if state is None:
            return False
        try:
            fresh.load_state(state)
        except ValueError:  # some part of it was made of chance
            return False
        steps_alike = all(
            time.monotonic() <= deadline and _same(played.step(a), fresh.step(a))
            for a in actions[_REHEARSED_STEPS:]
        )
        # No episode may have ended in them, and what a reset draws from may lie elsewhere.
        return steps_alike and np.array_equal(played.reset(), fresh.reset(), equal_nan=True)


def _same(one: Step, other: Step) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name), equal_nan=True)
        for field in fields(Step)
    )
