"""One greedy episode as an .mp4 or .gif."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from hvdqn.acting import Actor
from hvdqn.config import EnvironmentConfig
from hvdqn.envs import Environments, find_spec, make_environments
from hvdqn.envs.atari import is_atari
from hvdqn.errors import UserError
from hvdqn.networks import QNetwork

FORMATS = (".mp4", ".gif")
# A small picture, such as MinAtar's 10 x 10, is enlarged until its height has this many pixels.
LEAST_HEIGHT = 240
LONGEST_FRAMES = 10_000


def check_video(path: Path) -> None:
    """Whether a video can be written there.

    Raises:
        UserError: it cannot; its line names the remedy.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"--video '{path}' must end in {' or '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--video '{path}': there is no folder '{path.parent}'; make it first")
    new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise UserError(
            f"--video '{path}' cannot be written: {error.strerror}; choose another place"
        ) from None
    if new:
        path.unlink()
    try:
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        raise UserError("--video needs the video extra; pip install 'hvdqn[video]'") from None


def record(network: QNetwork, config: EnvironmentConfig, path: Path, seed: int, epsilon: float) -> int:
    """Play one episode in this process and write it; return its frames.

    Atari is shown as the network sees it, one frame an env step; other environments draw themselves.

    Raises:
        UserError: the environment cannot be drawn.
    """
    import imageio.v2 as imageio

    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without a display
    with closing(make_drawn(config, seed)) as envs:
        pictures = map(_enlarged, play(network, envs, config, seed, epsilon))
        first = next(pictures)  # what cannot be drawn leaves no file
        gif: dict[str, Any] = {"duration": 1000 / envs.frames_per_second, "loop": 0}
        # Else pictures are stretched to multiples of 16.
        mp4: dict[str, Any] = {"fps": envs.frames_per_second, "macro_block_size": 2}
        film: Any = imageio.get_writer(path, **(gif if path.suffix == ".gif" else mp4))
        written = 0
        with closing(film):
            for picture in itertools.chain([first], pictures):
                film.append_data(picture)
                written += 1
    return written


def make_drawn(config: EnvironmentConfig, seed: int) -> Environments:
    """One such environment, in a vector that can draw it.

    Raises:
        UserError: it cannot be made to draw itself.
    """
    kwargs = json.loads(config.env_kwargs or "{}")
    if not is_atari(find_spec(config.env)):
        kwargs["render_mode"] = "rgb_array"
    config = dataclasses.replace(config, vectorization="sync", env_kwargs=json.dumps(kwargs))
    try:
        return make_environments(config, 1, seed, training=False)
    except UserError as error:
        raise UserError(f"'{config.env}' cannot be drawn ({error}); leave --video out") from error


def play(
    network: QNetwork, envs: Environments, config: EnvironmentConfig, seed: int, epsilon: float
) -> Iterator[NDArray[np.uint8]]:
    """Pictures of one episode, `[H, W, 3]` each."""
    network.eval()
    actor = Actor(envs, network, config.frame_stack, np.random.default_rng(seed), torch.device("cpu"))
    actor.start()
    for _ in range(LONGEST_FRAMES):
        try:
            picture = envs.picture()
        except (gym.error.DependencyNotInstalled, NotImplementedError) as error:
            raise UserError(f"'{config.env}' cannot be drawn: {error}") from None
        if picture is None:
            raise UserError(f"'{config.env}' draws no pictures (render_mode 'rgb_array'); leave --video out")
        yield picture
        step = actor.step(actor.choose(epsilon))
        if step.terminated[0] or step.truncated[0]:
            break


def _enlarged(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    times = max(1, -(-LEAST_HEIGHT // frame.shape[0]))
    large = frame.repeat(times, axis=0).repeat(times, axis=1)
    # Video codecs want even sides.
    return large[: large.shape[0] // 2 * 2, : large.shape[1] // 2 * 2]
