"""Strategies other than averaged gradients, as whole runs under faults: what README's tables promise for each."""

from __future__ import annotations

import signal

import pytest

from tests.distributed.runs import begin, saved, summary, train
from tests.distributed.test_faults import ENDLESS, metrics, sabotage
from tests.distributed.test_resume import SETTINGS, recorded, train_killed

pytestmark = pytest.mark.distributed

PARAMETERS = ("--sync", "parameters", "--sync-every", "7")


def test_a_killed_run_with_averaged_weights_ends_as_if_it_had_not_been(tmp_path):
    """Its checkpoints fall between averages, which they bring forward; the outer optimizer goes on too."""
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
        said = train_killed("mpirun", 2, killed, flags, [1000])
        result = job.wait()
        assert result.returncode == 0, result
    assert "weights and moments averaged every 7 updates, outer lr 0.7, momentum 0.9" in said
    assert "not bit for bit" not in said
    assert summary(killed)["param_sha256"] == summary(whole)["param_sha256"]
    assert recorded(killed) == recorded(whole)


def test_a_signal_between_averages_is_heard_at_the_next(tmp_path):
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
    # Two evaluations, checkpoints and the end bring an average forward; polls before learning carry no weights.
    assert 1 / 7 <= done["traffic"]["messages_per_update"] < 2 / 7
    assert done["traffic"]["bytes_per_update"] < 1.5 * done["traffic"]["expected_bytes_per_update"]


def test_gradients_that_stay_not_finite_end_the_run_and_name_the_rank(tmp_path):
    result = train("mpirun", 2, tmp_path, *ENDLESS, *PARAMETERS, *sabotage("nan_rewards"))
    assert result.returncode == 1, result
    assert result.stderr.count("updates in a row had a gradient that is not finite; it began on rank 1.") == 1
