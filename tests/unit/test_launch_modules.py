"""The Python modules that the scripts in launch/ run, without any launcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvdqn.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_JOB_FAILED, EXIT_REQUEUE, EXIT_USER_ERROR
from hvdqn.launchers import horovod_build, horovodrun, quickstart, torchrun
from hvdqn.launchers.remote_hosts import remote_hosts
from tests.launchers import REPOSITORY, clean_environment

MODULES = sorted(
    f"hvdqn.launchers.{path.stem}" for path in (REPOSITORY / "hvdqn" / "launchers").glob("[a-z]*.py")
)
FAILURE = "The first process to do so was:\nProcess name: {rank}\nExit code: {code}\n"


@pytest.mark.parametrize("module", MODULES)
def test_launchers_start_fast(module: str) -> None:
    """Importing one loads neither torch nor any other part of hvdqn than the exit codes."""
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], env=clean_environment(), capture_output=True, text=True, check=True
    ).stdout.split()
    assert "torch" not in loaded
    assert {name for name in loaded if name.startswith("hvdqn.")} <= {
        "hvdqn.errors",
        "hvdqn.launchers",
        module,
    }


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (FAILURE.format(rank=1, code=2), 2),
        (FAILURE.format(rank=0, code=-9), 137),
        ("no such host", None),
    ],
)
def test_horovodrun_exits_with_the_code_of_the_first_rank_that_failed(message: str, code: int | None) -> None:
    assert horovodrun.exit_code(message) == code


def failure(exitcode: int, timestamp: int) -> SimpleNamespace:
    return SimpleNamespace(exitcode=exitcode, timestamp=timestamp)


def test_torchrun_exits_with_the_code_of_the_first_rank_that_failed() -> None:
    assert torchrun.first_failure({0: failure(1, 20), 1: failure(75, 10)}) == (1, 75)


def test_torchrun_names_the_killed_rank_even_if_another_failed_earlier() -> None:
    assert torchrun.first_failure({0: failure(1, 10), 1: failure(-9, 20)}) == (1, 137)


def test_remote_hosts_are_those_with_other_addresses() -> None:
    assert remote_hosts(["localhost", "nowhere.invalid", "127.0.0.1"]) == ["nowhere.invalid"]


SUMMARY = {
    "env": "CartPole-v1",
    "eval_return_mean": 474.96,
    "eval_return_std": 1.0,
    "eval_episodes": 100,
}


@pytest.mark.parametrize(("min_return", "solved"), [("", True), ("474.96", True), ("475", False)])
def test_quickstart_compares_the_mean_return(
    min_return: str, solved: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    error = quickstart.report(SUMMARY, min_return)
    assert error == (
        ""
        if solved
        else "quickstart.sh: a mean return of 475.0 is below 475, where CartPole-v1 counts as solved"
    )
    expected = "Greedy evaluation  mean 475.0, standard deviation 1.0 over 100 episodes\n"
    assert capsys.readouterr().out == expected


def test_horovod_build_describes_this_environment() -> None:
    import torch

    python, version, cuda, nccl, header, horovod = horovod_build.build_inputs()
    assert python.startswith(f"cp{sys.version_info.major}{sys.version_info.minor}")
    assert version == torch.__version__
    assert cuda == (torch.version.cuda or "")
    assert not nccl or Path(nccl, "include", "nccl.h").exists()
    assert Path(header).name == "Python.h"
    assert horovod


def test_horovod_build_without_torch(tmp_path: Path) -> None:
    """It ends with one line. -S hides the installed packages."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "hvdqn.launchers.horovod_build"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "torch is missing\n")


@pytest.mark.parametrize(
    ("codes", "job"),
    [
        ([EXIT_FINISHED, EXIT_FAILED], EXIT_FINISHED),
        ([EXIT_FAILED, EXIT_REQUEUE], EXIT_REQUEUE),
        ([EXIT_USER_ERROR, EXIT_FINISHED], EXIT_USER_ERROR),
        ([EXIT_JOB_FAILED], EXIT_FAILED),
        ([EXIT_FAILED, -9], None),
    ],
)
def test_the_first_worker_that_ends_by_itself_ends_an_elastic_job(
    codes: list[int], job: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("horovod", reason="no Horovod: the elastic driver is NOT TESTED")
    from hvdqn.elastic.driver import Driver

    calls: list[str] = []
    driver = object.__new__(Driver)
    driver._worker_registry = SimpleNamespace(
        _barrier=SimpleNamespace(abort=lambda: calls.append("abort barrier"))
    )
    monkeypatch.setattr(Driver, "job_exit_code", None)
    monkeypatch.setattr(Driver, "stop", lambda self: calls.append("stop"))
    monkeypatch.setattr(
        Driver.__base__, "_handle_worker_exit", lambda self, *exit_: calls.append(f"worker {exit_[1]}")
    )
    for code in codes:
        driver._handle_worker_exit("slot", code, 0.0)
    assert Driver.job_exit_code == job
    assert calls.count("stop") == (job is not None)
    assert calls.count("abort barrier") >= (job is not None)
    assert [call for call in calls if call.startswith("worker")] == [f"worker {code}" for code in codes]
