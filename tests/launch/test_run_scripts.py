"""The launch scripts on this host: help, wrong input, exit codes, signals."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launchers import REPOSITORY, Job, Result, clean_environment

pytestmark = pytest.mark.launch

SCRIPTS = ("horovodrun.sh", "mpirun.sh", "torchrun.sh", "elastic.sh")
RUNS = {
    "horovodrun-gloo": ["horovodrun.sh", "--gloo"],
    "horovodrun-mpi": ["horovodrun.sh", "--mpi"],
    "mpirun": ["mpirun.sh"],
    "torchrun": ["torchrun.sh"],
}
ENDLESS = ["--preset", "smoke", "--total-env-steps", "100000000"]


def start(words: list[str], timeout: float = 120, cwd: Path | None = None, **environment: str) -> Job:
    script, *flags = words
    env = clean_environment() | {"HVDQN_VENV": sys.prefix} | environment
    return Job([str(REPOSITORY / "launch" / script), *flags], 2, timeout, env, cwd)


def run(*words: str, **environment: str) -> Result:
    with start(list(words), **environment) as job:  # type: ignore[arg-type]
        return job.wait()


def refusal(result: Result) -> str:
    """Return the error line of a launch that failed with exit code 2."""
    assert result.returncode == 2, result
    assert result.stdout == "", result
    assert result.stderr.count("\n") == 1, result
    assert "error: " in result.stderr, result
    return result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script: str) -> None:
    result = run(script, "--help")
    assert (result.returncode, result.stderr) == (0, ""), result
    for word in (
        "-np N",
        "--hosts",
        "--interfaces",
        "-x NAME",
        "--env-file",
        "--launcher-args",
        f"launch/{script}",
    ):
        assert word in result.stdout, result
    assert "shellcheck" not in result.stdout
    assert "readonly" not in result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_contains_only_what_users_need(script: str) -> None:
    """It is the comment at the top of the script, then the flags that all scripts share. Nothing on common.sh."""
    comment = (REPOSITORY / "launch" / script).read_text().partition("\nset -euo")[0].splitlines()[1:]
    own, _, shared = run(script, "--help").stdout.partition("Flags:\n")
    assert own.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in comment]
    assert shared.startswith("  -np N")
    for other in {*SCRIPTS, "common.sh"} - {script}:
        assert other not in own + shared


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "how many ranks? Give -np N"),
        (["-np"], "-np needs a value"),
        (["-np", "many"], "-np 'many' is not a number of ranks"),
        (["-np", "0"], "-np '0' is not a number of ranks"),
        (["-np", "2", "--preset", "smoke"], "unknown argument '--preset'; put flags of training after '--'"),
        (["-np", "3", "--hosts", "localhost:2"], "-np 3 is more than the 2 slots of --hosts localhost:2"),
        (["--hosts", "h1:4,h2:x"], "'h2:x' is not a host; write them as h1:4,h2:4"),
        (["-np", "2", "-x", "NO_SUCH_VARIABLE"], "there is no such variable"),
        (["-np", "2", "-x", "WANDB_API_KEY"], "put it into a file and name that with --env-file"),
        (["-np", "2", "-x", "SLURM_JWT"], "-x SLURM_JWT would show a secret in ps"),
        (["-np", "2", "--env-file", "/nowhere/env"], "--env-file /nowhere/env cannot be read"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(script: str, words: list[str], expected: str) -> None:
    assert expected in refusal(run(script, *words, WANDB_API_KEY="x", SLURM_JWT="x"))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, True), (0o604, True), (0o622, False)])
def test_an_env_file_that_others_can_read_brings_a_warning(
    script: str, mode: int, warns: bool, tmp_path: Path
) -> None:
    secrets = tmp_path / "my secrets"
    secrets.touch()
    secrets.chmod(mode)
    link = tmp_path / "link"
    link.symlink_to(secrets)
    result = run(script, "--env-file", str(link), "-np", "0")
    assert result.returncode == 2, result
    warning = f"{script}: warning: other users can read --env-file {link}; run chmod 600 {link}\n"
    assert result.stderr.startswith(warning) == warns, result
    assert result.stderr.count("\n") == 1 + warns, result


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-np", "2"], "elastic jobs need two --hosts or more"),
        (
            ["--hosts", "h1,h2", "--min-np", "3"],
            "--min-np 3, -np 2, --max-np 2: each must be at least the one before",
        ),
        (["--hosts", "h1,h2", "--max-np", "few"], "--max-np 'few' is not a whole number above 0"),
        (["--hosts", "h1,h2", "--cooldown", "600"], "--cooldown '600': give seconds as MIN,MAX"),
        (["--discovery", "/nowhere/hosts"], "--discovery '/nowhere/hosts' is not a program"),
        (["--discovery", "/bin/false"], "/false failed (1); it must print hosts"),
        (["--hosts", "h1,h2", "--", "echo"], "'echo': only flags of training may follow '--'"),
    ],
)
def test_wrong_input_of_elastic(words: list[str], expected: str) -> None:
    assert expected in refusal(run("elastic.sh", *words))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_environment(script: str) -> None:
    assert "no Python at /nowhere/bin/python" in refusal(run(script, "-np", "2", HVDQN_VENV="/nowhere"))


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("horovodrun.sh", "horovod is not installed for .*; run launch/install_horovod.sh"),
        ("elastic.sh", "horovod is not installed for .*; run launch/install_horovod.sh"),
        ("torchrun.sh", "torch is not installed for .*; run launch/setup.sh"),
        ("mpirun.sh", "no mpirun in PATH; run launch/setup.sh"),
    ],
)
def test_a_missing_launcher(script: str, expected: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=60)
    path = [place for place in os.environ["PATH"].split(os.pathsep) if not shutil.which("mpirun", path=place)]
    ranks = ["--hosts", "localhost,127.0.0.1"] if script == "elastic.sh" else ["-np", "2"]
    result = run(script, *ranks, HVDQN_VENV=str(tmp_path / "venv"), PATH=os.pathsep.join(path))
    assert re.search(expected, refusal(result)), result


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_a_signal_stops_all_ranks_with_exit_code_75(words: list[str], tmp_path: Path) -> None:
    """Also: arguments after `--` reach hvdqn unchanged through all shells and launchers."""
    run_dir = tmp_path / """a run "of" 'mine' $HOME $$ ${local_rank}"""
    with start([*words, "-np", "2", "--", *ENDLESS, "--run-dir", str(run_dir)], cwd=tmp_path) as job:
        job.wait_for("/s  updates")
        job.launcher.terminate()
        result = job.wait()
    assert result.returncode == 75, result
    assert [path.name for path in tmp_path.iterdir()] == [run_dir.name]
    assert (run_dir / "checkpoints" / "latest").exists(), result
    assert (run_dir / "summary.json").read_text().count('"world_size": 2') == 1


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_exit_code_2_of_hvdqn_is_passed_on(words: list[str]) -> None:
    result = run(*words, "-np", "2", "--", "--preset", "smoky")
    assert result.returncode == 2, result
    assert result.stderr.count("unknown preset 'smoky'") == 1, result
    assert "Traceback" not in result.stderr + result.stdout, result


@pytest.mark.parametrize("launcher", ["horovodrun-gloo", "torchrun"])  # mpirun does it by itself
def test_the_exit_code_names_the_signal_that_killed_a_rank(launcher: str, tmp_path: Path) -> None:
    with start([*RUNS[launcher], "-np", "2", "--", *ENDLESS, "--run-dir", str(tmp_path)]) as job:
        job.wait_for("/s  updates")
        job.ranks()[1].kill()
        result = job.wait()
    assert result.returncode == 137, result
    assert result.seconds < 120


def test_a_whole_command_and_a_variable() -> None:
    program = "import os, sys; print(sys.argv[1], os.environ['COLOUR'], 'EDITOR' in os.environ)"
    words = ["mpirun.sh", "-np", "1", "-x", "COLOUR", "--", sys.executable, "-c", program, "a 'b' \"c\""]
    result = run(*words, COLOUR="dark blue", EDITOR="ed")
    assert result.returncode == 0, result
    assert result.stdout == "a 'b' \"c\" dark blue False\n"


def test_variables_named_like_secrets_are_not_on_command_lines() -> None:
    names = ("HVDQN_token", "SLURM_JWT", "HVDQN_COLOUR", "NCCL_IB_PKEY")
    program = f"import os; print(*(name for name in {names} if name in os.environ))"
    result = run("mpirun.sh", "-np", "1", "--", sys.executable, "-c", program, **dict.fromkeys(names, "x"))
    assert result.returncode == 0, result
    assert result.stdout == "HVDQN_COLOUR NCCL_IB_PKEY\n"


def test_torchrun_does_not_contact_hosts_without_ranks() -> None:
    program = "import os; print(os.environ['WORLD_SIZE'], 'rank')"
    hosts = ["--hosts", "localhost:1,nowhere.invalid:1", "-np", "1"]
    result = run("torchrun.sh", *hosts, "--", sys.executable, "-c", program)
    assert result.returncode == 0, result
    assert result.stdout == "1 rank\n"


def test_torchrun_needs_a_first_host_that_the_others_can_find() -> None:
    result = run("torchrun.sh", "--hosts", "localhost:1,nowhere.invalid:1", "--", "true")
    assert result.returncode == 2, result
    assert "cannot find the first one as 'localhost'; give the name by which they know it" in result.stderr
