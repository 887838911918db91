"""Real faults in runs under real launchers, as README's table describes them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.runs import (
    STOPPED,
    TIMEOUT_SECONDS,
    begin,
    saved,
    summary,
    train,
    wait_for_checkpoint,
)
from tests.launchers import Job

pytestmark = pytest.mark.distributed

ENDLESS = ("--total-env-steps", "100000000")
LIMIT_SECONDS = 30.0
STALL_TIMEOUT_SECONDS = 12.0
# A busy machine may hold up the thread that watches.
SLACK_SECONDS = 10.0


def seconds_since(began: float, what: str) -> float:
    """Return the seconds since `began`, and print them (shown by pytest -rP)."""
    seconds = time.monotonic() - began
    print(f"{what}: {seconds:.1f} s")
    return seconds


def sabotage(name: str) -> tuple[str, str]:
    return ("--wrapper", f"tests.distributed.sabotage:{name}")


# --- signals


def before_learning(launcher: str, np: int, run_dir: Path) -> Job:
    replay = ("--learning-starts", "1000000", "--replay-capacity", "2000000")
    job = begin(launcher, np, run_dir, *ENDLESS, *replay, "--checkpoint-every", "0")
    job.wait_until(lambda: '"env_steps": 208' in metrics(run_dir), "training has begun")
    return job


def while_learning(launcher: str, np: int, run_dir: Path) -> Job:
    job = begin(launcher, np, run_dir, *ENDLESS, "--checkpoint-every", "0")
    job.wait_until(lambda: '"loss": 0' in metrics(run_dir), "learning has begun")
    return job


def while_evaluating(launcher: str, np: int, run_dir: Path) -> Job:
    job = begin(
        launcher, np, run_dir, "--checkpoint-every", "0", "--eval-every", "400", "--eval-episodes", "100000"
    )
    job.wait_until(lambda: '"env_steps": 400' in metrics(run_dir), "an evaluation is under way")
    return job


def while_starting(launcher: str, np: int, run_dir: Path) -> Job:
    job = begin(launcher, np, run_dir, *sabotage("slow_to_build"))
    job.wait_until((run_dir / "heartbeats").exists, "the environments are being built")
    return job


def metrics(run_dir: Path) -> str:
    file = run_dir / "metrics.jsonl"
    return file.read_text(encoding="utf-8") if file.exists() else ""


@pytest.mark.parametrize(
    ("launcher", "moment", "number", "to"),
    [
        ("mpirun", before_learning, signal.SIGTERM, [1]),
        ("horovodrun-gloo", while_learning, signal.SIGUSR2, [0, 1]),
        ("torchrun", while_evaluating, signal.SIGTERM, [0]),
        ("horovodrun-mpi", while_starting, signal.SIGTERM, [0, 1]),
    ],
)
def test_a_signal_ends_all_ranks_after_one_checkpoint(tmp_path, launcher, moment, number, to):
    with moment(launcher, 2, tmp_path) as job:
        ranks = job.ranks()
        sent = time.monotonic()
        for rank in to:
            ranks[rank].send_signal(number)
        result = job.wait()
        seconds = seconds_since(sent, f"{launcher}, {number.name} to end")
    assert result.returncode == STOPPED[launcher], result
    assert seconds < LIMIT_SECONDS, result
    assert re.search(r"(status code|exit code:|exitcode *:|exit code: *) *75", str(result), re.IGNORECASE), (
        result
    )
    assert len(saved(tmp_path)) == 1, result
    assert summary(tmp_path)["stopped_by"] == "signal"
    assert saved(tmp_path) == [summary(tmp_path)["env_steps"]]
    assert result.stdout.count("stopped by a signal") == 1


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(tmp_path):
    result = train("mpirun", 2, tmp_path, *ENDLESS, *sabotage("signalled_while_writing"))
    assert result.returncode == 75, result
    first, second = saved(tmp_path)
    assert first <= 1008
    assert second - first <= 3 * 16, "the vote travels with the next update"


def test_control_c_in_a_terminal_stops_after_a_checkpoint(tmp_path):
    """By default Open MPI's launcher kills its ranks one second after Ctrl-C; this variable sets another delay."""
    patience = {"OMPI_MCA_odls_base_sigkill_timeout": "8"}
    with begin("mpirun", 2, tmp_path, *ENDLESS, **patience) as job:
        wait_for_checkpoint(job, tmp_path, 1000)
        os.killpg(job.launcher.pid, signal.SIGINT)
        result = job.wait()
    assert result.returncode == 1, result  # mpirun's own code, whatever the codes of its ranks
    assert summary(tmp_path)["stopped_by"] == "signal"
    assert max(saved(tmp_path)) == summary(tmp_path)["env_steps"]


def test_control_c_twice_exits_at_once(tmp_path):
    with while_starting("python", 1, tmp_path) as job:
        os.killpg(job.launcher.pid, signal.SIGINT)
        time.sleep(0.5)
        os.killpg(job.launcher.pid, signal.SIGINT)
        pressed = time.monotonic()
        result = job.wait()
        assert seconds_since(pressed, "second Ctrl-C to end") < SLACK_SECONDS, result
    assert result.returncode == 130, result  # not 75: it did not wait for a checkpoint
    assert saved(tmp_path) == []


# --- ranks that die or hang


@pytest.mark.parametrize(
    ("launcher", "victim"), [("horovodrun-gloo", 1), ("horovodrun-mpi", 0), ("mpirun", 1), ("torchrun", 0)]
)
def test_a_killed_rank_ends_the_job_and_the_next_start_resumes(tmp_path, launcher, victim):
    with begin(launcher, 2, tmp_path, *ENDLESS) as job:
        wait_for_checkpoint(job, tmp_path, 1000)
        job.ranks()[victim].kill()
        killed = time.monotonic()
        result = job.wait()  # fails if any process is left
        assert seconds_since(killed, f"{launcher}, kill -9 to end") < LIMIT_SECONDS, result
    assert result.returncode not in (0, 75), result
    newest = max(saved(tmp_path))
    began = time.monotonic()
    result = train("mpirun", 2, tmp_path, "--total-env-steps", str(newest + 200), "--resume", "must")
    seconds_since(began, "a start that resumes, to its end 200 env steps later")
    assert result.returncode == 0, result
    assert f"at env step {newest:,}" in result.stdout, result
    assert summary(tmp_path)["env_steps"] >= newest + 200


def ends_by_watchdog(job: Job, began: float, *messages: str) -> None:
    job.wait_for("--stall-timeout")
    found = seconds_since(began, f"hang to message, --stall-timeout {STALL_TIMEOUT_SECONDS:g}")
    assert found < STALL_TIMEOUT_SECONDS + SLACK_SECONDS, job.output()
    result = job.wait()
    seconds_since(began, "hang to end")
    assert result.returncode not in (0, 75), result
    assert result.stderr.count("--stall-timeout") == 1, result
    for message in messages:
        assert message in result.stderr, result


@pytest.mark.parametrize("launcher", ["horovodrun-gloo", "mpirun"])
def test_a_stopped_rank_is_named_and_the_job_ends(tmp_path, launcher):
    with begin(launcher, 2, tmp_path, *ENDLESS, "--stall-timeout", f"{STALL_TIMEOUT_SECONDS:g}") as job:
        wait_for_checkpoint(job, tmp_path, 1000)
        job.ranks()[1].suspend()
        ends_by_watchdog(job, time.monotonic(), "rank 1 does not answer", "rank 0 is in phase 'comm'")


@pytest.mark.parametrize(
    ("launcher", "fault", "message"),
    [
        ("torchrun", "hangs", "rank 1 hangs in phase 'env'"),
        ("mpirun", "hangs_while_built", "rank 1 hangs in phase 'other'"),
    ],
)
def test_a_rank_that_hangs_in_its_environment_is_named(tmp_path, launcher, fault, message):
    flags = (*sabotage(fault), "--stall-timeout", f"{STALL_TIMEOUT_SECONDS:g}")
    with begin(launcher, 2, tmp_path, *ENDLESS, *flags) as job:
        job.wait_for("hanging now")
        ends_by_watchdog(job, time.monotonic(), message)


@pytest.mark.parametrize("launcher", ["horovodrun-gloo", "mpirun", "torchrun"])
def test_an_exception_on_one_rank_is_printed_once_and_ends_the_job(tmp_path, launcher):
    result = train(launcher, 2, tmp_path, *ENDLESS, *sabotage("bug"))
    assert result.returncode not in (0, 2, 75), result
    assert result.seconds < TIMEOUT_SECONDS / 2
    assert result.stderr.count("RuntimeError: the environment of this rank broke") == 1, result
    assert len(re.findall(r"rank \d of 2 failed: Traceback", result.stderr)) == 1, result
    assert "rank 1 of 2 failed: Traceback" in result.stderr, result


@pytest.mark.parametrize("launcher", ["horovodrun-gloo", "mpirun"])
def test_sys_exit_on_one_rank_is_an_exception(tmp_path, launcher):
    result = train(launcher, 2, tmp_path, *ENDLESS, *sabotage("leaves"))
    assert result.returncode not in (0, 2, 75), result
    assert result.seconds < TIMEOUT_SECONDS / 2
    assert result.stderr.count("RuntimeError: the environment raised sys.exit(0)") == 1, result
    assert "rank 1 of 2 failed: Traceback" in result.stderr, result


# --- wrong numbers


@pytest.mark.parametrize("fault", ["nan_reward", "inf_reward", "nan_observation", "nan_gradient"])
def test_all_ranks_skip_an_update_that_is_not_finite_on_one_rank(tmp_path, fault):
    result = train("mpirun", 2, tmp_path, *sabotage(fault), "--total-env-steps", "1000")
    assert result.returncode == 0, result
    # Transitions that are not finite are never sampled.
    assert summary(tmp_path)["skipped_updates"] == (3 if fault == "nan_gradient" else 0)
    assert (summary(tmp_path)["discarded_transitions"] == 0) == (fault == "nan_gradient")
    assert summary(tmp_path)["eval_return_mean"] > 0  # every target sync found the ranks equal


def test_updates_that_stay_not_finite_end_the_run_and_name_the_rank(tmp_path):
    result = train("torchrun", 2, tmp_path, *ENDLESS, *sabotage("nan_rewards"))
    assert result.returncode == 1, result
    assert (
        result.stderr.count("10 updates in a row had a gradient that is not finite; it began on rank 1") == 1
    )
    assert "hvdqn/learner.py" not in result.stderr, result


def test_a_flipped_bit_is_found_at_the_next_target_sync_and_its_rank_named(tmp_path):
    result = train("mpirun", 3, tmp_path, *ENDLESS, *sabotage("flipped_bit"))
    assert result.returncode == 1, result
    found = re.findall(r"at env step (\d+) the weights of rank 1 differ from the other ranks'", result.stderr)
    assert len(found) == 1, result
    # 3 ranks make one update every 12 env steps from 200 on, the 20th at 440. The target is synced every 200 env steps.
    assert int(found[0]) == 600, result
    assert saved(tmp_path) == []


# --- unequal ranks; different settings on ranks are in test_wrong_input.py


def test_a_slow_rank_with_a_wrong_clock_changes_only_the_speed(tmp_path):
    flags = ("--total-env-steps", "600", "--vectorization", "sync")
    even, uneven = tmp_path / "even", tmp_path / "uneven"
    result = train("torchrun", 2, even, *flags)
    assert result.returncode == 0, result
    result = train("torchrun", 2, uneven, *flags, *sabotage("ten_times_slower"))
    assert result.returncode == 0, result
    assert "rank 1 is the slowest" in result.stdout, result
    assert summary(uneven)["param_sha256"] == summary(even)["param_sha256"]
    fast, slow = summary(uneven)["rank_env_steps_per_second"]
    assert fast > 2 * slow


# --- disks


def test_a_disk_that_one_rank_cannot_write_to_costs_checkpoints_and_not_the_run(tmp_path):
    result = train("mpirun", 2, tmp_path, "--total-env-steps", "3008", *sabotage("full_disk"))
    assert result.returncode == 0, result
    assert result.stdout.count("the one before stands: rank 1: [Errno 27] File too large") == 2, result
    assert summary(tmp_path)["failed_checkpoints"] == 2
    assert saved(tmp_path) == [1008]


def test_a_folder_removed_while_it_is_written_costs_a_checkpoint_and_not_the_run(tmp_path):
    result = train("torchrun", 2, tmp_path, "--total-env-steps", "3008", *sabotage("removed_directory"))
    assert result.returncode == 0, result
    assert result.stdout.count("could not be written, the one before stands") == 1, result
    assert summary(tmp_path)["failed_checkpoints"] == 1
    assert saved(tmp_path) == [3008]


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no small disk can be mounted here, so a full disk is NOT tested: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_costs_checkpoints_and_not_the_run(small_disk):
    flags = ("--checkpoint-replay", "yes")  # `auto` would leave it out here
    result = train("mpirun", 2, small_disk, *flags)
    assert result.returncode == 0, result
    assert "No space left on device" in result.stdout, result
    assert saved(small_disk) == [1008]
    assert summary(small_disk)["failed_checkpoints"] == 2
    result = train("mpirun", 2, small_disk, *flags, "--resume", "must")
    assert result.returncode == 0, result
    assert "at env step 1,008" in result.stdout
