"""Elastic runs in which workers die and join, on three host names that all stand for this machine."""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from hvdqn.clock import Clock
from tests.distributed.runs import evaluations, saved, summary
from tests.launchers import BIN, REPOSITORY, Job, clean_environment

pytestmark = pytest.mark.distributed

HOSTS = ("w0", "w1", "w2")
# Long enough for a busy machine.
TIMEOUT_SECONDS = 150.0
ENVS_PER_RANK, REPLAY_RATIO, LEARNING_STARTS, TOTAL_ENV_STEPS = 8, 64, 1_000, 30_000
# Twice that of the preset, for half as many updates: Horovod's negotiation takes most of the time here.
BATCH_PER_RANK = 128
SOLVING = (
    *("--preset", "cartpole", "--eval-every", "2500", "--total-env-steps", str(TOTAL_ENV_STEPS)),
    *("--envs-per-rank", str(ENVS_PER_RANK), "--learning-starts", str(LEARNING_STARTS)),
    *("--batch-per-rank", str(BATCH_PER_RANK), "--replay-ratio", str(REPLAY_RATIO)),
)
KILLS = 5
SOLVED = 475.0

# Adds host names for this machine in a mount namespace, without changing /etc/hosts.
ALIASES = """
{ cat /etc/hosts; echo "127.0.0.1 w0 w1 w2"; } >"$0"
mount --bind "$0" /etc/hosts
exec "$@"
"""


@pytest.fixture
def unshare() -> list[str]:
    """Return the command that runs a job in a mount namespace."""
    for flags in (["--mount"], ["--map-root-user", "--mount"]):
        probe = ["unshare", *flags, "sh", "-c", "mount --bind /etc/hosts /etc/hosts"]
        try:
            if subprocess.run(probe, capture_output=True, timeout=10, check=False).returncode == 0:
                return ["unshare", *flags]
        except FileNotFoundError:
            break
    pytest.skip(
        "mount namespaces are not permitted (a container?), so no host names: ELASTIC RUNS ARE NOT TESTED"
    )


def elastic(
    unshare: Sequence[str], folder: Path, hosts: Sequence[str], *flags: str, timeout: float = TIMEOUT_SECONDS
) -> Job:
    """Start a job with one worker on each of these hosts. Its run directory is `folder / "run"`."""
    launcher = [
        str(REPOSITORY / "launch" / "elastic.sh"),
        *("--hosts", ",".join(hosts), "--interfaces", "lo", "--cooldown", "1,2", "--join-timeout", "12"),
    ]
    command = [*launcher, "--", *flags, "--run-dir", str(folder / "run")]
    env = clean_environment() | {"HVDQN_VENV": str(BIN.parent)}
    shell = ["sh", "-ec", ALIASES, str(folder / "hosts")]
    return Job([*unshare, *shell, *command], len(hosts), timeout, env, None)


def workers(job: Job) -> list[psutil.Process]:
    """Return all running workers, the oldest first."""
    found = []
    for process in job.alive():
        try:
            if process.cmdline()[1:3] == ["-m", "hvdqn.elastic"]:
                found.append((process.create_time(), process))
        except psutil.Error:
            continue
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


def worlds(job: Job) -> list[tuple[int, int]]:
    """Return the number of ranks and the first env step of each world so far."""
    first = re.findall(r"hvdqn \S+: (\d+) rank", job.output())
    later = re.findall(r"(\d+) ranks? from env step ([\d,]+) on", job.output())
    return [(int(ranks), 0) for ranks in first] + [
        (int(ranks), int(step.replace(",", ""))) for ranks, step in later
    ]


def larger(pair: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    """Return True if the second of two worlds has more ranks."""
    (before, _), (after, _) = pair
    return after > before


def metrics_lines(run_dir: Path) -> list[str]:
    """Return the complete lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics_lines(run_dir)]


def env_steps(run_dir: Path) -> int:
    """Return the env steps of the newest record. Called often, so it parses only that line."""
    lines = metrics_lines(run_dir)
    return int(json.loads(lines[-1])["env_steps"]) if lines else 0


def updates_owed(seen: Sequence[tuple[int, int]], env_steps: int) -> int:
    """Return how many updates a run through these worlds must have after this many env steps."""
    clocks = [
        Clock(ranks * ENVS_PER_RANK, ranks * BATCH_PER_RANK, REPLAY_RATIO, LEARNING_STARTS)
        for ranks, _ in seen
    ]
    for before, clock, (_, start) in zip(clocks, clocks[1:], seen[1:], strict=False):
        before.env_steps = start
        clock.resume(before.state())
    return clocks[-1].updates_owed(env_steps)


class Killer:
    """Kills random workers of a job at random moments."""

    def __init__(self, job: Job, run_dir: Path, seed: int) -> None:
        self.job, self.run_dir = job, run_dir
        self.random = random.Random(seed)
        self.members_killed = 0

    def kill_one(self) -> None:
        """Kill a random worker after a random number of env steps, and wait for the next world."""
        moment = env_steps(self.run_dir) + self.random.randrange(1_500)
        self.job.wait_until(lambda: env_steps(self.run_dir) >= moment, f"env step {moment}")
        time.sleep(self.random.random())
        self.job.wait_until(lambda: bool(self.victims()), "a worker that may be killed")
        victim = self.random.choice(self.victims())
        known, members = len(worlds(self.job)), self.members()
        victim.kill()
        if victim in members:
            self.members_killed += 1
            # Until then `members` would be wrong.
            self.job.wait_until(lambda: len(worlds(self.job)) > known, "a world without the killed worker")

    def members(self) -> list[psutil.Process]:
        """Return the workers of this world. They are older than those that are starting."""
        return workers(self.job)[: worlds(self.job)[-1][0]]

    def victims(self) -> list[psutil.Process]:
        """Return the workers that may be killed, including those that are starting.

        None while there is only one rank. None while the replay of a new rank fills: if only that rank were left, the
        run would take no updates for a while, which `updates_owed` does not take into account.
        """
        ranks, began = worlds(self.job)[-1]
        filled = env_steps(self.run_dir) > began + LEARNING_STARTS
        return workers(self.job) if ranks > 1 and filled else []


@pytest.mark.timeout(600)
def test_five_kills_and_cartpole_is_still_solved(unshare: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with elastic(unshare, tmp_path, HOSTS, *SOLVING, "--log-every", "250", timeout=540) as job:
        killer = Killer(job, run_dir, seed=5)
        job.wait_until(lambda: env_steps(run_dir) >= 2 * LEARNING_STARTS, "learning")
        for _ in range(KILLS):
            killer.kill_one()
        job.wait_until(lambda: any(map(larger, itertools.pairwise(worlds(job)))), "a worker has joined")
        killed_until = env_steps(run_dir)
        assert killed_until < TOTAL_ENV_STEPS, "the run was over before all kills were done"
        result = job.wait()
        seen = worlds(job)
    assert result.returncode == 0, result
    assert "is new and fills its replay for 1,000 env steps before it contributes" in result.stdout, result
    end = summary(run_dir)
    # A world ends when a member dies or a worker joins.
    assert len(seen) == end["world_changes"] + 1
    assert end["world_changes"] > killer.members_killed >= 1, seen
    # The first iteration that reaches the total is the last.
    last_tick = seen[-1][0] * ENVS_PER_RANK
    assert 0 <= end["env_steps"] - TOTAL_ENV_STEPS < last_tick
    # No update is lost or taken twice.
    assert end["updates"] == updates_owed(seen, end["env_steps"] - last_tick), seen
    steps = [record["env_steps"] for record in records(run_dir)]
    assert steps == sorted(steps)
    # The return varies between evaluations. The run keeps its best network, so that one must have solved the task.
    after = {at: mean for at, mean in evaluations(run_dir).items() if at > killed_until}
    assert max(after.values()) >= SOLVED, (after, seen)
    print(f"{KILLS} kills, {killer.members_killed} of members, in {result.seconds:.0f} s; worlds {seen}")


def test_a_stopped_job_is_resumed_with_another_number_of_ranks(unshare: list[str], tmp_path: Path) -> None:
    smoke = ("--preset", "smoke", "--checkpoint-every", "0")
    endless = ("--total-env-steps", "100000000")
    with elastic(unshare, tmp_path, HOSTS[:2], *smoke, *endless) as job:
        job.wait_until(lambda: env_steps(tmp_path / "run") >= 400, "learning")
        job.launcher.send_signal(signal.SIGTERM)
        result = job.wait()
    assert result.returncode == 75, result
    (stopped,) = saved(tmp_path / "run")
    total = str(stopped + 1_000)
    with elastic(unshare, tmp_path, HOSTS, *smoke, "--resume", "must", "--total-env-steps", total) as job:
        result = job.wait()
    assert result.returncode == 0, result
    assert f"env step {stopped:,}" in result.stdout
    assert "2 ranks before, 3 now" in result.stdout
    assert summary(tmp_path / "run")["env_steps"] >= stopped + 1_000


def test_a_worker_that_hangs_ends_the_job_and_is_named(unshare: list[str], tmp_path: Path) -> None:
    flags = ("--preset", "smoke", "--total-env-steps", "100000000", "--stall-timeout", "12")
    with elastic(unshare, tmp_path, HOSTS[:2], *flags) as job:
        job.wait_until(lambda: env_steps(tmp_path / "run") >= 400, "learning")
        workers(job)[-1].suspend()
        result = job.wait()
    assert result.returncode == 1, result
    assert re.search(r"no progress for .*rank \d does not answer", result.stderr), result


def test_wrong_input_is_refused_once(unshare: list[str], tmp_path: Path) -> None:
    with elastic(unshare, tmp_path, HOSTS[:2], "--preset", "smoke", "--comm", "mpi") as job:
        result = job.wait()
    assert result.returncode == 2, result
    assert result.stderr.count("--comm mpi cannot lose ranks") == 1, result
