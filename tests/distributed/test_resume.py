"""Killed and started again: the same run, bit for bit where that can be, and never a step back where it cannot."""

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
    "minatar": ("--env", "MinAtar/Breakout-v1", "--hidden", "16", "--envs-per-rank", "4"),
}


def kill_ranks(job: Job) -> None:
    for rank in job.ranks().values():
        with contextlib.suppress(Exception):  # a launcher may be faster
            rank.kill()
    result = job.wait()
    assert result.returncode != 0, result


def train_killed(
    launcher: str, np: int, run_dir: Path, flags: Sequence[str], kill_after: Sequence[int]
) -> str:
    """A run whose ranks are all killed soon after each of these checkpoints; what its last attempt said."""
    for env_steps in kill_after:
        with begin(launcher, np, run_dir, *flags) as job:
            wait_for_checkpoint(job, run_dir, env_steps)
            kill_ranks(job)
        assert not (run_dir / "summary.json").exists(), "it was over before it was killed"
    result = train(launcher, np, run_dir, *flags, "--resume", "must")
    assert result.returncode == 0, result
    return result.stdout


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics, without what the wall clock decides."""
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
        ("mpirun", 2, "native", "prioritized", 3, [1000]),
        ("mpirun", 2, "sync", "uniform", 3, [500]),  # other launchers: see test_faults.py
        ("mpirun", 2, "minatar", "prioritized", 1, [1500]),
    ],
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    tmp_path, launcher, np, environment, replay, n_step, kill_after
):
    flags = (*SETTINGS, *ENVIRONMENTS[environment], "--replay", replay, "--n-step", str(n_step))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with begin(launcher, np, whole, *flags) as job:
        said = train_killed(launcher, np, killed, flags, kill_after)
        result = job.wait()
        assert result.returncode == 0, result
    assert "not bit for bit" not in said
    assert summary(killed)["param_sha256"] == summary(whole)["param_sha256"]
    assert summary(killed)["updates"] == summary(whole)["updates"]
    assert recorded(killed) == recorded(whole)
    assert saved(killed) == saved(whole)


def test_atari_goes_on_with_new_episodes_and_says_so_once(tmp_path):
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
    said = train_killed("python", 1, tmp_path, flags, [300])
    assert "resumed from" in said
    assert said.count("environments begin new episodes: this resume is not bit for bit") == 1
    assert "holds no replay" not in said
    assert summary(tmp_path)["env_steps"] == 600
    assert summary(tmp_path)["updates"] == (600 - 200) // 32


def test_environments_of_another_build_begin_new_episodes(tmp_path):
    flags = ("--wrapper", "tests.distributed.sabotage:another_build")
    assert train("python", 1, tmp_path, *flags, "--total-env-steps", "600").returncode == 0
    result = train("python", 1, tmp_path, *flags, "--total-env-steps", "800", HVDQN_TEST_FAULT="newer")
    assert result.returncode == 0, result
    assert result.stdout.count("environments begin new episodes: this resume is not bit for bit") == 1
    assert "--total-env-steps was 600, is 800" in result.stdout
    assert summary(tmp_path)["updates"] == (800 - 8 - 200) // 4  # what the last step owes is not taken


def test_other_world_sizes_go_on_without_a_step_back(tmp_path):
    flags = ("--lr-scaling", "none", "--exploration-env-steps", str(LENGTH), "--checkpoint-every", str(EVERY))
    flags += ("--checkpoint-keep", "10", "--replay", "prioritized")
    worlds = [("mpirun", 2), ("python", 1), ("mpirun", 3)]
    stops = [0]
    for launcher, np in worlds[:-1]:
        with begin(launcher, np, tmp_path, *flags) as job:
            wait_for_checkpoint(job, tmp_path, stops[-1] + EVERY)
            kill_ranks(job)
            assert job.output().count("2 ranks before, 1 now: replay is dealt anew") == (np == 1)
        stops.append(max(saved(tmp_path)))
    result = train(*worlds[-1], tmp_path, *flags, "--resume", "must")
    assert result.returncode == 0, result
    assert result.stdout.count("1 rank before, 3 now: replay is dealt anew") == 1, result
    assert [world_of(tmp_path, env_steps) for env_steps in stops[1:]] == [2, 1]

    lines = recorded(tmp_path)
    for name in ("env_steps", "updates", "skipped_updates", "lr"):
        values = [line[name] for line in lines if name in line]
        assert values == sorted(values), name
    epsilons = [line["epsilon"] for line in lines if "epsilon" in line]
    assert epsilons == sorted(epsilons, reverse=True)
    # As many updates as are owed at each batch: none missed, none made up for.
    per_update = [np * 32 // 8 for _, np in worlds]
    owed = sum(
        (end - begun) / n
        for begun, end, n in zip([200, *stops[1:]], [*stops[1:], LENGTH], per_update, strict=True)
    )
    assert abs(summary(tmp_path)["updates"] - owed) <= 6
    logged = [line["updates"] for line in lines if "loss" in line]
    assert max(b - a for a, b in pairwise(logged)) <= (200 + 24) / min(per_update) + 2


def world_of(run_dir: Path, env_steps: int) -> int:
    manifest = run_dir / "checkpoints" / f"{env_steps:012d}" / "manifest.json"
    size: int = json.loads(manifest.read_text(encoding="utf-8"))["world_size"]
    return size


def test_without_replay_it_fills_before_the_next_update(tmp_path):
    flags = ("--checkpoint-every", str(EVERY), "--checkpoint-replay", "no")
    said = train_killed("python", 1, tmp_path, flags, [1000])
    assert "the checkpoint holds no replay: it fills for 200 env steps before the next update" in said
    assert summary(tmp_path)["updates"] < (LENGTH - 200) // 4
    assert "rank-00000.safetensors" in [p.name for p in (tmp_path / "checkpoints" / "latest").iterdir()]


def test_broken_checkpoints_are_passed_over_and_none_is_refused_under_must(tmp_path):
    flags = (*SETTINGS, "--total-env-steps", "1000")
    whole = tmp_path / "whole"
    assert train("python", 1, whole, *flags).returncode == 0
    ends = summary(whole)["param_sha256"]

    torn = tmp_path / "torn"
    shutil.copytree(whole, torn, symlinks=True)
    flip_a_bit(torn / "checkpoints" / "000000001000" / "learner.safetensors")
    result = train("python", 1, torn, *flags)
    assert result.returncode == 0, result
    assert "warning: checkpoint 000000001000 is set aside as 000000001000.broken" in result.stdout
    assert "at env step 504" in result.stdout
    assert summary(torn)["param_sha256"] == ends

    for env_steps in saved(torn):
        truncate(torn / "checkpoints" / f"{env_steps:012d}" / "rank-00000.safetensors")
    result = train("python", 1, torn, *flags, "--resume", "must")
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1, result
    assert "--resume must" in result.stderr
    result = train("python", 1, torn, *flags)
    assert result.returncode == 0, result
    assert "no checkpoint is whole: the run begins anew" in result.stdout
    assert (torn / "metrics.jsonl.old").read_text().count("\n") > 0
    assert summary(torn)["param_sha256"] == ends


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
