"""Everything that `render()` may return becomes a video or one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
from gymnasium import spaces

from hvdqn import video
from hvdqn.config import Config
from hvdqn.envs import make_environments
from hvdqn.errors import UserError
from hvdqn.parts import network_for

GRAY = np.full((20, 30), 100, np.uint8)
COLOR = np.stack([GRAY, GRAY // 2, GRAY * 2], axis=2)


class Drawn(gym.Env[np.ndarray, int]):
    """An episode of 4 steps that renders what a function of the step returns."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - Gymnasium's convention
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)
    draw: Callable[[int], Any]
    fps: Any = 10

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": type(self).fps}
        if type(self).fps == "missing":
            del self.metadata["render_fps"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: int):
        self.steps += 1
        return np.zeros(2, np.float32), 1.0, self.steps == 4, False, {}

    def render(self) -> Any:
        return type(self).draw(self.steps)


gym.register("Drawn-v0", Drawn)


def record(path: Path, draw: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch, fps: Any = 10) -> int:
    monkeypatch.setattr(Drawn, "draw", staticmethod(draw), raising=False)
    monkeypatch.setattr(Drawn, "fps", fps)
    config = Config().replace(env="Drawn-v0", hidden=(4,))
    envs = make_environments(config.environment, 1, 0, training=False)
    network = network_for(config, envs)
    envs.close()
    return video.record(network, config.environment, path, seed=1, epsilon=0.0)


def raises(error: BaseException) -> Callable[[int], Any]:
    def draw(step: int) -> Any:
        raise error

    return draw


PICTURES: dict[str, tuple[Callable[[int], Any], tuple[int, int, int]]] = {
    "color": (lambda step: COLOR, (100, 50, 200)),
    "one channel": (lambda step: GRAY[:, :, None], (100, 100, 100)),
    "no channel": (lambda step: GRAY, (100, 100, 100)),
    "transparent": (lambda step: np.concatenate([COLOR, COLOR[:, :, :1]], axis=2), (100, 50, 200)),
    "integers": (lambda step: COLOR.astype(np.int64), (100, 50, 200)),
    "large integers": (lambda step: COLOR.astype(np.int32) * 10 - 800, (200, 0, 255)),
    "floats up to 1": (lambda step: COLOR / 255, (100, 50, 200)),
    "floats up to 255": (lambda step: COLOR.astype(np.float32), (100, 50, 200)),
    "floats that are not finite": (lambda step: np.where(COLOR == 50, np.nan, COLOR), (100, 0, 200)),
    "booleans": (lambda step: COLOR == 200, (0, 0, 255)),
    "nested lists": (lambda step: COLOR.tolist(), (100, 50, 200)),
    "not contiguous": (lambda step: np.asfortranarray(COLOR)[::-1], (100, 50, 200)),
    "one row": (lambda step: COLOR[:1].repeat(200, axis=1), (100, 50, 200)),
    "one column": (lambda step: COLOR.repeat(15, axis=0)[:, :1], (100, 50, 200)),
}


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_every_kind_are_recorded(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, color = PICTURES[name]
    assert record(tmp_path / f"film{suffix}", draw, monkeypatch) == 4
    film = imageio.imread(tmp_path / f"film{suffix}")
    assert film.shape[1] % 2 == film.shape[2] % 2 == 0
    seen = film.reshape(-1, film.shape[-1])[:, :3].mean(axis=0)
    assert seen == pytest.approx(color, abs=4 if suffix == ".gif" else 8)
    assert [path.name for path in tmp_path.iterdir()] == [f"film{suffix}"]


REFUSED: dict[str, tuple[Callable[[int], Any], str]] = {
    "text": (lambda step: "a board", "renders a str"),
    "nothing": (lambda step: None, "renders no frames"),
    "nothing later": (lambda step: None if step else COLOR, "renders no frames"),
    "a list of frames": (lambda step: [COLOR, COLOR], r"renders a list \(uint8, shape \[2, 20, 30, 3\]\)"),
    "a list of unequal frames": (lambda step: [COLOR, COLOR[1:]], "cannot be rendered: ValueError"),
    "an empty list": (lambda step: [], "renders a list"),
    "growing frames": (lambda step: COLOR.repeat(step + 1, axis=1), "different sizes, 30 x 20 and 60 x 20"),
    "channels first": (lambda step: COLOR.transpose(2, 0, 1), "picture .height, width, 3. is expected"),
    "two channels": (lambda step: COLOR[:, :, :2], "picture .height, width, 3. is expected"),
    "no pixels": (lambda step: COLOR[:0], "picture .height, width, 3. is expected"),
    "a dictionary": (lambda step: {"frame": COLOR}, "renders a dict"),
    "complex numbers": (lambda step: COLOR * 1j, "complex128"),
    "a number": (lambda step: 3, "renders a int"),
    "an error": (lambda step: 1 // 0, "cannot be rendered: ZeroDivisionError: integer"),
    "an error of two lines": (
        raises(RuntimeError("no\ndisplay")),
        "cannot be rendered: RuntimeError: no display",
    ),
    "not implemented": (raises(NotImplementedError()), "cannot be rendered: NotImplementedError"),
    "an exit": (raises(SystemExit(3)), "cannot be rendered: SystemExit: 3"),
}


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_in_one_line_and_leaves_an_old_film(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, reason = REFUSED[name]
    path = tmp_path / f"film{suffix}"
    path.write_text("an old film")
    with pytest.raises(UserError, match=reason) as raised:
        record(path, draw, monkeypatch)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith("leave --video out")
    assert path.read_text() == "an old film"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
@pytest.mark.parametrize(
    "fps", ["missing", 0, None, -5, float("nan"), float("inf"), "fast", 1e9, 1e-9, np.float32(30)], ids=str
)
def test_every_frame_rate_gives_a_video(
    fps: Any, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert record(tmp_path / f"film{suffix}", lambda step: COLOR + np.uint8(step), monkeypatch, fps) == 4
    assert len(imageio.imread(tmp_path / f"film{suffix}")) >= 4


def test_a_writer_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import imageio.v2

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left\non device")

    monkeypatch.setattr(imageio.v2, "get_writer", full)
    with pytest.raises(UserError, match="the video cannot be written: No space left on device; choose"):
        record(tmp_path / "film.gif", lambda step: COLOR, monkeypatch)
    assert list(tmp_path.iterdir()) == []
