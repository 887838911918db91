"""Every example and every command of docs/api.md runs, in order, with fewer env steps."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

import hvdqn
from hvdqn import __main__, train
from tests.launchers import REPOSITORY
from tests.readme import command
from tests.unit.library_envs import make_minari_dataset

BLOCKS = re.findall(
    r"^```python\n(.*?)^```$", (REPOSITORY / "docs" / "api.md").read_text("utf-8"), re.M | re.S
)
SHORT = "total_env_steps=600, learning_starts=200, replay_capacity=2000, eval_episodes=2"
SHORT_FLAGS = "--total-env-steps 600 --learning-starts 200 --replay-capacity 2000 --eval-episodes 2"
FEW_FRAMES = '{"max_num_frames_per_episode": 400}'
# In an example: what makes it long or needs a screen, and what takes its place.
REPLACED = {
    r"total_env_steps=[\d_]+": SHORT,
    r"eval_every=[\d_]+": "eval_every=300",
    'render_mode="human"': 'render_mode="rgb_array"',
    r'env="ALE/Pong-v5"': f'env="ALE/Pong-v5", env_kwargs={FEW_FRAMES}, replay_ratio=0.1, {SHORT}',
}
EXPORTS = (
    "hvdqn export RUN -o model.onnx",
    "hvdqn export RUN -o model.pt2",
    "hvdqn export RUN -o policy.safetensors",
)
TRAININGS = {
    "python -m hvdqn.train --preset cartpole --callback solved:StopWhenSolved": "evaluation at env step",
    "python -m hvdqn.train --env solved:make_env --log-info distance --log-info is_success": "evaluation at",
    "python -m hvdqn.train --preset cartpole --init-from RUN": "the weights are those of RUN",
    "python -m hvdqn.train --preset cartpole --init-from RUN --init-torso-only --head qr": "are those of RUN",
    "python -m hvdqn.train --preset cartpole --prefill transitions.npz --learning-starts 100": "with 500 transitions",
    "python -m hvdqn.train --env CartPole-v1 --prefill minari:cartpole/expert-v0": "replay begins with",
}
SOLVED = """
import gymnasium as gym
import hvdqn

class StopWhenSolved(hvdqn.Callback):
    def on_evaluation(self, run, evaluation):
        run.stop()

class Distance(gym.Wrapper):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        info = {"distance": float(observation[0]), "is_success": truncated}
        return observation, reward, terminated, truncated, info

def make_env():
    return Distance(gym.make("CartPole-v1"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page")
    (path / "solved.py").write_text(SOLVED)
    short = {"total_env_steps": 600, "learning_starts": 200, "replay_capacity": 2000, "eval_episodes": 2}
    hvdqn.train(preset="cartpole", run_dir=path / "RUN", **short)
    return path


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "datasets"))
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return folder


@pytest.mark.parametrize("line", EXPORTS)
def test_exports(line: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command(line))
    assert __main__.main(words[1:]) == 0
    assert Path(words[-1]).stat().st_size > 1000
    assert words[-1] in capsys.readouterr().out


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_examples(number: int, here: Path) -> None:
    text = BLOCKS[number]
    compile(text, f"example {number} of docs/api.md", "exec")
    for module in ("stable_baselines3", "ale_py"):
        needed = module in text or (module == "ale_py" and "ALE/" in text)
        if needed and importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: NOT RUN: example {number}")
    for part, other in REPLACED.items():
        text = re.sub(part, lambda _, other=other: other, text)
    code = compile(text, f"example {number} of docs/api.md", "exec")
    exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("line", TRAININGS)
def test_trainings(line: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if "minari" in line:
        pytest.importorskip("minari")
        make_minari_dataset("cartpole/expert-v0", 3)
    flags = shlex.split(command(line).removeprefix("python -m hvdqn.train"))
    flags += (
        SHORT_FLAGS.split()
        if "--learning-starts" not in line
        else SHORT_FLAGS.replace("200 ", "100 ", 1).split()
    )
    assert train.main(flags) == 0
    assert TRAININGS[line] in capfd.readouterr().out
