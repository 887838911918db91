"""Kill a run and start it again: it ends with the same bits or, where it cannot, loses no progress."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import begin, saved, summary, train, wait_for_checkpoint
from tests.launchers import Job

pytestmark = pytest.mark.distributed

LENGTH = 2_000
EVERY = 500
SETTINGS = (
    "--checkpoint-every",
    str(EVERY),
    "--checkpoint-keep",
    "10",
    "--eval-every",
    "1000",
    "--eval-episodes",
    "2",
)
ENVIRONMENTS = {
    "native": ("--env", "CartPole-v1"),
    "sync": ("--env", "Acrobot-v1"),
    "normalized": ("--env", "Acrobot-v1", "--normalize-observations"),
    "minatar": ("--env", "MinAtar/Breakout-v1", "--hidden", "16", "--envs-per-rank", "4"),
    "impala": (
        *("--env", "MinAtar/Breakout-v1", "--hidden", "16", "--envs-per-rank", "4", "--replay-ratio", "1"),
        *("--torso", "impala", "--torso-pool", "2", "--spectral-norm", "--noisy", "--head", "iqn"),
    ),
}


def kill_ranks(job: Job) -> None:
    for rank in job.ranks().values():
        with contextlib.suppress(Exception):  # the launcher may have ended it already
            rank.kill()
    result = job.wait()
    assert result.returncode != 0, result


def train_killed(
    launcher: str, np: int, run_dir: Path, flags: Sequence[str], kill_after: Sequence[int]
) -> str:
    """Kill all ranks of a run soon after each of these checkpoints, then let it finish; return its last output."""
    for env_steps in kill_after:
        with begin(launcher, np, run_dir, *flags) as job:
            wait_for_checkpoint(job, run_dir, env_steps)
            kill_ranks(job)
        assert not (run_dir / "summary.json").exists(), "the run finished before it was killed"
    result = train(launcher, np, run_dir, *flags, "--resume", "must")
    assert result.returncode == 0, result
    return result.stdout


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics without those that depend on the wall clock."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if "second" not in name} for line in lines
    ]


@pytest.mark.parametrize(
    ("launcher", "np", "environment", "replay", "n_step", "kill_after"),
    [
        ("python", 1, "native", "uniform", 1, [500, 1000, 1500]),
        ("python", 1, "native", "prioritized", 3, [1000]),
        ("python", 1, "sync", "prioritized", 1, [500]),
        ("python", 1, "minatar", "uniform", 3, [1000]),
        ("python", 1, "native", "none", 1, [500, 1500]),  # in the middle of a rollout of 32 env steps
        ("mpirun", 2, "native", "prioritized", 3, [1000]),
        ("mpirun", 2, "normalized", "uniform", 3, [500]),  # test_faults.py covers other launchers
        ("mpirun", 2, "minatar", "prioritized", 1, [1500]),
        ("mpirun", 2, "sync", "none", 1, [1000]),
        ("mpirun", 2, "impala", "prioritized", 3, [1000]),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(
    tmp_path, launcher, np, environment, replay, n_step, kill_after
):
    flags = (*SETTINGS, *ENVIRONMENTS[environment], "--replay", replay, "--n-step", str(n_step))
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    with begin(launcher, np, uninterrupted, *flags) as job:
        output = train_killed(launcher, np, killed, flags, kill_after)
        result = job.wait()
        assert result.returncode == 0, result
    assert "not bit for bit" not in output
    assert summary(killed)["param_sha256"] == summary(uninterrupted)["param_sha256"]
    assert summary(killed)["updates"] == summary(uninterrupted)["updates"]
    assert recorded(killed) == recorded(uninterrupted)
    assert saved(killed) == saved(uninterrupted)


def test_atari_resumes_with_new_episodes_and_reports_it_once(tmp_path):
    pytest.importorskip("ale_py", reason="ale-py is not installed: resuming Atari is NOT tested")
    flags = (
        *(
            "--env",
            "ALE/Breakout-v5",
            "--env-kwargs",
            '{"max_num_frames_per_episode": 400}',
            "--frame-stack",
            "4",
        ),
        *("--hidden", "16", "--envs-per-rank", "2", "--replay-ratio", "1", "--eval-episodes", "2"),
        *("--total-env-steps", "600", "--checkpoint-every", "300"),
    )
    output = train_killed("python", 1, tmp_path, flags, [300])
    assert "resumed from" in output
    assert output.count("environments begin new episodes: this resume is not bit for bit") == 1
    assert "holds no replay" not in output
    assert summary(tmp_path)["env_steps"] == 600
    assert summary(tmp_path)["updates"] == (600 - 200) // 32


def test_environments_of_another_build_begin_new_episodes(tmp_path):
    flags = ("--wrapper", "tests.distributed.sabotage:another_build")
    assert train("python", 1, tmp_path, *flags, "--total-env-steps", "600").returncode == 0
    result = train("python", 1, tmp_path, *flags, "--total-env-steps", "800", HVDQN_TEST_FAULT="newer")
    assert result.returncode == 0, result
    assert result.stdout.count("environments begin new episodes: this resume is not bit for bit") == 1
    assert "--total-env-steps was 600, is 800" in result.stdout
    assert (
        summary(tmp_path)["updates"] == (800 - 8 - 200) // 4
    )  # the updates that the last step makes due are not taken


def test_a_run_resumes_with_another_number_of_ranks_without_a_step_back(tmp_path):
    flags = ("--lr-scaling", "none", "--exploration-env-steps", str(LENGTH), "--checkpoint-every", str(EVERY))
    flags += ("--checkpoint-keep", "10", "--replay", "prioritized")
    worlds = [("mpirun", 2), ("python", 1), ("mpirun", 3)]
    stops = [0]
    for launcher, np in worlds[:-1]:
        with begin(launcher, np, tmp_path, *flags) as job:
            wait_for_checkpoint(job, tmp_path, stops[-1] + EVERY)
            kill_ranks(job)
            assert job.output().count("2 ranks before, 1 now: replay is resharded") == (np == 1)
        stops.append(max(saved(tmp_path)))
    result = train(*worlds[-1], tmp_path, *flags, "--resume", "must")
    assert result.returncode == 0, result
    assert result.stdout.count("1 rank before, 3 now: replay is resharded") == 1, result
    assert [world_of(tmp_path, env_steps) for env_steps in stops[1:]] == [2, 1]

    lines = recorded(tmp_path)
    for name in ("env_steps", "updates", "skipped_updates", "lr"):
        values = [line[name] for line in lines if name in line]
        assert values == sorted(values), name
    epsilons = [line["epsilon"] for line in lines if "epsilon" in line]
    assert epsilons == sorted(epsilons, reverse=True)
    # The number of updates is what each global batch size owes: none is missing, none is repeated.
    per_update = [np * 32 // 8 for _, np in worlds]
    owed = sum(
        (end - begun) / n
        for begun, end, n in zip([200, *stops[1:]], [*stops[1:], LENGTH], per_update, strict=True)
    )
    assert abs(summary(tmp_path)["updates"] - owed) <= 6
    logged = [line["updates"] for line in lines if "loss" in line]
    assert max(b - a for a, b in pairwise(logged)) <= (200 + 24) / min(per_update) + 2


def test_another_number_of_ranks_begins_a_new_rollout(tmp_path):
    """Rollouts of 8 environments take 256 env steps, those of 16 take 512; each is learned from 2 x 4 times."""
    flags = ("--replay", "none", "--rollout-steps", "32", "--checkpoint-every", "400")
    assert train("mpirun", 2, tmp_path, *flags, "--total-env-steps", "800").returncode == 0
    result = train("python", 1, tmp_path, *flags, "--total-env-steps", "1500", "--resume", "must")
    assert result.returncode == 0, result
    assert (
        "2 ranks before, 1 now: the global batch was 128, is 64; clock and schedules continue"
        in result.stdout
    )
    assert result.stdout.count("a new rollout begins") == 1
    assert summary(tmp_path)["updates"] == 8 * (1 + (1500 - 800) // 256)


def world_of(run_dir: Path, env_steps: int) -> int:
    manifest = run_dir / "checkpoints" / f"{env_steps:012d}" / "manifest.json"
    size: int = json.loads(manifest.read_text(encoding="utf-8"))["world_size"]
    return size


def test_without_replay_it_fills_before_the_next_update(tmp_path):
    flags = ("--checkpoint-every", str(EVERY), "--checkpoint-replay", "no")
    output = train_killed("python", 1, tmp_path, flags, [1000])
    assert "the checkpoint holds no replay: it fills for 200 env steps before the next update" in output
    assert summary(tmp_path)["updates"] < (LENGTH - 200) // 4
    assert "rank-00000.safetensors" in [p.name for p in (tmp_path / "checkpoints" / "latest").iterdir()]


def test_broken_checkpoints_are_skipped_and_resume_must_refuses_if_all_are(tmp_path):
    flags = (*SETTINGS, "--total-env-steps", "1000")
    undamaged = tmp_path / "undamaged"
    assert train("python", 1, undamaged, *flags).returncode == 0
    param_sha256 = summary(undamaged)["param_sha256"]

    damaged = tmp_path / "damaged"
    shutil.copytree(undamaged, damaged, symlinks=True)
    flip_a_bit(damaged / "checkpoints" / "000000001000" / "learner.safetensors")
    result = train("python", 1, damaged, *flags)
    assert result.returncode == 0, result
    assert "warning: checkpoint 000000001000 is set aside as 000000001000.broken" in result.stdout
    assert "at env step 504" in result.stdout
    assert summary(damaged)["param_sha256"] == param_sha256

    for env_steps in saved(damaged):
        truncate(damaged / "checkpoints" / f"{env_steps:012d}" / "rank-00000.safetensors")
    result = train("python", 1, damaged, *flags, "--resume", "must")
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1, result
    assert "--resume must" in result.stderr
    result = train("python", 1, damaged, *flags)
    assert result.returncode == 0, result
    assert "no checkpoint is valid: the run starts from the beginning" in result.stdout
    assert (damaged / "metrics.jsonl.old").read_text().count("\n") > 0
    assert summary(damaged)["param_sha256"] == param_sha256


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
