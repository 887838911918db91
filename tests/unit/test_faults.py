"""Signals, the watchdog and the replica check in one process; tests/distributed/test_faults.py tests them on ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from hvdqn.comm import connect
from hvdqn.errors import DriftError, UserError
from hvdqn.faults import Heartbeat, Watchdog, check_replicas, raise_on_all_ranks, why_stalled
from hvdqn.metrics import PhaseTimer

PATIENCE_SECONDS = 8.0


def beat(phase: str, idle: float, age: float = 0.5) -> Heartbeat:
    return Heartbeat(phase, idle, age)


@pytest.mark.parametrize(
    ("beats", "causes"),
    [
        pytest.param(
            [beat("comm", 9), beat("env", 9, age=9)], ["rank 1 does not answer for 9 s"], id="silent"
        ),
        pytest.param([beat("comm", 9), None], ["rank 1 does not answer"], id="never seen"),
        pytest.param(
            [beat("comm", 9), beat("env", 9)], ["rank 1 hangs in phase 'env' for 9 s"], id="hanging"
        ),
        pytest.param(
            [beat("env", 9), beat("comm", 9), beat("env", 20)],
            ["rank 0 hangs in phase 'env' for 9 s", "rank 2 hangs in phase 'env' for 20 s"],
            id="two hang",
        ),
        pytest.param(
            [beat("comm", 9), beat("env", 9), beat("env", 9, age=9)],
            ["rank 2 does not answer"],
            id="a silent rank explains the ones that hang",
        ),
        pytest.param([beat("comm", 9), beat("comm", 9)], ["every rank waits for the others"], id="deadlock"),
        pytest.param([beat("comm", 900), beat("env", 3)], [], id="waiting for a slow rank"),
        pytest.param([beat("comm", 900), beat("comm", 1)], [], id="a rank that began to wait just now"),
        pytest.param([beat("env", 9)], ["rank 0 hangs in phase 'env' for 9 s"], id="alone"),
    ],
)
def test_which_ranks_are_named_for_a_stall(beats, causes):
    found = why_stalled(beats, PATIENCE_SECONDS)
    assert len(found) == len(causes)
    for clause, expected in zip(found, causes, strict=True):
        assert clause.startswith(expected)


class Alone:
    """A comm that only records that `abort` was called."""

    rank, size = 0, 1

    def __init__(self):
        self.aborted = threading.Event()

    def abort(self, code):
        self.aborted.set()


def test_watchdog_ends_a_stalled_job_and_prints_the_reason(tmp_path, capfd):
    comm, timer = Alone(), PhaseTimer()
    timer.start("env")
    began = time.monotonic()
    dog = Watchdog(tmp_path / "heartbeats", comm, timer, timeout_seconds=1.0)
    assert comm.aborted.wait(30)
    assert time.monotonic() - began > 0.7
    assert "(--stall-timeout 1): rank 0 hangs in phase 'env'" in capfd.readouterr().err
    dog.close()


def test_watchdog_does_not_end_a_job_that_makes_progress_and_removes_its_files(tmp_path):
    comm, timer = Alone(), PhaseTimer()
    dog = Watchdog(tmp_path / "heartbeats", comm, timer, timeout_seconds=1.0)
    for _ in range(30):
        time.sleep(0.05)
        timer.alive()
    assert (tmp_path / "heartbeats" / "rank-00000.json").exists()
    dog.close()
    assert not comm.aborted.is_set()
    assert not (tmp_path / "heartbeats").exists()


def test_a_job_suspended_as_a_whole_has_not_stalled(tmp_path, monkeypatch):
    """After SIGSTOP and SIGCONT to all ranks, every clock has advanced by hours."""
    comm, timer = Alone(), PhaseTimer()
    timer.start("env")
    away, clock = 0.0, time.monotonic
    monkeypatch.setattr("hvdqn.faults.watchdog.time.monotonic", lambda: clock() + away)
    dog = Watchdog(tmp_path / "heartbeats", comm, timer, timeout_seconds=8.0)
    time.sleep(1.2)
    away = 10_000.0
    assert not comm.aborted.wait(1.5)
    dog.close()


@pytest.mark.parametrize(
    ("requested", "agreed", "phase", "age_seconds", "ends"),
    [
        pytest.param(True, False, "env", 60, True, id="the other rank is silent"),
        pytest.param(True, False, "env", -60, False, id="the other rank lives"),
        pytest.param(True, False, "save", 60, False, id="the other rank writes a checkpoint to a slow disk"),
        pytest.param(True, True, "env", 60, False, id="both have agreed to stop and write a checkpoint"),
        pytest.param(False, False, "env", 60, False, id="not asked to stop"),
    ],
)
def test_a_rank_that_was_asked_to_stop_does_not_wait_long_for_a_silent_rank(
    requested, agreed, phase, age_seconds, ends, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("hvdqn.faults.watchdog.STOP_PATIENCE_SECONDS", 1.5)
    comm, timer = Alone(), PhaseTimer()
    comm.size = 2
    timer.start("comm")
    other = tmp_path / "rank-00001.json"
    other.write_text(f'{{"phase": "{phase}", "idle_seconds": 0}}')
    then = time.time() - age_seconds
    os.utime(other, (then, then))
    stop = SimpleNamespace(requested=requested, all_ranks_agreed=agreed)
    dog = Watchdog(tmp_path, comm, timer, timeout_seconds=600.0, stop=stop)
    assert comm.aborted.wait(30 if ends else 3) == ends
    assert ("s after a signal to stop: rank 1 does not answer for 6" in capfd.readouterr().err) == ends
    dog.close()


def test_a_timeout_of_zero_disables_the_watchdog(tmp_path):
    dog = Watchdog(tmp_path / "heartbeats", Alone(), PhaseTimer(), timeout_seconds=0.0)
    dog.close()
    assert not (tmp_path / "heartbeats").exists()


BLOCKED = """
import ctypes, os
from hvdqn.faults import StopSignal
stop = StopSignal()
print("ready", flush=True)
mutex = ctypes.create_string_buffer(64)
library = ctypes.CDLL(None)
library.pthread_mutex_lock(mutex)
library.pthread_mutex_lock(mutex)  # like a collective whose peer is gone: no Python code runs any more
"""


def test_a_second_interrupt_ends_a_rank_that_is_blocked_in_a_library():
    with subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            process.send_signal(number)
            time.sleep(0.3)
            assert process.poll() is None, "it still has to write a checkpoint"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 128 + signal.SIGINT


def test_a_signal_that_an_environment_handles_does_not_stop_the_run():
    code = (
        "import os, signal, time; from hvdqn.faults import StopSignal\n"
        "stop = StopSignal(); signal.signal(signal.SIGALRM, lambda *_: print('handled'))\n"
        "signal.alarm(1); time.sleep(2)\n"
        "print(stop.requested); os.kill(os.getpid(), signal.SIGUSR2); time.sleep(0.5); print(stop.name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["handled", "False", "SIGUSR2"]


def test_the_drift_error_names_the_ranks():
    check_replicas([], 100)
    with pytest.raises(DriftError, match="at env step 100 the weights of rank 1, 3 differ"):
        check_replicas([1, 3], 100)


def test_wrong_input_on_one_rank_raises_on_all_ranks():
    class Second(type(connect("local"))):
        def all_gather_object(self, obj):
            assert timer.phase == "comm"  # the watchdog must see that this rank waits
            return [None, "rank 1 found no such environment"]

    timer = PhaseTimer()
    with pytest.raises(UserError, match="rank 1 found no such environment"):
        raise_on_all_ranks(Second(), lambda: 1, timer)
    assert raise_on_all_ranks(connect("local"), lambda: 1) == 1
