"""Signals in a process that has children, in a notebook, and beside environments with handlers of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hvdqn import train
from hvdqn.comm import kill_descendants
from hvdqn.config import EnvironmentConfig
from hvdqn.envs import Environments, make_environments
from hvdqn.faults import StopSignal, reinstall_handlers
from hvdqn.process import flushes_denormals

ENVS = "tests.unit.unruly_envs"
SMALL = ["--preset", "smoke", "--total-env-steps", "400", "--eval-episodes", "2", "--envs-per-rank", "2"]


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    with closing(StopSignal(own_process=False)) as stop:
        yield stop


def make(env: str, kwargs: str = "{}", vectorization: str = "sync") -> Environments:
    config = EnvironmentConfig(env=f"{ENVS}:{env}", env_kwargs=kwargs, vectorization=vectorization)
    return make_environments(config, 2, seed=1, training=True)


def actions(envs: Environments) -> NDArray[np.int64]:
    return np.ones(envs.num_envs, np.int64)


def wait_until_requested(stop: StopSignal) -> bool:
    deadline = time.monotonic() + 10
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    return stop.requested


# --- forked children


def started(target: object = time.sleep, *args: object) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=target, args=args or (60,), daemon=True)
    process.start()
    return process


def test_terminate_ends_a_forked_child_and_the_parent_does_not_take_its_signal(stop: StopSignal) -> None:
    child = started()
    child.terminate()  # mostly before it has run at all
    child.join(10)
    late = started()
    time.sleep(0.3)
    late.terminate()
    late.join(10)
    assert (child.exitcode, late.exitcode) == (-signal.SIGTERM, -signal.SIGTERM)
    time.sleep(0.2)
    assert not stop.requested


def test_a_control_c_that_reaches_a_forked_child_is_the_ranks(stop: StopSignal) -> None:
    child = started()
    os.kill(child.pid, signal.SIGINT)
    os.kill(child.pid, signal.SIGUSR2)
    child.join(0.5)
    assert child.is_alive()
    assert not stop.requested
    child.kill()
    child.join(10)


def test_signals_still_reach_the_parent_after_a_fork(stop: StopSignal) -> None:
    started().kill()
    os.kill(os.getpid(), signal.SIGTERM)
    assert wait_until_requested(stop)
    assert stop.name == "SIGTERM"


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_environments_may_have_helper_processes(stop: StopSignal, vectorization: str) -> None:
    def play() -> None:
        with closing(make("Helped-v0", vectorization=vectorization)) as envs:
            envs.reset()
            envs.step(actions(envs))
            assert envs.step(actions(envs)).observation[0, 0] == pytest.approx(0.2)

    played = []
    thread = threading.Thread(target=lambda: played.append(play()), daemon=True)
    thread.start()
    thread.join(60)
    kill_descendants()
    assert played, "close hangs"
    assert not stop.requested


def test_a_helper_that_is_left_does_not_keep_a_finished_job(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hvdqn.train", *SMALL, "--run-dir", str(tmp_path / "run")]
    flags = ["--env", f"{ENVS}:Helped-v0", "--env-kwargs", '{"left": true}']
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr


# --- a notebook


def process_state() -> tuple[object, ...]:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    return handlers, descriptor, torch.get_num_threads(), flushes_denormals()


def test_a_program_that_trains_has_its_process_back_afterwards(tmp_path: Path) -> None:
    before = process_state()
    torch.set_flush_denormal(False)
    torch.set_num_threads(2)
    assert train.main([*SMALL, "--run-dir", str(tmp_path)]) == 0
    assert process_state() == (before[0], before[1], 2, False)
    torch.set_num_threads(before[2])
    torch.set_flush_denormal(before[3])


def test_a_program_may_train_in_a_thread(tmp_path: Path) -> None:
    before, codes = process_state(), []
    thread = threading.Thread(
        target=lambda: codes.append(train.main([*SMALL, "--run-dir", str(tmp_path)])), daemon=True
    )
    thread.start()
    thread.join(120)
    assert codes == [0]
    assert process_state() == before


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_program_goes_on_after_an_environments_exception(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], vectorization: str
) -> None:
    flags = ["--env", f"{ENVS}:Losing-v0", "--env-kwargs", '{"how": "two arguments"}']
    workers = set(multiprocessing.active_children())
    code = train.main([*SMALL, *flags, "--vectorization", vectorization, "--run-dir", str(tmp_path)])
    assert code == 1
    assert capfd.readouterr().err.count("TwoArgumentsError: 1 and 2") == 1
    deadline = time.monotonic() + 10
    while left := set(multiprocessing.active_children()) - workers:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_second_control_c_interrupts_a_notebook_and_leaves_it(stop: StopSignal) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    assert wait_until_requested(stop)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


# --- environments with handlers of their own


@pytest.mark.parametrize("how", ["default", "own", "wakeup"])
def test_an_environments_signal_handlers_are_replaced_with_a_warning(
    stop: StopSignal, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(make("Handling-v0", f'{{"how": "{how}"}}')), closing(make("Handling-v0")):
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait_until_requested(stop)
    warnings = [record.getMessage() for record in caplog.records if "has changed how" in record.getMessage()]
    assert len(warnings) == 1
    assert ("signals:" if how == "wakeup" else "SIGTERM, SIGINT:") in warnings[0]


def test_handlers_that_a_step_sets_are_replaced_at_the_next_check(stop: StopSignal) -> None:
    with closing(make("Handling-v0", '{"late": true}')) as envs:
        envs.reset()
        envs.step(actions(envs))
        reinstall_handlers()
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait_until_requested(stop)
