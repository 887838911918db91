"""The run directory: made, visible to all ranks, locked against other jobs."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hvdqn import run_directory
from hvdqn.comm.local import LocalComm
from hvdqn.config import Config
from hvdqn.errors import UserError
from hvdqn.run_directory import open_run_dir, record_config, set_aside, sole_job


def test_runs_that_begin_in_the_same_second_do_not_share_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directory.time, "strftime", lambda _: "now")
    made = [open_run_dir(Config(), LocalComm()).name for _ in range(3)]
    assert made == ["CartPole_v1-seed1-now", "CartPole_v1-seed1-now-2", "CartPole_v1-seed1-now-3"]
    named = Config().replace(run_dir="mine")
    assert open_run_dir(named, LocalComm()) == open_run_dir(named, LocalComm()) == tmp_path / "mine"


def test_the_check_that_all_ranks_see_the_run_directory_leaves_nothing_behind(tmp_path: Path) -> None:
    run_dir = open_run_dir(Config().replace(run_dir=str(tmp_path / "run")), LocalComm())
    assert list(run_dir.iterdir()) == []


def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = Config().replace(run_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"cannot write to the run directory '{tmp_path}/file': File exists"):
        open_run_dir(config, LocalComm())


# config.yaml


def test_a_config_that_cannot_be_written_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record_config(Config(), LocalComm(), tmp_path / "missing")
    captured = capsys.readouterr()
    assert captured.out.startswith("warning: config.yaml could not be written: [Errno 2]")
    assert captured.out.count("\n") == 1
    assert captured.err == ""


def test_set_aside_finds_a_free_name_and_ignores_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert set_aside(path) == ""
    path.touch()
    assert set_aside(path) == ""
    for expected in ("metrics.jsonl.old", "metrics.jsonl.old2", "metrics.jsonl.old3"):
        path.write_text(expected)
        assert set_aside(path) == expected
        assert (tmp_path / expected).read_text() == expected
        assert not path.exists()


# The lock


def test_two_jobs_do_not_train_in_one_directory(tmp_path):
    with sole_job(tmp_path, LocalComm()):
        assert (tmp_path / "lock").exists()
        with (
            pytest.raises(UserError, match=f"another job trains in '{tmp_path}'; .* another --run-dir"),
            sole_job(tmp_path, LocalComm(), patience_seconds=0.0),
        ):
            raise AssertionError("the second job was not refused")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, code):
    def refuse(*_):
        raise OSError(code, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with sole_job(tmp_path, LocalComm()):
        pass
    warning = (
        f"warning: the file system of '{tmp_path}' has no locks: make sure that no second job trains there\n"
    )
    assert capsys.readouterr() == (warning, "")


def test_a_job_that_lost_ranks_while_it_locked_holds_no_lock(tmp_path, monkeypatch):
    def lost(_):
        raise ConnectionError

    comm = LocalComm()
    monkeypatch.setattr(comm, "all_gather_object", lost)
    with pytest.raises(ConnectionError), sole_job(tmp_path, comm):
        raise AssertionError("it went on")
    with sole_job(tmp_path, LocalComm(), patience_seconds=0.0):
        pass


def test_a_job_waits_for_one_that_is_ending(tmp_path):
    """The kernel releases the lock of a process that is killed."""
    code = (
        "import sys, time, pathlib; from hvdqn.comm.local import LocalComm\n"
        "from hvdqn.run_directory import sole_job\n"
        "with sole_job(pathlib.Path(sys.argv[1]), LocalComm()): print('held', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        threading.Timer(0.5, other.kill).start()
        with sole_job(tmp_path, LocalComm()):
            assert other.wait(timeout=10) == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


def test_jobs_that_wait_for_the_lock_get_it_one_at_a_time(tmp_path):
    """Each removes the lock file when it ends; nobody may lock a file that was removed meanwhile."""
    inside, most = 0, 0
    guard = threading.Lock()

    def job() -> None:
        nonlocal inside, most
        with sole_job(tmp_path, LocalComm(), patience_seconds=30.0):
            with guard:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.01)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=job) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not list(tmp_path.iterdir())
