"""Record one greedy episode as an .mp4 or .gif file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
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
from hvdqn.envs import Environments, describe_missing_library, find_spec, make_environments
from hvdqn.envs.atari import is_atari
from hvdqn.errors import UserError
from hvdqn.networks import QNetwork

FORMATS = (".mp4", ".gif")
# Smaller frames, such as the 10 x 10 pixels of MinAtar, are enlarged to at least this height.
MIN_HEIGHT = 240
MAX_FRAMES = 10_000


def check_video(path: Path) -> None:
    """Check that a video can be written to this path.

    Raises:
        UserError: the format is unknown, the file cannot be written, or imageio is not installed.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"--video '{path}' must end in {' or '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--video '{path}': the folder '{path.parent}' does not exist; create it first")
    is_new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise UserError(
            f"--video '{path}' cannot be written: {error.strerror}; choose another place"
        ) from None
    if is_new:
        path.unlink()
    try:
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        raise UserError("--video needs the video extra; pip install 'hvdqn[video]'") from None


def record(network: QNetwork, config: EnvironmentConfig, path: Path, seed: int, epsilon: float) -> int:
    """Play one episode, write it to `path`, and return its number of frames.

    Atari videos show what the network sees, one frame per env step. Other environments render themselves.

    Raises:
        UserError: the environment cannot be rendered.
    """
    import imageio.v2 as imageio

    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame renders without a display
    with closing(make_rendered(config, seed)) as envs:
        frames = map(_enlarge, play(network, envs, config, seed, epsilon))
        first = next(
            frames
        )  # before the file is opened: an environment that cannot be rendered leaves no file
        gif: dict[str, Any] = {"duration": 1000 / envs.render_fps, "loop": 0}
        # By default, imageio stretches frames to multiples of 16.
        mp4: dict[str, Any] = {"fps": envs.render_fps, "macro_block_size": 2}
        writer: Any = imageio.get_writer(path, **(gif if path.suffix == ".gif" else mp4))
        count = 0
        with closing(writer):
            for frame in itertools.chain([first], frames):
                writer.append_data(frame)
                count += 1
    return count


def make_rendered(config: EnvironmentConfig, seed: int) -> Environments:
    """Build one environment that `Environments.render` can render.

    Raises:
        UserError: the environment has no render mode "rgb_array".
    """
    kwargs = json.loads(config.env_kwargs or "{}")
    if not is_atari(find_spec(config.env)):
        kwargs["render_mode"] = "rgb_array"
    config = dataclasses.replace(config, vectorization="sync", env_kwargs=json.dumps(kwargs))
    try:
        return make_environments(config, 1, seed, training=False)
    except UserError as error:
        raise UserError(f"'{config.env}' cannot be rendered ({error}); leave --video out") from error


def play(
    network: QNetwork, envs: Environments, config: EnvironmentConfig, seed: int, epsilon: float
) -> Iterator[NDArray[np.uint8]]:
    """Play one episode and yield its frames, `[height, width, 3]` each."""
    network.eval()
    actor = Actor(envs, network, config.frame_stack, np.random.default_rng(seed), torch.device("cpu"))
    actor.start()
    for _ in range(MAX_FRAMES):
        try:
            frame = envs.render()
        except (gym.error.DependencyNotInstalled, ImportError) as error:
            raise UserError(f"'{config.env}' cannot be rendered: {describe_missing_library(error)}") from None
        except NotImplementedError as error:
            raise UserError(f"'{config.env}' cannot be rendered: {error}") from None
        if frame is None:
            raise UserError(f"'{config.env}' renders no frames in render_mode 'rgb_array'; leave --video out")
        yield frame
        step = actor.step(actor.choose(epsilon))
        if step.terminated[0] or step.truncated[0]:
            break


def _enlarge(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Enlarge a frame by a whole factor to at least `MIN_HEIGHT`, with even sides, as video codecs need them."""
    factor = max(1, math.ceil(MIN_HEIGHT / frame.shape[0]))
    large = frame.repeat(factor, axis=0).repeat(factor, axis=1)
    return large[: large.shape[0] // 2 * 2, : large.shape[1] // 2 * 2]
