"""Videos of `hvdqn eval --video`."""

from __future__ import annotations

import itertools
import sys

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from hvdqn import __main__, train, video
from hvdqn.config import Config
from hvdqn.envs import make_environments
from hvdqn.errors import UserError
from hvdqn.parts import network_for

GAMES = [("CartPole-v1", 4, ".gif"), ("MinAtar/Breakout-v1", 6, ".gif"), ("ALE/Pong-v5", 6, ".mp4")]


def untrained(env: str):
    config = Config().replace(env=env, hidden=(4,), frame_stack=4 if env.startswith("ALE") else 1)
    envs = make_environments(config.environment, 1, 0, training=False)
    torch.manual_seed(0)
    network = network_for(config, envs)
    envs.close()
    return network, config.environment


@pytest.mark.parametrize(("env", "moving", "suffix"), GAMES)
def test_record_writes_the_frames_of_an_episode(env, moving, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_FRAMES", 40)
    network, config = untrained(env)
    path = tmp_path / f"film{suffix}"
    frames = video.record(network, config, path, seed=1, epsilon=0.3)
    film = imageio.imread(path)
    assert frames >= moving
    assert moving <= film.shape[0] <= frames  # a GIF merges equal frames
    assert film.shape[1] >= video.MIN_HEIGHT
    assert film.shape[3] == 3
    if suffix == ".mp4":
        assert film.shape[1:3] == (252, 252), "3 times 84, not stretched to a multiple of 16"
    different = [not np.array_equal(one, other) for one, other in itertools.pairwise(film)]
    assert sum(different) >= moving - 1


def test_eval_records_a_video(tmp_path, capsys):
    smoke = ["--preset", "smoke", "--total-env-steps", "208", "--eval-episodes", "1"]
    assert train.main([*smoke, "--run-dir", str(tmp_path / "run")]) == 0
    path = tmp_path / "film.gif"
    assert __main__.main(["eval", str(tmp_path / "run"), "--episodes", "1", "--video", str(path)]) == 0
    assert f"video of one episode: {path}" in capsys.readouterr().out
    assert len(imageio.imread(path)) >= 8  # the pole stands for at least 8 steps


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("film.avi", [".mp4", ".gif"]),
        ("nowhere/film.gif", ["nowhere", "does not exist"]),
        ("folder.mp4", ["folder.mp4' cannot be written", "Is a directory", "another place"]),
    ],
)
def test_a_video_that_cannot_be_written_is_refused(path, words, tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError) as raised:
        video.check_video(tmp_path / path)
    for word in words:
        assert word in str(raised.value)


def test_check_video_leaves_existing_files_and_creates_none(tmp_path):
    (tmp_path / "old.gif").write_text("a film")
    for name in ("old.gif", "new.gif"):
        video.check_video(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old.gif"]
    assert (tmp_path / "old.gif").read_text() == "a film"


def test_record_writes_atari_in_color(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_FRAMES", 10)
    config = Config().replace(env="ALE/Pong-v5", hidden=(4,), env_kwargs='{"grayscale": false}')
    envs = make_environments(config.environment, 1, 0, training=False)
    network = network_for(config, envs)
    envs.close()
    assert video.record(network, config.environment, tmp_path / "film.gif", seed=1, epsilon=1.0) == 10
    assert imageio.imread(tmp_path / "film.gif").shape[3] == 3


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ("Observes", "cannot be rendered .*render_mode.*leave --video out"),
        ("RendersNothing", "renders no frames"),
    ],
)
def test_an_environment_without_rendering_is_refused_in_one_line(env, reason, tmp_path):
    network, config = untrained(f"tests.unit.scripted_envs:{env}Vector-v0")
    with pytest.raises(UserError, match=reason) as raised:
        video.record(network, config, tmp_path / "film.gif", seed=1, epsilon=1.0)
    assert "\n" not in str(raised.value)


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match=r"pip install 'hvdqn\[video\]'"):
        video.check_video(tmp_path / "film.gif")
