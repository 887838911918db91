"""Record one greedy episode as an .mp4 or .gif file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
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
MAX_WIDTH = 4096
MAX_FRAMES = 10_000
SLOWEST_FPS = 0.1
# Players do not show the frames of a GIF faster than this.
FASTEST_FPS = {".gif": 50.0, ".mp4": 240.0}


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

    Atari videos show what the network sees, one frame per env step. Other environments render themselves. If that
    fails, a file that was there before stays.

    Raises:
        UserError: the environment cannot be rendered, or the video cannot be written.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame renders without a display
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    with closing(make_rendered(config, seed)) as envs:
        try:
            count = _write(unfinished, play(network, envs, config, seed, epsilon), envs.render_fps)
            with _explain_failures():
                unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return count


def _write(path: Path, frames: Iterator[NDArray[np.uint8]], fps: float) -> int:
    """Write frames of equal size to a file; return their number."""
    import imageio.v2 as imageio

    fps = min(max(fps, SLOWEST_FPS), FASTEST_FPS[path.suffix])
    gif: dict[str, Any] = {"duration": 1000 / fps, "loop": 0}
    # By default, imageio stretches frames to multiples of 16.
    mp4: dict[str, Any] = {"fps": fps, "macro_block_size": 2}
    first = next(frames)  # an environment that cannot be rendered at all starts no writer
    with _explain_failures():
        writer: Any = imageio.get_writer(path, **(gif if path.suffix == ".gif" else mp4))
    count = 0
    try:
        for frame in itertools.chain([first], frames):
            with _explain_failures():
                writer.append_data(_enlarge(frame))
            count += 1
    finally:
        with _explain_failures():
            writer.close()
    return count


@contextmanager
def _explain_failures() -> Iterator[None]:
    """Turn an error in writing, such as that of a full disk, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"the video cannot be written: {_line(error)}; choose another place") from error


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
    """Play one episode and yield its frames, `[height, width, 3]` each, all of one size.

    Raises:
        UserError: the environment does not render such frames.
    """
    network.eval()
    actor = Actor(envs, network, config.frame_stack, np.random.default_rng(seed), torch.device("cpu"))
    actor.start()
    shape: tuple[int, ...] = ()
    for _ in range(MAX_FRAMES):
        frame = _render(envs, config.env)
        shape = shape or frame.shape
        if frame.shape != shape:
            raise UserError(
                f"'{config.env}' renders frames of different sizes, {shape[1]} x {shape[0]} and {frame.shape[1]} x "
                f"{frame.shape[0]}, and a video has one; leave --video out"
            )
        yield frame
        step = actor.step(actor.choose(epsilon))
        if step.terminated[0] or step.truncated[0]:
            break


def _render(envs: Environments, env: str) -> NDArray[np.uint8]:
    """Render the environment (`env` is its id) as RGB bytes, `[height, width, 3]`."""
    try:
        rendered = envs.render()
        array = np.asarray(rendered)  # a list of frames of different sizes raises ValueError
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        raise UserError(f"'{env}' cannot be rendered: {describe_missing_library(error)}") from error
    except (Exception, SystemExit) as error:  # whatever a drawing library raises
        raise UserError(
            f"'{env}' cannot be rendered: {type(error).__name__}: {_line(error)}; leave --video out"
        ) from error
    if rendered is None:
        raise UserError(f"'{env}' renders no frames in render_mode 'rgb_array'; leave --video out")
    picture = array[:, :, None] if array.ndim == 2 else array
    if (
        picture.ndim != 3
        or picture.shape[2] not in (1, 3, 4)
        or not picture.size
        or picture.dtype.kind not in "buif"
    ):
        raise UserError(
            f"'{env}' renders a {type(rendered).__name__} ({array.dtype}, shape {list(array.shape)}) in render_mode "
            "'rgb_array' where a picture [height, width, 3] is expected; leave --video out"
        )
    return np.broadcast_to(_as_bytes(picture[:, :, :3]), (*picture.shape[:2], 3))


def _as_bytes(picture: NDArray[Any]) -> NDArray[np.uint8]:
    """Return colors as bytes. Floats and booleans up to 1 are shares of full brightness; integers are bytes already."""
    if picture.dtype == np.uint8:
        return picture
    if picture.dtype.kind in "bf":
        picture = np.nan_to_num(picture.astype(np.float64), posinf=255.0, neginf=0.0)
        if picture.max() <= 1.0:
            picture *= 255.0
    return picture.clip(0, 255).astype(np.uint8)


def _enlarge(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Enlarge a frame by a whole factor to at least `MIN_HEIGHT`, with even sides, as video codecs need them.

    Wide frames are enlarged less, so that they do not fill the memory.
    """
    height, width = frame.shape[:2]
    factor = max(1, min(math.ceil(MIN_HEIGHT / height), MAX_WIDTH // width))
    large = frame.repeat(factor, axis=0).repeat(factor, axis=1)
    return np.pad(large, ((0, large.shape[0] % 2), (0, large.shape[1] % 2), (0, 0)), mode="edge")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
