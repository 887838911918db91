"""Where a run comes from: what git says, and the launches in config.yaml."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hvdqn.comm.local import LocalComm
from hvdqn.config import Config, parse
from hvdqn.provenance import Launch, answer_of, ask_git
from hvdqn.run_directory import read_launches, record_config


def git(folder: Path, *words: str) -> str:
    """Run git in a folder, and return its output."""
    identity = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a"}
    environment = {**os.environ, **identity, "GIT_COMMITTER_EMAIL": "a@b", "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(
        ["git", "-C", str(folder), *words], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a folder with one commit."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed: its answers are NOT tested")
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_git_tells_the_commit_and_changes_of_tracked_files(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    (repository / "untracked").touch()
    assert answer_of(ask_git(repository)) == {"commit": commit, "dirty": False}
    (repository / "code.py").write_text("2\n")
    (repository / "below").mkdir()
    assert answer_of(ask_git(repository / "below")) == {"commit": commit, "dirty": True}


def test_outside_of_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert answer_of(ask_git(tmp_path)) is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert ask_git(tmp_path) is None


def test_a_launch_names_command_hosts_and_versions() -> None:
    launch = Launch(LocalComm()).describe()
    assert shlex.split(launch["command"]) == sys.orig_argv
    assert launch["hosts"] == [os.uname().nodename]
    assert launch["versions"]["python"] == sys.version.split()[0]
    assert launch["folder"] == str(Path.cwd())


def test_config_yaml_keeps_each_launch_and_is_still_a_config_file(tmp_path: Path) -> None:
    config = Config().replace(lr=0.5)
    record_config(config, LocalComm(), tmp_path, {"started_at": "first"}, anew=True)
    record_config(config, LocalComm(), tmp_path, {"started_at": "second"})
    record_config(config, LocalComm(), tmp_path)  # the settings of an elastic job
    assert [launch["started_at"] for launch in read_launches(tmp_path)] == ["first", "second"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == 0.5
    assert parse(["--config", str(tmp_path / "config.yaml")]).learning.lr == 0.5
    assert not list(tmp_path.glob("*.old"))


def test_another_run_in_the_same_folder_sets_the_config_aside(tmp_path: Path) -> None:
    record_config(Config().replace(lr=0.5), LocalComm(), tmp_path, {"started_at": "first"}, anew=True)
    record_config(Config().replace(lr=0.5), LocalComm(), tmp_path, {"started_at": "second"}, anew=True)
    assert not list(tmp_path.glob("*.old"))
    record_config(Config(), LocalComm(), tmp_path, {"started_at": "third"}, anew=True)
    assert [launch["started_at"] for launch in read_launches(tmp_path)] == ["third"]
    assert (tmp_path / "config.yaml.old").exists()
