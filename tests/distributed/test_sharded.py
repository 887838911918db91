"""Ranks that hold one network between them, over real engines: the same learning, the same behavior under faults."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.distributed.runs import STOPPED, begin, saved, summary, train, wait_for_checkpoint
from tests.launchers import launch

pytestmark = pytest.mark.distributed

WORKER = str(Path(__file__).with_name("sharded_worker.py"))
TIMEOUT_SECONDS = 180.0
SPLIT = ("--model-parallel", "2")
ENDLESS = ("--total-env-steps", "10000000", "--checkpoint-every", "500")


@pytest.mark.parametrize(
    ("launcher", "comm", "engine", "np"),
    [
        ("horovodrun-gloo", "auto", "horovod", 4),
        ("mpirun", "mpi", "mpi", 2),
        ("mpirun", "mpi", "mpi", 4),
        ("torchrun", "auto", "torch", 2),
        ("torchrun", "auto", "torch", 4),
    ],
)
def test_a_split_network_learns_as_a_whole_one(launcher: str, comm: str, engine: str, np: int) -> None:
    """Loss, gradient, 20 steps and parameters in float64, state of checkpoints, flipped bits and NaN."""
    result = launch(launcher, np, [WORKER, comm], timeout=TIMEOUT_SECONDS)
    assert result.returncode == 0, result
    for rank in range(np):
        assert f"rank {rank} of {np} agrees over {engine}" in result.stdout, result


def test_a_run_resumes_split_whole_and_split_again_with_evaluations_in_between(tmp_path: Path) -> None:
    """Each attempt has another engine, too. The second has no env steps left: its weights are those of the first."""
    flags = ("--eval-episodes", "4", "--hidden", "32", "16", "--dueling", "--total-env-steps")
    attempts = (
        ("horovodrun-gloo", "800", "2"),
        ("mpirun", "800", "1"),
        ("mpirun", "1600", "1"),
        ("torchrun", "2400", "2"),
    )
    digests = []
    for launcher, env_steps, size in attempts:
        result = train(launcher, 2, tmp_path, *flags, env_steps, "--model-parallel", size)
        assert result.returncode == 0, result
        assert summary(tmp_path)["env_steps"] == int(env_steps)
        digests.append(summary(tmp_path)["param_sha256"])
        evaluate = ["-m", "hvdqn", "eval", str(tmp_path), "--episodes", "3", "--json"]
        played = launch("python", 1, evaluate, TIMEOUT_SECONDS)
        assert played.returncode == 0, played
        assert len(json.loads(played.stdout.splitlines()[-1])["returns"]) == 3, played
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_signal_and_a_kill_and_a_resume(tmp_path: Path) -> None:
    with begin("mpirun", 4, tmp_path, *ENDLESS, *SPLIT) as job:
        wait_for_checkpoint(job, tmp_path, 500)
        job.ranks()[3].send_signal(signal.SIGTERM)
        result = job.wait()
    assert result.returncode == STOPPED["mpirun"], result
    with begin("mpirun", 4, tmp_path, *ENDLESS, *SPLIT) as job:
        wait_for_checkpoint(job, tmp_path, max(saved(tmp_path)) + 500)
        job.ranks()[2].kill()
        result = job.wait()  # fails if any process is left
    assert result.returncode not in (0, 75), result
    newest = max(saved(tmp_path))
    result = train("mpirun", 4, tmp_path, "--total-env-steps", str(newest + 200), "--resume", "must", *SPLIT)
    assert result.returncode == 0, result
    assert f"at env step {newest:,}" in result.stdout, result


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder, steps in ((halves, "800"), (halves, "1600"), (whole, "1600")):
        result = train("mpirun", 2, folder, "--total-env-steps", steps, *SPLIT)
        assert result.returncode == 0, result
    assert summary(halves)["param_sha256"] == summary(whole)["param_sha256"]


def test_a_gradient_that_is_not_finite_is_skipped_by_all_ranks(tmp_path: Path) -> None:
    wrapper = ("--wrapper", "tests.distributed.sabotage:nan_gradient")
    result = train("mpirun", 4, tmp_path, *wrapper, "--total-env-steps", "1500", *SPLIT)
    assert result.returncode == 0, result
    assert summary(tmp_path)["skipped_updates"] == 3


def test_a_flipped_bit_ends_the_run_and_its_rank_is_named(tmp_path: Path) -> None:
    wrapper = ("--wrapper", "tests.distributed.sabotage:flipped_bit")
    result = train("mpirun", 4, tmp_path, *ENDLESS, *wrapper, *SPLIT)
    assert result.returncode == 1, result
    # Two ranks hold each part: which of them is wrong cannot be told.
    assert "weights of rank 1 differ" in result.stderr or "weights of rank 3 differ" in result.stderr, result


def test_ranks_that_cannot_be_divided_are_refused_once(tmp_path: Path) -> None:
    result = train("mpirun", 3, tmp_path, *SPLIT)
    assert result.returncode == 2, result
    assert result.stderr.count("--model-parallel 2 does not divide 3 ranks; start a multiple of 2") == 1, (
        result
    )
    assert "Traceback" not in result.stderr
