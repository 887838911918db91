"""Play Atari games with settings that ALE's vector environment lacks: game mode, difficulty, RAM as observation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from hvdqn.errors import UserError

OBSERVATIONS = ("grayscale", "rgb", "ram")

# The key under which infos say that a life was lost. The prefix avoids a clash with other environments' `life_lost`.
LIFE_LOST = "hvdqn.life_lost"


def is_variant(settings: Mapping[str, Any]) -> bool:
    """Return True if a game with these arguments needs `AtariVariant`, because ALE's vector cannot play it."""
    return "mode" in settings or "difficulty" in settings or settings.get("obs_type") == "ram"


class AtariVariant(gym.Env[NDArray[np.uint8], int]):
    """Plays one Atari game in ALE's single environment, with the preprocessing of ALE's vector environment.

    Frames are the maximum of the last two screens, scaled to 84x84 by the mean of the pixels that they cover. `reset`
    starts with up to 30 no-ops and FIRE, or continues the same game after a lost life.

    Args:
        episodic_life: whether a lost life terminates the episode.
        settings: arguments of ALE's vector environment, and `mode`, `difficulty` and `obs_type` of its single one.

    Raises:
        UserError: the game has no such mode or difficulty.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012 - Gymnasium's convention
    render_mode = "rgb_array"

    def __init__(self, episodic_life: bool, settings: Mapping[str, Any]):
        arguments = dict(settings)
        shape = arguments.pop("img_height", 84), arguments.pop("img_width", 84)
        self._frameskip = int(arguments.pop("frameskip", 4))
        self._maxpool = bool(arguments.pop("maxpool", True))
        self._noop_max = int(arguments.pop("noop_max", 30))
        self._fires = bool(arguments.pop("use_fire_reset", True))
        grayscale = arguments.pop("grayscale", True)
        self._observes = arguments.pop("obs_type", "grayscale" if grayscale else "rgb")
        arguments.pop("thread_affinity_offset", None)
        arguments.setdefault("max_num_frames_per_episode", 108_000)
        self._episodic_life = episodic_life
        self._game = _open_game(self._observes, arguments)
        self.action_space = self._game.action_space
        space = self._game.observation_space
        if self._observes != "ram":
            space = gym.spaces.Box(0, 255, (*shape, *space.shape[2:]), np.uint8)
            height, width = self._game.ale.getScreenDims()
            self._rows, self._columns = Averages(shape[0], height), Averages(shape[1], width)
        self.observation_space = space
        self._lives = 0
        self._next: NDArray[np.uint8] | None = None  # the first observation of the next episode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Start an episode: continue the game if the last one ended by a lost life, else start a new game."""
        super().reset(seed=seed)
        if seed is None and self._next is not None:
            observation, self._next = self._next, None
            return observation, {}
        screen = self._game.reset(seed=seed)[0]
        meanings = self._game.get_action_meanings()
        actions = [0] * int(self.np_random.integers(0, self._noop_max + 1))
        if self._fires and "FIRE" in meanings:
            actions.append(meanings.index("FIRE"))
        for action in actions:
            screen, _, terminated, truncated, _ = self._game.step(action)
            if terminated or truncated:
                screen = self._game.reset()[0]
        self._next = None
        self._lives = self._game.ale.lives()
        return self._observe([screen]), {}

    def step(self, action: int) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Take one action for `frameskip` frames; with `episodic_life`, a lost life terminates the episode."""
        screens: list[NDArray[np.uint8]] = []
        reward, terminated, truncated = 0.0, False, False
        for _ in range(self._frameskip):
            screen, gained, terminated, truncated, _ = self._game.step(action)
            screens = [*screens[-1:], screen]
            reward += float(gained)
            if terminated or truncated:
                break
        observation = self._observe(screens)
        lives_before, self._lives = self._lives, self._game.ale.lives()
        life_lost = self._episodic_life and self._lives < lives_before and not (terminated or truncated)
        if life_lost:
            self._next = observation
        return observation, reward, terminated or life_lost, truncated, {LIFE_LOST: life_lost}

    def render(self) -> NDArray[np.uint8]:
        """Return the full-size screen in RGB, `[height, width, 3]`."""
        screen: NDArray[np.uint8] = self._game.ale.getScreenRGB()
        return screen

    def _observe(self, screens: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return the observation: the maximum of the last two screens, scaled, or the RAM.

        Args:
            screens: what ALE returned after the last two frames of the step, or after the only one.
        """
        if self._observes == "ram":
            return screens[-1]
        screen = np.maximum.reduce(screens) if self._maxpool else screens[-1]
        lower = self._rows.of(screen)
        scaled = self._columns.of(lower.swapaxes(0, 1)).swapaxes(0, 1)
        return np.ascontiguousarray(np.rint(scaled), dtype=np.uint8)


class Averages:
    """Scales the first axis of an image: every new pixel is the mean of the old pixels that it covers.

    It adds up weighted pixels in a loop, because a matrix product would wake the threads of BLAS for each frame.

    Args:
        size: number of new pixels.
        pixels: number of old pixels.
    """

    def __init__(self, size: int, pixels: int) -> None:
        edges = np.arange(size + 1) * pixels / size
        most = math.ceil(pixels / size) + 1  # a new pixel covers at most so many old ones
        index = np.floor(edges[:-1]).astype(np.int64) + np.arange(most)[:, None]
        covered = np.minimum(edges[1:], index + 1) - np.maximum(edges[:-1], index)
        self._index = np.minimum(index, pixels - 1)
        self._weights = (np.clip(covered, 0, None) * size / pixels).astype(np.float32)

    def of(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Scale an image `[pixels, ...]` to `[size, ...]`."""
        scaled: NDArray[np.float32] = np.zeros((self._index.shape[1], *image.shape[1:]), np.float32)
        for index, weights in zip(self._index, self._weights, strict=True):
            scaled += weights.reshape(-1, *[1] * (image.ndim - 1)) * image[index]
        return scaled


def _open_game(observes: Any, arguments: dict[str, Any]) -> Any:
    """Open a game as ALE's single environment, which advances one frame per step.

    Args:
        observes: one of `OBSERVATIONS`.
        arguments: other arguments of ALE's `AtariEnv`.

    Raises:
        UserError: the game has no such mode or difficulty.
    """
    from ale_py.env import AtariEnv  # an optional dependency

    try:
        return AtariEnv(obs_type=observes, frameskip=1, **arguments)
    except RuntimeError:
        ale = AtariEnv(arguments["game"]).ale
        for name, known in (
            ("mode", ale.getAvailableModes()),
            ("difficulty", ale.getAvailableDifficulties()),
        ):
            if arguments.get(name, known[0]) not in known:
                raise UserError(
                    f"--env-kwargs: {arguments['game']} has no {name} {arguments[name]}; there are "
                    f"{', '.join(map(str, known))}"
                ) from None
        raise
