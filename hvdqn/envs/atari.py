"""Step Atari games in ALE's own vector environment; optionally, a lost life ends the episode but not the game.

ALE's `episodic_life` starts a new game after every lost life, so agents would only play first lives. Here `step`
reports a lost life as a termination and the same game continues, as in the usual EpisodicLifeEnv wrapper. A new game
starts only after game over.
"""

from __future__ import annotations

import os
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from hvdqn.envs.atari_variant import LIFE_LOST, OBSERVATIONS
from hvdqn.errors import UserError

# Arguments of ALE's vector environment that --env-kwargs must not set, and what the error message advises instead.
_RESERVED = {
    "stack_num": "use --frame-stack",
    "reward_clipping": "use --clip-rewards",
    "episodic_life": "use --episodic-life",
    "life_loss_info": "use --episodic-life",
    "num_envs": "use --envs-per-rank",
    "batch_size": "leave it out",
    "autoreset_mode": "leave it out",
    "num_threads": "leave it out",
    "game": "name the game in --env",
}


def is_atari(spec: EnvSpec) -> bool:
    """Return True if ALE's vector environment supports this id (`ALE/...-v5`)."""
    return spec.vector_entry_point == "ale_py.vector_env:AtariVectorEnv"


def game_settings(spec: EnvSpec, env_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of an Atari game: those registered with the id, no sticky actions, and `env_kwargs`.

    `env_kwargs` overrides the others. All are arguments of ALE's vector environment, except `mode`, `difficulty` and
    `obs_type="ram"`, which only `AtariVariant` handles.

    Raises:
        UserError: `env_kwargs` sets an argument that hvdqn sets itself, or an unknown `obs_type`.
    """
    env_kwargs = {
        name: value
        for name, value in env_kwargs.items()
        if value is not None or name not in ("mode", "difficulty", "obs_type")
    }
    for name, remedy in _RESERVED.items():
        if name in env_kwargs:
            raise UserError(f"--env-kwargs cannot set '{name}', which hvdqn sets itself; {remedy}")
    settings = {**spec.kwargs, "repeat_action_probability": 0.0, **env_kwargs}
    observes = settings.get("obs_type", "ram")
    if observes not in OBSERVATIONS:
        raise UserError(
            f"--env-kwargs: obs_type is {observes!r}; it must be one of {', '.join(OBSERVATIONS)}"
        )
    if observes != "ram":  # ALE's vector environment has another name for it
        settings["grayscale"] = settings.pop("obs_type") == "grayscale"
    return settings


class AtariVector(VectorEnv[NDArray[np.uint8], NDArray[np.int64], NDArray[Any]]):
    """Steps Atari games in ALE's threads, which also resize frames.

    By default: 84x84 gray frames, frameskip 4, up to 30 no-ops and FIRE after a reset.

    The autoreset mode is SAME_STEP. With `episodic_life`, a lost life is a termination. Its final observation is also
    the first one of the next episode, and `infos["final_info"][LIFE_LOST]` is True.

    Args:
        num_envs: number of games.
        threads: number of threads that step the games; 0: one per core, but no more than games.
        episodic_life: whether a lost life terminates the episode.
        settings: what `game_settings` returned.
    """

    def __init__(self, num_envs: int, threads: int, episodic_life: bool, settings: dict[str, Any]):
        from ale_py.vector_env import AtariVectorEnv  # an optional dependency

        self._ale = AtariVectorEnv(
            num_envs=num_envs,
            num_threads=min(num_envs, threads or len(os.sched_getaffinity(0))),
            stack_num=1,
            reward_clipping=False,
            episodic_life=False,
            life_loss_info=episodic_life,
            autoreset_mode=AutoresetMode.SAME_STEP,
            **settings,
        )
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_action_space = self._ale.single_action_space
        stack = self._ale.single_observation_space
        assert stack.shape is not None
        self.single_observation_space = gym.spaces.Box(0, 255, stack.shape[1:], np.uint8)
        self._frameskip = int(settings.get("frameskip", 4))
        self._lives = np.zeros(num_envs, np.int32)
        self._frames = np.zeros(num_envs, np.int32)

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Start a new game in every environment; without a seed, each continues its random generator."""
        observation, info = self._ale.reset(seed=np.array(seed) if isinstance(seed, list) else seed)
        self._lives, self._frames = info["lives"], info["episode_frame_number"]
        return observation[:, 0], {}

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Send the actions to ALE's threads and return at once."""
        self._ale.send(actions)

    def step_wait(self) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Wait for the step that `step_async` started and return its result."""
        stacked, reward, terminated, truncated, info = self._ale.recv()
        observation = stacked[:, 0]
        infos: dict[str, Any] = {}
        if np.count_nonzero(terminated) or np.count_nonzero(truncated):
            life_lost = terminated & self._same_game(info)
            final = info["final_obs"][:, 0]  # ALE sets it only for games that are over
            final[life_lost] = observation[life_lost]
            infos = {"final_obs": final, "final_info": {LIFE_LOST: life_lost}}
        self._lives, self._frames = info["lives"], info["episode_frame_number"]
        return observation, reward, terminated, truncated, infos

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Take one action in every game; return what Gymnasium's `VectorEnv.step` does."""
        self.step_async(actions)
        return self.step_wait()

    def close_extras(self, **kwargs: Any) -> None:
        """Delete ALE's vector environment, which ends its threads."""
        self.__dict__.pop("_ale", None)

    def _same_game(self, info: dict[str, Any]) -> NDArray[np.bool_]:
        """Return `[envs]`: True where a life was lost but the game continues.

        A new game has all its lives again, and its frame counter jumps.
        """
        advance = info["episode_frame_number"] - self._frames
        same: NDArray[np.bool_] = (
            (info["lives"] < self._lives) & (advance >= 1) & (advance <= self._frameskip)
        )
        return same


class AtariGame(gym.Env[NDArray[np.uint8], int]):
    """Plays one game of `AtariVector` as a single environment, for `--wrapper` and for sync and async vectors.

    `reset` after a lost life continues the same game. `render` returns the frame that the network sees.

    Args:
        episodic_life: whether a lost life terminates the episode.
        settings: what `game_settings` returned.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012 - Gymnasium's convention
    render_mode = "rgb_array"

    def __init__(self, episodic_life: bool, settings: dict[str, Any]):
        self._vector = AtariVector(1, 1, episodic_life, settings)
        self.action_space = self._vector.single_action_space
        self.observation_space = self._vector.single_observation_space
        self._next: NDArray[np.uint8] | None = None  # the first observation of the next episode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Start an episode: continue the game if the last one ended by a lost life, else start a new game."""
        super().reset(seed=seed)
        if seed is not None or self._next is None:
            self._next = self._vector.reset(seed=seed)[0][0]
        self._frame, self._next = self._next, None
        return self._frame, {}

    def render(self) -> NDArray[np.uint8]:
        """Return the newest frame as RGB, `[height, width, 3]`."""
        return self._frame if self._frame.ndim == 3 else self._frame[:, :, None].repeat(3, axis=2)

    def step(self, action: int) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Take one action for `frameskip` frames; the info says whether a life was lost, if the episode ended."""
        observation, reward, terminated, truncated, infos = self._vector.step(np.array([action]))
        self._frame = observation[0]
        if not infos:
            return observation[0], float(reward[0]), False, False, {}
        self._next = observation[0]
        life_lost = bool(infos["final_info"][LIFE_LOST][0])
        final = infos["final_obs"][0]
        return final, float(reward[0]), bool(terminated[0]), bool(truncated[0]), {LIFE_LOST: life_lost}
