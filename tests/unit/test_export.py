"""`hvdqn export`: models that other programs run, compared with the policy that they come from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch

import hvdqn
from hvdqn import __main__, export
from tests.unit.library_envs import Rich

SMALL: dict[str, Any] = {"preset": "smoke", "total_env_steps": 300, "eval_episodes": 0}


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hvdqn.train(run_dir=tmp_path_factory.mktemp("cartpole"), **SMALL).run_dir


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    capsys.readouterr()
    code = __main__.main(["export", *argv])
    written = capsys.readouterr()
    return code, written.out + written.err


def play(length: int) -> list[Any]:
    """Return observations of a game of CartPole."""
    env = gym.make("CartPole-v1")
    observation, _ = env.reset(seed=7)
    observations = [observation]
    while len(observations) < length:
        observation, _, terminated, truncated, _ = env.step(len(observations) % 2)
        observations.append(env.reset()[0] if terminated or truncated else observation)
    return observations


def test_onnxruntime_plays_the_policy(
    cartpole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    code, output = run(capsys, str(cartpole), "-o", str(path))
    assert code == 0, output
    found = re.search(
        r"on 1,000 random observations the largest difference of a Q-value is ([\d.e-]+), and", output
    )
    assert found is not None, output
    assert float(found[1]) < 1e-4
    assert output.endswith("1,000 greedy actions are equal\n")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["observation"]
    observations = np.stack(play(1000))
    q, action = session.run(["q_values", "action"], {"observation": observations})
    policy = hvdqn.load(cartpole)
    np.testing.assert_allclose(q, policy.q_values(observations), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(action, q.argmax(axis=1))
    assert q.std() > 0
    assert list(tmp_path.iterdir()) == [path], "the model is one file"


def test_a_program_of_torch_export_plays_the_policy(
    cartpole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = run(capsys, str(cartpole / "checkpoints" / "latest"), "-o", str(tmp_path / "model.pt2"))
    assert code == 0, output
    module = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 5):
        observations = np.stack(play(batch))
        q, action = module(torch.from_numpy(observations))
        expected = hvdqn.load(cartpole).q_values(observations)
        np.testing.assert_allclose(q.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
        assert action.tolist() == expected.argmax(axis=1).tolist()


RAINBOW = {"head": "iqn", "dueling": True, "noisy": True, "layer_norm": True}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dict and stack": ("onnx", {"env": Rich, "frame_stack": 3}),
    "normalized": ("onnx", {"env": Rich, "frame_stack": 2, "normalize_observations": True}),
    "iqn, dueling, noisy": ("pt2", {"env": Rich, **RAINBOW}),
    "c51": ("pt2", {"head": "c51", "v_max": 100.0, "v_min": 0.0}),
    "minatar": ("onnx", {"env": "MinAtar/Breakout-v1", "head": "qr", "quantiles": 25}),
    "wide": ("onnx", {"hidden": (1024, 512)}),
    "uneven dimensions": ("onnx", {"env": "tests.unit.action_envs:AdditiveUneven-v0", "dueling": True}),
    "dimensions, hl-gauss": ("onnx", {"env": "tests.unit.action_envs:AdditiveEven-v0", "head": "hl-gauss"}),
    "a matrix of actions": ("pt2", {"env": "tests.unit.action_envs:AdditiveMatrix-v0", "head": "qr"}),
    "box actions": ("onnx", {"env": "tests.unit.action_envs:AdditiveBox-v0", "action_bins": 3}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_kind_of_network_is_exported(name: str, tmp_path: Path) -> None:
    """`export` itself raises if the model differs from the policy on 1,000 observations."""
    if name == "minatar":
        pytest.importorskip("minatar")
    suffix, settings = SETTINGS[name]
    policy = hvdqn.train(run_dir=tmp_path / "run", **SMALL, **settings).policy()
    line = export.export(policy, tmp_path / f"model.{suffix}")
    # Two nearly equal Q-values may be ordered otherwise by rounding.
    same = re.search(r"([\d,]+) greedy actions", line)
    assert same is not None
    assert int(same[1].replace(",", "")) >= 990, line


def test_a_model_that_differs_is_reported(
    cartpole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(export.ExportedPolicy):
        def forward(self, *observation):
            q, action = super().forward(*observation)
            return q + 0.1, action

    monkeypatch.setattr(export, "ExportedPolicy", Wrong)
    code, output = run(capsys, str(cartpole), "-o", str(tmp_path / "model.pt2"))
    assert code == 1
    assert "differ from the policy's by up to 0.1" in output


@pytest.mark.parametrize(
    ("output", "words"),
    [("model.h5", "must end in .onnx, .pt2, .safetensors"), ("no/model.pt2", "there is no folder")],
)
def test_wrong_files_are_refused_in_one_line(
    output: str, words: str, cartpole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run(capsys, str(cartpole), "-o", str(tmp_path / output))
    assert code == 2
    assert words in text
    assert text.count("\n") == 1
    assert text.startswith("hvdqn export: error: ")


def test_a_missing_package_names_the_extra(
    cartpole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    code, output = run(capsys, str(cartpole), "-o", str(tmp_path / "model.onnx"))
    assert code == 2
    assert "pip install 'hvdqn[export]'" in output


def test_a_torso_of_the_run_needs_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torso = "tests.unit.library_envs:Flat"
    run_dir = hvdqn.train(torso=torso, run_dir=tmp_path / "run", **SMALL).run_dir
    file = str(tmp_path / "mine.safetensors")
    code, output = run(capsys, str(run_dir), "-o", file)
    assert code == 2
    assert "--trust" in output
    assert run(capsys, str(run_dir), "-o", file, "--torso", torso)[0] == 0
    assert hvdqn.load(file, trust=True).env_steps >= 300
