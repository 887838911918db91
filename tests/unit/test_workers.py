"""Worker processes of async vectors: how their ends are reported, and that none stays behind."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from hvdqn.config import EnvironmentConfig
from hvdqn.envs import Environments, make_environments

ENVS = "tests.unit.unruly_envs"


def make(how: str) -> Environments:
    config = EnvironmentConfig(
        env=f"{ENVS}:Losing-v0", env_kwargs=f'{{"how": "{how}"}}', vectorization="async"
    )
    return make_environments(config, 2, seed=1, training=True)


def gone(processes: list[psutil.Process]) -> bool:
    """Return True once all these processes have ended, within ten seconds."""
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "kill",
            "the worker process of env [01] was killed by SIGKILL; the machine may have run out of memory",
        ),
        ("end", "the worker process of env [01] ended with exit code 0"),
        ("exit", r"(?s)in env [01] and 1 more: Traceback.*the environment raised sys.exit\(0\)"),
        ("two arguments", "(?s)in env [01] and 1 more: Traceback.*TwoArgumentsError: 1 and 2"),
        ("local", "(?s)in env [01] and 1 more: Traceback.*LocalError: no pickle"),
    ],
)
def test_the_error_says_how_a_worker_ended(how: str, message: str) -> None:
    with closing(make(how)) as envs:
        workers = [psutil.Process(process.pid) for process in envs._vector.processes]
        envs.reset()
        envs.step(np.zeros(2, np.int64))
        envs.step(np.zeros(2, np.int64))
        with pytest.raises(RuntimeError, match=message):
            envs.step(np.zeros(2, np.int64))
    assert gone(workers)


def test_an_environment_that_cannot_be_made_here_is_not_taken_for_a_lost_worker() -> None:
    with pytest.raises(RuntimeError, match=r"FileNotFoundError: no such level: maze\.dat"):
        make("no file")


def test_a_process_that_dies_while_it_reads_the_spaces_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"process that reads .* spaces was killed by SIGKILL"):
        make("killed when made")


ABORTS = """
import multiprocessing, signal, subprocess, sys, time
from hvdqn.comm import LocalComm

def work(pipe):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe.send(subprocess.Popen(["sleep", "1000"]).pid)
    time.sleep(1000)

if __name__ == "__main__":
    pipe, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=work, args=(theirs,))
    worker.start()
    print(worker.pid, pipe.recv(), flush=True)
    LocalComm().abort(3)
"""


def test_an_abort_kills_workers_and_what_they_have_started() -> None:
    # A child that was left would keep the pipe of standard output open.
    done = subprocess.run(
        [sys.executable, "-c", ABORTS], stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert done.returncode == 3
    for pid in map(int, done.stdout.split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_watchdog_leaves_no_worker_behind_that_hangs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hvdqn.train", "--preset", "smoke", "--run-dir", str(tmp_path / "run")]
    command += ["--env", f"{ENVS}:Losing-v0", "--env-kwargs", '{"how": "hang"}']
    command += ["--vectorization", "async", "--envs-per-rank", "2", "--stall-timeout", "4"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "rank 0 hangs in phase 'env'" in done.stderr
    assert time.monotonic() - began < 60
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])
    ]
