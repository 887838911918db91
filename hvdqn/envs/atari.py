"""The Atari games through ALE's own vector environment, with lives told apart from games.

ALE's `episodic_life` starts a new game at every lost life, so that only first lives would ever be played. Here a
lost life is reported as a termination and the same game goes on, as in the wrapper that the DQN papers' successors
share; a new game starts only when the old one is over.
"""

from __future__ import annotations

import os
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from hvdqn.errors import UserError

# Settings of ALE's vector environment that have a flag of their own, or that would break the step contract.
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

# Among infos. Not a plain word: other environments have such of their own, which mean something else.
LIFE_LOST = "hvdqn.life_lost"


def is_atari(spec: EnvSpec) -> bool:
    """Whether ALE's vector environment plays this id (`ALE/...-v5`)."""
    return spec.vector_entry_point == "ale_py.vector_env:AtariVectorEnv"


def game_settings(spec: EnvSpec, env_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of ALE's vector environment: the id's own, no sticky actions, then the user's.

    Raises:
        UserError: the user set what hvdqn itself must set.
    """
    for name, remedy in _RESERVED.items():
        if name in env_kwargs:
            raise UserError(f"--env-kwargs sets '{name}', which is not the environment's to choose; {remedy}")
    return {**spec.kwargs, "repeat_action_probability": 0.0, **env_kwargs}


class AtariVector(VectorEnv[NDArray[np.uint8], NDArray[np.int64], NDArray[Any]]):
    """Several games, stepped by ALE's threads: 84x84 grey frames, frameskip 4, up to 30 no-ops, fire at the start.

    Autoreset is SAME_STEP: no call is spent on a reset. A lost life (where `episodic_life`) is a termination whose
    final observation is also the next one, marked in `infos["final_info"][LIFE_LOST]`.

    Args:
        games: how many are played.
        threads: how many threads step them; 0: one a core, at most one a game.
        episodic_life: a lost life terminates.
        settings: from `game_settings`.
    """

    def __init__(self, games: int, threads: int, episodic_life: bool, settings: dict[str, Any]):
        from ale_py.vector_env import AtariVectorEnv  # an extra: not every user plays Atari

        self._ale = AtariVectorEnv(
            num_envs=games,
            num_threads=min(games, threads or len(os.sched_getaffinity(0))),
            stack_num=1,
            reward_clipping=False,
            episodic_life=False,
            life_loss_info=episodic_life,
            autoreset_mode=AutoresetMode.SAME_STEP,
            **settings,
        )
        self.num_envs = games
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_action_space = self._ale.single_action_space
        stack = self._ale.single_observation_space
        assert stack.shape is not None
        self.single_observation_space = gym.spaces.Box(0, 255, stack.shape[1:], np.uint8)
        self._frameskip = int(settings.get("frameskip", 4))
        self._lives = np.zeros(games, np.int32)
        self._frames = np.zeros(games, np.int32)

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Start a new game in every env; without seeds each env's random stream goes on."""
        observation, info = self._ale.reset(seed=np.array(seed) if isinstance(seed, list) else seed)
        self._lives, self._frames = info["lives"], info["episode_frame_number"]
        return observation[:, 0], {}

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Hand the actions to ALE's threads and return."""
        self._ale.send(actions)

    def step_wait(self) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Wait for what `step_async` began."""
        stacked, reward, terminated, truncated, info = self._ale.recv()
        observation = stacked[:, 0]
        infos: dict[str, Any] = {}
        if np.count_nonzero(terminated) or np.count_nonzero(truncated):
            life_lost = terminated & self._same_game(info)
            final = info["final_obs"][:, 0]  # ALE fills it for games that are over, and for no others
            final[life_lost] = observation[life_lost]
            infos = {"final_obs": final, "final_info": {LIFE_LOST: life_lost}}
        self._lives, self._frames = info["lives"], info["episode_frame_number"]
        return observation, reward, terminated, truncated, infos

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """`step_async` and `step_wait` in one."""
        self.step_async(actions)
        return self.step_wait()

    def close_extras(self, **kwargs: Any) -> None:
        """End ALE's threads, if they were ever begun."""
        self.__dict__.pop("_ale", None)

    def _same_game(self, info: dict[str, Any]) -> NDArray[np.bool_]:
        """Where a life went but the game goes on: after a reset the lives are back and the frames jump."""
        advance = info["episode_frame_number"] - self._frames
        same: NDArray[np.bool_] = (
            (info["lives"] < self._lives) & (advance >= 1) & (advance <= self._frameskip)
        )
        return same


class AtariGame(gym.Env[NDArray[np.uint8], int]):
    """One such game as a single environment, for `--wrapper` and for sync and async vectors: the same pixels.

    `reset` after a lost life goes on with the same game. It is rendered as the network sees it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012 - as Gymnasium has it
    render_mode = "rgb_array"

    def __init__(self, episodic_life: bool, settings: dict[str, Any]):
        self._vector = AtariVector(1, 1, episodic_life, settings)
        self.action_space = self._vector.single_action_space
        self.observation_space = self._vector.single_observation_space
        self._begun: NDArray[np.uint8] | None = None  # first observation after an episode's end

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        if seed is not None or self._begun is None:
            self._begun = self._vector.reset(seed=seed)[0][0]
        self._shown, self._begun = self._begun, None
        return self._shown, {}

    def render(self) -> NDArray[np.uint8]:
        """The newest frame; where it is grey, in all three colours."""
        return self._shown if self._shown.ndim == 3 else self._shown[:, :, None].repeat(3, axis=2)

    def step(self, action: int) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Take one action."""
        observation, reward, terminated, truncated, infos = self._vector.step(np.array([action]))
        self._shown = observation[0]
        if not infos:
            return observation[0], float(reward[0]), False, False, {}
        self._begun = observation[0]
        life_lost = bool(infos["final_info"][LIFE_LOST][0])
        final = infos["final_obs"][0]
        return final, float(reward[0]), bool(terminated[0]), bool(truncated[0]), {LIFE_LOST: life_lost}
