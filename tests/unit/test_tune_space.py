"""`hvdqn tune`: the search space, and the command line of a trial."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hvdqn.errors import UserError
from hvdqn.tune import main
from hvdqn.tune.space import Search, read_search, read_space
from hvdqn.tune.trial import command_of


@pytest.mark.parametrize(
    ("text", "search"),
    [
        ("lr=1e-5:1e-3:log", Search("lr", 1e-5, 1e-3, log=True)),
        ("gamma=0.9:0.999", Search("gamma", 0.9, 0.999)),
        ("n_step=1:5", Search("n_step", 1, 5, whole=True)),
        ("--batch-per-rank=32,64", Search("batch_per_rank", choices=("32", "64"))),
        ("double=true,false", Search("double", choices=("true", "false"))),
        ("hidden=64 64,256", Search("hidden", choices=("64 64", "256"))),
        ("torso=mine:Torso,mlp", Search("torso", choices=("mine:Torso", "mlp"))),
    ],
)
def test_a_search_is_read(text: str, search: Search) -> None:
    assert read_search(text) == search


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "nothing to search; give --search"),
        (["lr"], "write NAME=LOW:HIGH"),
        (["lr=1:2:3"], "write NAME=LOW:HIGH"),
        (["lr=2:1"], "LOW must be below HIGH"),
        (["lr=0:1"], "--search lr=0.0: it must be above 0"),
        (["lr=a:1"], "--lr is 'a'; it must be a number"),
        (["learning_rate=1,2"], "did you mean 'lr'?"),
        (["gamma=0.9,1.5"], "--search gamma=1.5: it must be within"),
        (["double=yes,no"], "write true or false"),
        (["double=0:1"], "--double takes no range"),
        (["head=c51,nope"], "--head is 'nope'; it must be one of"),
        (["run_dir=a,b"], "each trial has of its own"),
        (["lr=1,2", "lr=3,4"], "--search names lr twice"),
    ],
)
def test_a_wrong_search_is_one_line(texts: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        read_space(texts)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_command_of_a_trial_puts_its_values_last() -> None:
    values = {"lr": "0.1", "double": "false", "hidden": "64 32"}
    command = command_of("mpirun -np 2", ["--preset", "smoke"], values, Path("/runs/0001"))
    assert command == [
        *("mpirun", "-np", "2", sys.executable, "-m", "hvdqn.train", "--preset", "smoke"),
        *("--lr", "0.1", "--no-double", "--hidden", "64", "32", "--run-dir", "/runs/0001"),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study"], "nothing to search"),
        ([], "STUDY is missing"),
        (["study", "--search", "lr=1,2", "--", "--run-dir", "x"], "each trial has a --run-dir of its own"),
        (["study", "--search", "lr=1,2", "--", "--presett", "x"], "unknown argument '--presett'"),
        (["study", "--search", "lr=1,2", "--trials", "0"], "--trials is 0; it must be at least 1"),
    ],
)
def test_wrong_use_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("hvdqn tune: error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_without_optuna_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hvdqn.tune.study.importlib.util.find_spec", lambda name: None)
    assert main([str(tmp_path / "study"), "--search", "lr=1,2"]) == 2
    assert "pip install 'hvdqn[tune]'" in capsys.readouterr().err
