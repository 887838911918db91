"""Whole runs under faults with strategies other than averaged gradients: what the tables in docs/ promise for each."""

from __future__ import annotations

import re
import signal
import time

import pytest

from tests.distributed.runs import begin, saved, summary, train, wait_for_checkpoint
from tests.distributed.test_faults import ENDLESS, LIMIT_SECONDS, metrics, sabotage
from tests.distributed.test_resume import SETTINGS, recorded, train_killed

pytestmark = pytest.mark.distributed

PARAMETERS = ("--sync", "parameters", "--sync-every", "7")
SERVER = ("--sync", "server")
# Keeps the other ranks alive when one dies, as mpirun's flag --enable-recovery does.
RECOVERY = {"OMPI_MCA_orte_enable_recovery": "1"}


def test_a_killed_run_with_averaged_weights_ends_as_one_that_was_not_killed(tmp_path):
    """Checkpoints that fall between two averages make the ranks average early; the outer optimizer resumes too."""
    flags = (
        *SETTINGS,
        *PARAMETERS,
        "--outer-lr",
        "0.7",
        "--outer-momentum",
        "0.9",
        "--replay",
        "prioritized",
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with begin("mpirun", 2, whole, *flags) as job:
        output = train_killed("mpirun", 2, killed, flags, [1000])
        result = job.wait()
        assert result.returncode == 0, result
    assert "weights and moments averaged every 7 updates, outer lr 0.7, momentum 0.9" in output
    assert "not bit for bit" not in output
    assert summary(killed)["param_sha256"] == summary(whole)["param_sha256"]
    assert recorded(killed) == recorded(whole)


def test_a_signal_between_averages_stops_all_ranks_at_the_next(tmp_path):
    with begin("torchrun", 2, tmp_path, *ENDLESS, *PARAMETERS, "--checkpoint-every", "0") as job:
        job.wait_until(lambda: '"loss": 0' in metrics(tmp_path), "learning has begun")
        job.ranks()[1].send_signal(signal.SIGTERM)
        result = job.wait()
    assert "exitcode  : 75" in str(result), result
    assert summary(tmp_path)["stopped_by"] == "signal"
    assert saved(tmp_path) == [summary(tmp_path)["env_steps"]]


def test_each_rank_skips_its_own_gradient_that_is_not_finite(tmp_path):
    flags = (*PARAMETERS, *sabotage("nan_gradient"), "--total-env-steps", "1000")
    result = train("mpirun", 2, tmp_path, *flags)
    assert result.returncode == 0, result
    done = summary(tmp_path)
    assert done["skipped_updates"] == 3
    assert done["eval_return_mean"] > 0
    # Two evaluations, checkpoints and the end each make the ranks average early; polls before learning carry no
    # weights.
    assert 1 / 7 <= done["traffic"]["messages_per_update"] < 2 / 7
    assert done["traffic"]["bytes_per_update"] < 1.5 * done["traffic"]["expected_bytes_per_update"]


def test_gradients_that_stay_not_finite_end_the_run_and_the_rank_is_named(tmp_path):
    result = train("mpirun", 2, tmp_path, *ENDLESS, *PARAMETERS, *sabotage("nan_rewards"))
    assert result.returncode == 1, result
    assert result.stderr.count("updates in a row had a gradient that is not finite; it began on rank 1.") == 1


# --- a server


def test_a_killed_server_run_resumes_with_its_counters(tmp_path):
    output = train_killed("mpirun", 3, tmp_path, (*SETTINGS, *SERVER), [1000])
    assert "rank 0 serves 2 workers" in output
    assert "not bit for bit" not in output
    done = summary(tmp_path)
    assert done["env_steps"] >= 2000
    pushed = done["updates"] + done["dropped_updates"]
    assert sum(done["staleness"].values()) == pushed
    owed = (done["env_steps"] - 200) / 4
    # The first and the last iteration of each worker, 8 env steps each, bring no update. A worker that starts late
    # takes 32 env steps more: it first fills its own replay.
    assert owed - (2 * 2 * 8 + 32) / 4 <= pushed <= owed
    traffic = done["traffic"]
    assert traffic["messages_per_update"] == pytest.approx(traffic["expected_messages_per_update"], rel=0.2)
    assert traffic["bytes_per_update"] == pytest.approx(traffic["expected_bytes_per_update"], rel=0.1)
    lines = recorded(tmp_path)
    for name in ("env_steps", "updates", "skipped_updates"):
        values = [line[name] for line in lines if name in line]
        assert values == sorted(values), name


@pytest.mark.parametrize("victim", [0, 2])
def test_a_signal_to_the_server_or_a_worker_stops_all_after_one_checkpoint(tmp_path, victim):
    with begin("mpirun", 3, tmp_path, *ENDLESS, *SERVER, "--checkpoint-every", "0") as job:
        job.wait_until(lambda: '"loss": 0' in metrics(tmp_path), "learning has begun")
        job.ranks()[victim].send_signal(signal.SIGTERM)
        sent = time.monotonic()
        result = job.wait()
    assert result.returncode == 75, result
    assert time.monotonic() - sent < LIMIT_SECONDS
    assert summary(tmp_path)["stopped_by"] == "signal"
    assert saved(tmp_path) == [summary(tmp_path)["env_steps"]]


def test_a_worker_that_stays_not_finite_ends_the_run_and_is_named(tmp_path):
    result = train("mpirun", 3, tmp_path, *ENDLESS, *SERVER, *sabotage("nan_rewards"))
    assert result.returncode == 1, result
    assert result.stderr.count("updates in a row had a gradient that is not finite; it began on rank 1.") == 1


def test_a_worker_that_hangs_is_named_and_the_job_ends(tmp_path):
    flags = (*ENDLESS, *SERVER, *sabotage("hangs"), "--stall-timeout", "12")
    with begin("mpirun", 3, tmp_path, *flags) as job:
        job.wait_for("hanging now")
        result = job.wait()
    assert result.returncode == 1, result
    assert re.search(r"rank 1 has been silent for \d+ s .* Ending the job", result.stderr), result


def test_a_dead_worker_is_reported_and_the_others_finish(tmp_path):
    flags = (*SERVER, "--tolerate-dead-workers", "--stall-timeout", "12", "--checkpoint-every", "500")
    # Environments that sleep need little CPU time, and the two living workers still train when the dead one is noticed.
    flags += ("--vectorization", "sync", *sabotage("all_equally_slow"), "--replay-ratio", "2")
    with begin("mpirun", 4, tmp_path, *flags, "--total-env-steps", "16000", **RECOVERY) as job:
        wait_for_checkpoint(job, tmp_path, 500)
        job.ranks()[2].kill()
        result = job.wait()
    assert re.search(r"rank 2 has been silent for \d+ s .*: the other 2 go on without it", result.stderr), (
        result
    )
    done = summary(tmp_path)
    assert (done["stopped_by"], done["world_size"]) == ("finished", 3)
    assert done["env_steps"] >= 16_000
    assert max(saved(tmp_path)) == done["env_steps"]
    again = train("mpirun", 4, tmp_path, *flags, "--total-env-steps", str(done["env_steps"] + 500))
    assert again.returncode == 0, again
    assert "3 ranks before, 4 now" in again.stdout
