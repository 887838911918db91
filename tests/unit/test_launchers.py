"""Tests of tests/launchers.py: it must fail the test when a job hangs or leaves processes behind."""

from __future__ import annotations

import psutil
import pytest

from tests.launchers import clean_environment, launch, start

CHILD = "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); print('started', flush=True)"


def test_result_of_one_process() -> None:
    result = launch(
        "python", 1, ["-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"], 20
    )
    assert (result.returncode, result.stdout, result.stderr) == (3, "out\n", "err\n")


def test_a_process_left_behind_fails_the_test_and_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.launchers._GRACE_SECONDS", 0.2)
    job = start("python", 1, ["-c", CHILD], timeout=20)
    with job, pytest.raises(AssertionError, match=r"left behind by the job:\n\d+: sleep 60"):
        job.wait()
    assert job.alive() == []


def test_a_timeout_fails_the_test_and_kills_all() -> None:
    job = start("python", 1, ["-c", f"{CHILD}; child.wait()"], timeout=0.5)
    with job, pytest.raises(AssertionError, match=r"killed after 0.5 s: it was still running"):
        job.wait()
    assert job.alive() == []


def test_leaving_the_block_kills_all() -> None:
    with start("python", 1, ["-c", f"{CHILD}; child.wait()"], timeout=20) as job:
        job.wait_for("started")
        assert list(job.ranks()) == [0]
        assert len(job.alive()) == 2
    assert job.alive() == []


def test_a_job_does_not_outlive_a_test_run_that_is_killed() -> None:
    inner = "from tests.launchers import start; job = start('python', 1, ['-c', 'import time; time.sleep(60)'], 90)"
    outer = f"{inner}; print(job.launcher.pid, flush=True); job.wait()"
    with start("python", 1, ["-c", outer], timeout=20) as job:
        job.wait_for("\n")
        child = psutil.Process(int(job.output()))
        job.launcher.kill()
        child.wait(timeout=5)


def test_waiting_for_output_fails_when_the_job_ends() -> None:
    with (
        start("python", 1, ["-c", "print('something else')"], timeout=20) as job,
        pytest.raises(AssertionError, match="ended before it had printed 'started'"),
    ):
        job.wait_for("started")


def test_clean_environment_has_no_variables_of_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOROVOD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "SLURM_PROCID", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
        assert name not in clean_environment()
