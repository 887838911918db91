"""`hvdqn eval` does not run code that a stranger's run directory names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvdqn import train
from hvdqn.checkpoint.manifest import manifest_text
from tests.launchers import clean_environment

PAYLOAD = """
from pathlib import Path
Path("it-ran").touch()
import gymnasium as gym
from torch import nn
gym.register("Payload-v0", "gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=20)
def wrap(env):
    return env
class Torso(nn.Flatten):
    def __init__(self, shape):
        super().__init__()
"""
CASES = {
    "torso": ({"torso": "payload:Torso"}, "--torso 'payload:Torso'"),
    "wrapper": ({"wrapper": ["payload:wrap"]}, "--wrapper 'payload:wrap'"),
    "env": ({"env": "payload:Payload-v0"}, "--env 'payload:Payload-v0'"),
    "env_kwargs": (
        {"env": "GymV26Environment-v0", "env_kwargs": '{"env_id": "\\u0070ayload:Payload-v0"}'},
        '--env-kwargs \'{"env_id": "payload:Payload-v0"}\'',
    ),
    "escape": ({"torso": "payload\n\x1b[2J:Torso"}, r"--torso 'payload\n\x1b[2J:Torso'"),
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("honest") / "run"
    flags = "--preset smoke --total-env-steps 208 --eval-episodes 1 --hidden 16"
    assert train.main([*flags.split(), "--run-dir", str(path)]) == 0
    return path


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    """Return a folder with a payload and, in `run`, a copy of an honest run's newest checkpoint."""
    (tmp_path / "payload.py").write_text(PAYLOAD)
    (tmp_path / "run").mkdir()
    for file in (honest / "checkpoints" / "latest").iterdir():
        (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    return tmp_path


def forge(folder: Path, **settings: Any) -> None:
    """Change settings in the manifest, whose digest anyone can compute."""
    path = folder / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256")
    manifest["config"].update(settings)
    path.write_text(manifest_text(manifest))


def evaluate(folder: Path, *flags: str, module: bool = True) -> subprocess.CompletedProcess[str]:
    script = "import sys; from hvdqn.__main__ import main; sys.path.pop(0); sys.exit(main(sys.argv[1:]))"
    command = ["-m", "hvdqn"] if module else ["-c", script]
    return subprocess.run(
        [sys.executable, *command, "eval", "run", "--episodes", "1", *flags],
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", CASES)
def test_code_that_a_run_names_is_refused_and_listed(name: str, folder: Path) -> None:
    settings, listed = CASES[name]
    forge(folder, **settings)
    result = evaluate(folder, module=name == "torso")
    assert result.returncode == 2, result
    assert result.stderr.startswith("hvdqn eval: error: 'run' names code that would be imported: ")
    assert listed in result.stderr
    assert "--trust" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (folder / "it-ran").exists()


ALL = {"env": "payload:Payload-v0", "wrapper": ["payload:wrap"]}


@pytest.mark.parametrize(
    "flags",
    [("--trust",), ("--env", "payload:Payload-v0", "--wrapper", "payload:wrap")],
    ids=["trust", "repeated"],
)
def test_code_of_a_trusted_run_is_imported_from_the_current_folder(
    flags: tuple[str, ...], folder: Path
) -> None:
    forge(folder, **ALL)
    result = evaluate(folder, *flags)
    assert result.returncode == 0, result
    assert "error" not in result.stderr, result
    assert "run: 1 episodes" in result.stdout
    assert (folder / "it-ran").exists()


def test_all_of_the_code_must_be_repeated(folder: Path) -> None:
    forge(folder, **ALL)
    result = evaluate(folder, "--env", "payload:Payload-v0")
    assert result.returncode == 2
    assert "imported: --wrapper 'payload:wrap';" in result.stderr
    assert not (folder / "it-ran").exists()


def test_a_repeated_flag_must_be_the_runs(folder: Path) -> None:
    result = evaluate(folder, "--torso", "payload:Torso")
    assert result.returncode == 2
    assert (
        result.stderr
        == "hvdqn eval: error: 'run' was not trained with --torso 'payload:Torso'; leave it out\n"
    )
    assert not (folder / "it-ran").exists()


@pytest.mark.parametrize("module", [True, False], ids=["python -m hvdqn", "hvdqn"])
def test_modules_of_the_current_folder_do_not_replace_libraries(module: bool, folder: Path) -> None:
    """A run without code of its own, in a folder where somebody left a `minatar.py`."""
    (folder / "minatar.py").write_text(PAYLOAD)
    (folder / "ale_py.py").write_text(PAYLOAD)
    forge(folder, env="NoSuchGame-v0")  # looks for it in the optional packages
    result = evaluate(folder, module=module)
    assert result.returncode == 2
    assert "unknown environment" in result.stderr
    assert not (folder / "it-ran").exists()
