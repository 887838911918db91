"""Wrong input ends with exit code 2 and one line: what is wrong, and what would be right.

Most rows run `hvdqn.train.main` in this process. Rows that need another environment, and one that does not, run in a
process of their own. Two ranks: tests/distributed/test_wrong_input.py.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hvdqn import train
from tests.launchers import clean_environment

SCRIPTED = "tests.unit.scripted_envs:"


@dataclass(frozen=True)
class Wrong:
    """A wrong command line, and words that its error line must contain.

    `{tmp}` in `argv` and `env` is an empty folder, in which `files` are written first.
    """

    argv: tuple[str, ...]
    words: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


def wrong(argv: str, *words: str, files: Mapping[str, str] | None = None, **env: str) -> Wrong:
    return Wrong(tuple(argv.split()), words, files or {}, env)


HERE = {
    "unknown environment": wrong("--env CartPoll-v1", "unknown environment 'CartPoll-v1'", "'CartPole-v1'"),
    "unknown version": wrong("--env CartPole-v7", "unknown environment 'CartPole-v7'", "'CartPole-v1'"),
    "nothing near": wrong("--env qqqqqqqqqq", "unknown environment 'qqqqqqqqqq'", "registered Gymnasium id"),
    "unknown module": wrong("--env no_such_module:X-v0", "cannot import 'no_such_module'", "PYTHONPATH"),
    "unknown flag": wrong("--learnin-starts 3", "'--learnin-starts'", "did you mean", "--learning-starts"),
    "flag without value": wrong("--lr", "--lr"),
    "value of another type": wrong("--lr fast", "--lr", "fast"),
    "none of the choices": wrong("--optimizer lion", "lion", "adam", "rmsprop", "sgd"),
    "stray word": wrong("cartpole", "cartpole"),
    "two environments' presets": wrong(
        "--preset minatar,atari", "--preset minatar,atari", "cannot both hold", "atari,rainbow"
    ),
    "two algorithms' presets": wrong("--preset rainbow,iqn", "rainbow and iqn", "cannot both hold"),
    "layers by commas": wrong("--hidden 64,64", "--hidden", "blanks between", "64 64"),
    "no whole number": wrong("--total-env-steps 1.5e0", "--total-env-steps", "'1.5e0' is no whole number"),
    "another evaluation environment": wrong(
        "--eval-env Acrobot-v1", "'Acrobot-v1' have float32 observations [6] and 3 actions", "--eval-env"
    ),
    "evaluation without such an argument": wrong(
        '--eval-env-kwargs {"x":1}', "the environment of evaluations: ", "does not suit 'CartPole-v1'"
    ),
    "evaluation arguments are a list": wrong("--eval-env-kwargs []", "--eval-env-kwargs '[]'", "JSON object"),
    "a return without evaluations": wrong("--stop-at-return 5", "--stop-at-return needs", "--eval-every"),
    "unknown tracker": wrong("--track comet", "--track is 'comet'", "none, wandb, mlflow"),
    "unknown preset": wrong("--preset cartpol", "unknown preset 'cartpol'", "did you mean 'cartpole'", "atari"),
    "continuous actions": wrong(
        "--env Pendulum-v1", "'Pendulum-v1'", "action space Box", "needs Discrete", "--wrapper"
    ),
    "text observations": wrong(
        f"--env {SCRIPTED}ObservesText-v0", "Text space at ['said']", "Box, Discrete", "--wrapper"
    ),
    "sequence observations": wrong(f"--env {SCRIPTED}ObservesSequence-v0", "Sequence space", "--wrapper"),
    "graph observations": wrong(f"--env {SCRIPTED}ObservesGraph-v0", "Graph space", "--wrapper"),
    "workers whose death nobody sees": wrong(
        "--tolerate-dead-workers --stall-timeout 0", "--tolerate-dead-workers", "--stall-timeout 0"
    ),
    "convolutions over a vector": wrong("--torso nature", "--torso nature", "needs images", "--torso mlp"),
    "convolutions over a tiny image": wrong(
        f"--env {SCRIPTED}ObservesImage-v0 --torso nature", "8 x 6", "--torso minatar"
    ),
    "batch above shard": wrong("--batch-per-rank 2001", "2001", "replay shard", "2000", "lower one or raise"),
    "capacity at learning starts": wrong(
        "--replay-capacity 200", "--replay-capacity 200", "above --learning-starts 200", "never start"
    ),
    "capacity below learning starts": wrong("--learning-starts 9000", "2000", "above --learning-starts 9000"),
    "a row too short for n steps": wrong(
        "--envs-per-rank 500 --n-step 5 --batch-per-rank 1", "--replay-capacity 2000 leaves 4", "need 6"
    ),
    "no envs": wrong("--envs-per-rank 0", "--envs-per-rank is 0", "at least 1"),
    "negative batch": wrong("--batch-per-rank -32", "--batch-per-rank is -32", "at least 1"),
    "no capacity": wrong("--replay-capacity 0", "--replay-capacity is 0", "at least 1"),
    "negative steps": wrong("--total-env-steps -1", "--total-env-steps is -1", "at least 1"),
    "no n step": wrong("--n-step 0", "--n-step is 0", "at least 1"),
    "no frame stack": wrong("--frame-stack 0", "--frame-stack is 0", "at least 1"),
    "no eval episodes": wrong("--eval-episodes -1", "--eval-episodes is -1", "0 or more"),
    "no replay ratio": wrong("--replay-ratio 0", "--replay-ratio is 0.0", "above 0"),
    "negative learning rate": wrong("--lr -0.1", "--lr is -0.1", "above 0"),
    "negative target period": wrong("--target-every -5", "--target-every is -5", "0 or more"),
    "negative checkpoint period": wrong("--checkpoint-every -1", "--checkpoint-every is -1", "0 or more"),
    "too many frames": wrong("--frame-stack 256", "--frame-stack is 256", "at most 255"),
    "a seed that no generator takes": wrong("--seed 9223372036854775808", "--seed is 92233", "below 2^63"),
    "an end before learning starts": wrong(
        "--total-env-steps 200", "--total-env-steps 200", "above --learning-starts 200", "never start"
    ),
    "an end before the first update": wrong(
        "--n-step 40 --total-env-steps 600", "600 env steps end before the first update", "starts at 656", "raise"
    ),
    "hardly anything to learn from": wrong("--replay-ratio 1e-8", "end before the first update", "raise"),
    "more replay than memory": wrong(
        "--replay-capacity 1e13", "a replay of 10,000,000,000,000 transitions", "lower --replay-capacity"
    ),
    "a wrapper that is a number": wrong("--config {tmp}/w.yaml", "wrapper", "3", files={"w.yaml": "wrapper: 3"}),
    "a date among arguments": wrong(
        "--config {tmp}/d.yaml",
        "env_kwargs holds what JSON cannot",
        "quotes",
        files={"d.yaml": "env_kwargs: {a: 2020-01-01}"},
    ),
    "negative seed": wrong("--seed -1", "--seed is -1", "0 or more"),
    "two presets": wrong(
        "--preset minatar --preset=rainbow,smoke", "--preset is given twice", "join them by comma"
    ),
    "two config files": wrong("--config {tmp}/a --config {tmp}/b", "--config is given twice", "give one file"),
    "a switch with a value": wrong("--double false", "--double takes no value", "write --double or --no-double"),
    "a switch that is set": wrong("--dueling=True", "--dueling takes no value", "--no-dueling"),
    "a number too many": wrong("--seed 1 --gamma 0.9 1", "unknown argument '1'", "--help"),
    "a day that no month has": wrong(
        "--config {tmp}/c.yaml", "c.yaml", "not valid YAML", files={"c.yaml": "run_dir: 2024-02-30"}
    ),
    "a network larger than memory": wrong("--hidden 4000000 4000000", "does not fit into memory", "make it smaller"),
    "a wrapper of Gymnasium for others": wrong(
        "--wrapper gymnasium.wrappers:GrayscaleObservation", "GrayscaleObservation", "does not take this environment"
    ),
    "arguments that the environment wants": wrong(
        f"--env {SCRIPTED}NeedsArgument-v0", "NeedsArgument-v0", "missing 1 required", "'size'", "--env-kwargs"
    ),
    "an empty layer": wrong("--hidden 64 0", "--hidden is 64 0", "at least 1 unit"),
    "no updates between averages": wrong("--sync-every 0", "--sync-every is 0", "at least 1"),
    "no updates between pulls": wrong("--pull-every 0", "--pull-every is 0", "at least 1"),
    "negative staleness": wrong("--max-staleness -1", "--max-staleness is -1", "0 or more"),
    "a server with nobody to serve": wrong(
        "--sync server", "--sync server", "2 or more ranks", "not with a single rank", "--comm mpi"
    ),
    "no outer rate": wrong("--outer-lr 0", "--outer-lr is 0.0", "above 0"),
    "endless outer momentum": wrong("--outer-momentum 1", "--outer-momentum is 1.0", "within [0, 1)"),
    "gamma 0": wrong("--gamma 0", "--gamma is 0.0", "(0, 1]"),
    "gamma above 1": wrong("--gamma 1.01", "--gamma is 1.01", "(0, 1]"),
    "gamma below 0": wrong("--gamma -0.9", "--gamma is -0.9", "(0, 1]"),
    "gamma nan": wrong("--gamma nan", "--gamma is nan", "finite"),
    "epsilon above 1": wrong("--epsilon-start 2", "--epsilon-start is 2.0", "[0, 1]"),
    "no config file": wrong("--config {tmp}/none.yaml", "cannot read", "none.yaml", "No such file", "YAML file"),
    "config is a folder": wrong("--config {tmp}", "cannot read", "Is a directory"),
    "config is no text": wrong("--config {tmp}/c.yaml", "c.yaml", "UTF-8", files={"c.yaml": "\udcff\udcfe"}),
    "config is no YAML": wrong("--config {tmp}/c.yaml", "not valid YAML at line 2", files={"c.yaml": "lr: 1\n{"}),
    "config is no mapping": wrong("--config {tmp}/c.yaml", "no mapping", "key: value", files={"c.yaml": "[1]"}),
    "unknown key in config": wrong(
        "--config {tmp}/c.yaml",
        "c.yaml",
        "unknown setting 'total_steps'",
        "'total_env_steps'",
        files={"c.yaml": "total_steps: 5"},
    ),
    "wrong value in config": wrong(
        "--config {tmp}/c.yaml", "in the config file", "c.yaml", "--gamma is 1.5", files={"c.yaml": "gamma: 1.5"}
    ),
    "wrong value beside config": wrong(
        "--config {tmp}/c.yaml --gamma=1.5", "error: --gamma is 1.5", files={"c.yaml": "gamma: 0.9\nlr: 1e-3"}
    ),
    "wrong type in config": wrong(
        "--config {tmp}/c.yaml", "config file", "c.yaml", "--lr", "fast", files={"c.yaml": "lr: fast"}
    ),
    "neither true nor false in config": wrong(
        "--config {tmp}/c.yaml", "c.yaml", "double is 'maybe'", "true or false", files={"c.yaml": "double: maybe"}
    ),
    "wrong preset in config": wrong(
        "--preset= --config {tmp}/c.yaml", "unknown preset 'mspacman'", files={"c.yaml": "preset: mspacman"}
    ),
    "run directory below a file": wrong(
        "--run-dir {tmp}/file/run", "cannot write", "file/run", "Not a directory", "--run-dir", files={"file": ""}
    ),
    "run directory is a file": wrong(
        "--run-dir {tmp}/file", "cannot write", "{tmp}/file", "File exists", "--run-dir", files={"file": ""}
    ),
    "no checkpoint to resume": wrong("--resume must", "--resume must", "holds no checkpoint", "--run-dir"),
    "env kwargs no JSON": wrong("--env-kwargs {{x", "--env-kwargs", "not JSON", '{"name": value}'),
    "env kwargs unknown": wrong(
        '--env-kwargs {{"gravity":1}}', "--env-kwargs", "does not suit 'CartPole-v1'", "gravity"
    ),
    "wrapper without attribute": wrong("--wrapper gymnasium", "--wrapper 'gymnasium'", "module:attribute"),
    "wrapper by its file": wrong("--wrapper ./wrap.py:Mine", "'./wrap.py'", "no module's name", "without path"),
    "environment by its file": wrong("--env ./mine.py:Mine-v0", "'./mine.py'", "no module's name"),
    "torso by its file": wrong("--torso ./wide.py:Wide", "'./wide.py'", "no module's name"),
    "wrapper unknown": wrong("--wrapper gymnasium.wrappers:Flatten", "has no 'Flatten'"),
    "lives without Atari": wrong("--episodic-life", "--episodic-life needs an Atari environment", "ALE/Pong-v5"),
    "native where there is none": wrong(
        "--env Acrobot-v1 --vectorization native", "no native vector", "sync or async"
    ),
    "engine without its launcher": wrong("--comm torch", "--comm torch", "torchrun --nproc-per-node"),
    "mpi without mpirun": wrong("--comm mpi", "--comm mpi", "mpirun -np N"),
    "many Slurm tasks, one process": wrong("", "SLURM_NTASKS=8", "srun", "--comm local", SLURM_NTASKS="8"),
    "a rank outside of its world": wrong("", "RANK=2", "size - 1", RANK="2", WORLD_SIZE="2", MASTER_ADDR="::1"),
}  # fmt: skip

# Rows that need a process of their own, mostly because of environment variables.
APART = {
    "unknown flag": HERE["unknown flag"],
    "CUDA absent": wrong(
        "--device cuda", "--device cuda", "no CUDA device", "--device cpu", CUDA_VISIBLE_DEVICES=""
    ),
    "missing extra": wrong(
        "--preset atari",
        "'ALE/Pong-v5' needs the atari extra",
        "pip install 'hvdqn[atari]'",
        files={"ale_py.py": "raise ModuleNotFoundError(\"No module named 'ale_py'\", name='ale_py')"},
        PYTHONPATH="{tmp}",
    ),
    # The variables of mpirun without mpirun: this rank would otherwise train alone, as if it were one of 4.
    "another world than promised": wrong(
        "",
        "OMPI_COMM_WORLD_SIZE=4",
        "mpirun started 4 ranks",
        "connects 1",
        OMPI_COMM_WORLD_SIZE="4",
        OMPI_COMM_WORLD_RANK="0",
    ),
}

# The run directory already holds a run of the smoke preset.
ON_A_RUN = {
    "never resume": wrong("--resume never", "holds checkpoints", "--resume is never", "--run-dir"),
    "another environment": wrong(
        "--env Acrobot-v1", "begun with --env CartPole-v1, not Acrobot-v1", "--run-dir"
    ),
    "another network": wrong("--hidden 8", "begun with --hidden", "--run-dir"),
    "another strategy": wrong("--sync parameters", "begun with --sync gradients, not parameters"),
    "another optimizer": wrong("--optimizer rmsprop", "begun with --optimizer adam, not rmsprop"),
}


def prepare(row: Wrong, tmp: Path) -> list[str]:
    """Write the row's files and return its command line, with a run directory inside `tmp`."""
    for name, text in row.files.items():
        (tmp / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    argv = [word.replace("{tmp}", str(tmp)).replace("{{", "{").replace("}}", "}") for word in row.argv]
    own = [] if "--run-dir" in argv else ["--run-dir", str(tmp / "run")]
    preset = [] if any(word.startswith("--preset") for word in argv) else ["--preset", "smoke"]
    return [*preset, *own, *argv]


def check_refusal(code: int | None, stderr: str, words: tuple[str, ...], tmp: Path) -> None:
    lines = stderr.splitlines()
    assert code == 2, stderr
    assert len(lines) == 1, stderr
    assert lines[0].startswith("hvdqn: error: "), stderr
    for word in words:
        assert word.replace("{tmp}", str(tmp)) in lines[0]


def tree(folder: Path) -> dict[str, str]:
    """Return all paths below a folder with the digest of each file's content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of launchers from the environment of this process."""
    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("row", HERE.values(), ids=HERE)
def test_wrong_input_is_refused_in_one_line(
    row: Wrong, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in row.env.items():
        monkeypatch.setenv(name, value)
    argv = prepare(row, tmp_path)
    before = tree(tmp_path)
    code = train.main(argv)
    check_refusal(code, capsys.readouterr().err, row.words, tmp_path)
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("clean")
def test_an_existing_run_is_not_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--preset", "smoke", "--total-env-steps", "300", "--run-dir", str(tmp_path)]
    assert train.main([*run, "--eval-episodes", "1"]) == 0
    before = tree(tmp_path)
    for row in ON_A_RUN.values():
        capsys.readouterr()
        code = train.main([*run, *row.argv])
        check_refusal(code, capsys.readouterr().err, row.words, tmp_path)
        assert tree(tmp_path) == before


@pytest.mark.parametrize("row", APART.values(), ids=APART)
def test_a_process_of_its_own_prints_the_same_line(row: Wrong, tmp_path: Path) -> None:
    argv = prepare(row, tmp_path)
    before = tree(tmp_path)
    env = clean_environment()
    for name, value in row.env.items():
        value = value.replace("{tmp}", str(tmp_path))
        env[name] = f"{value}{os.pathsep}{env[name]}" if name == "PYTHONPATH" else value
    result = subprocess.run(
        [sys.executable, "-m", "hvdqn.train", *argv], env=env, capture_output=True, text=True, timeout=60
    )
    check_refusal(result.returncode, result.stderr, row.words, tmp_path)
    assert result.stdout == ""
    assert {name for name in tree(tmp_path) if "__pycache__" not in name} == before.keys()


def test_help_into_a_pipe_that_closes_is_no_error() -> None:
    command = f"set -o pipefail; '{sys.executable}' -m hvdqn.train --help | head -1"
    result = subprocess.run(
        ["bash", "-c", command], env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage:")
