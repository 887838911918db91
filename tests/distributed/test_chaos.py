"""A run under random faults still learns if it is started again each time, as a scheduler would do.

It takes three minutes, or HVDQN_CHAOS_MINUTES. When a run is finished the next one starts with another seed. When time
is up the first run is finished without further faults; a later run is left unfinished.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.distributed.runs import STOPPED, evaluations, saved, summary
from tests.distributed.test_resume import flip_a_bit, truncate
from tests.launchers import Job, Result, start

pytestmark = pytest.mark.distributed

MINUTES = float(os.environ.get("HVDQN_CHAOS_MINUTES", "3"))
SOLVED = 475.0
TOTAL_ENV_STEPS, CHECKPOINT_EVERY = 50_000, 2_000
ATTEMPT_SECONDS = 1200.0  # a whole run without faults takes 1 to 12 minutes
LAUNCHERS = ("mpirun", "mpirun", "torchrun", "torchrun", "horovodrun-gloo", "horovodrun-mpi")
STALL = ("--stall-timeout", "15")

Injection = Callable[[Job, random.Random], None]


def signals(number: int, everyone: bool, times: int = 1) -> Injection:
    def inject(job: Job, rng: random.Random) -> None:
        ranks = list(job.ranks().values())
        for _ in range(times):
            for rank in ranks if everyone else [rng.choice(ranks)]:
                rank.send_signal(number)
            ranks = ranks[:1]  # the second one to the same rank
            time.sleep(0.05)

    return inject


@dataclass(frozen=True)
class Fault:
    """A fault in one attempt."""

    ends: str  # stopped: 75 where the launcher passes it on; failed: neither 0 nor 75
    inject: Injection | None = None  # sent from outside to its ranks
    inside: str = ""  # the name of a fault that `sabotage.chosen` does in rank 1
    between: Callable[[Path], None] | None = None  # done to the newest checkpoint before the attempt


def of_shard(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda checkpoint: damage(checkpoint / "rank-00001.safetensors")


STOP, KILL = signals(signal.SIGTERM, everyone=False), signals(signal.SIGKILL, everyone=False)
FAULTS = {
    "SIGTERM to one rank": Fault("stopped", STOP),
    "SIGTERM to all ranks": Fault("stopped", signals(signal.SIGTERM, everyone=True)),
    "SIGUSR2 to all ranks": Fault("stopped", signals(signal.SIGUSR2, everyone=True)),
    "SIGINT to one rank": Fault("stopped", signals(signal.SIGINT, everyone=False)),
    "kill -9": Fault("failed", KILL),
    "SIGSTOP": Fault("failed", signals(signal.SIGSTOP, everyone=False)),
    "an exception": Fault("failed", inside="bug"),
    "a flipped bit of weights": Fault("failed", inside="flipped_bit"),
    "a NaN reward": Fault("stopped", STOP, inside="nan_reward"),
    "a flipped bit on disk": Fault("failed", KILL, between=of_shard(flip_a_bit)),
    "a torn file": Fault("stopped", STOP, between=of_shard(truncate)),
    "a missing manifest": Fault(
        "failed", KILL, between=lambda checkpoint: (checkpoint / "manifest.json").unlink()
    ),
}


@dataclass
class Run:
    """One run and its attempts."""

    directory: Path
    seed: int
    rng: random.Random
    met: Counter[str] = field(default_factory=Counter)

    def attempt(self, fault: Fault | None) -> bool:
        """Start the run once, with a fault or without; return True if the run is finished."""
        # torchrun gives a rank half a minute to answer its SIGTERM, and a stopped one never does.
        patient = fault is FAULTS["SIGSTOP"]
        launcher = self.rng.choice([name for name in LAUNCHERS if not (patient and name == "torchrun")])
        launcher = launcher if fault else "mpirun"  # the fastest on two cores
        before = saved(self.directory)
        if fault and fault.between and len(before) > 1:
            fault.between(self.directory / "checkpoints" / f"{before.pop():012d}")
        with self.begin(launcher, fault) as job:
            job.wait_until(lambda: "replay" in job.output(), "the run has started")
            self.check_resumed(job, before)
            if fault and fault.inject and self.wait(job, new=self.rng.randrange(3)):
                fault.inject(job, self.rng)
            result = job.wait()
        return self.check_end(launcher, fault, result)

    def begin(self, launcher: str, fault: Fault | None) -> Job:
        flags = ["--preset", "cartpole", "--run-dir", str(self.directory), "--seed", str(self.seed), *STALL]
        flags += ["--wrapper", "tests.distributed.sabotage:chosen", "--eval-episodes", "50"]
        flags += ["--total-env-steps", str(TOTAL_ENV_STEPS), "--checkpoint-every", str(CHECKPOINT_EVERY)]
        flags += ["--comm", "mpi"] if launcher == "mpirun" else []
        variables = {"HVDQN_TEST_FAULT": fault.inside if fault else ""}
        return start(launcher, 2, ["-m", "hvdqn.train", *flags], ATTEMPT_SECONDS, env=variables)

    def check_resumed(self, job: Job, whole: list[int]) -> None:
        """Check that the run resumed from the newest whole checkpoint."""
        if whole:
            job.wait_for("resumed from")
            (env_steps,) = re.findall(r"resumed from .* at env step ([\d,]+)", job.output())
            assert int(env_steps.replace(",", "")) == whole[-1], job.output()

    def wait(self, job: Job, new: int) -> bool:
        """Wait for this many new checkpoints and up to a second more; return False if the run is about to end."""
        last = TOTAL_ENV_STEPS - CHECKPOINT_EVERY
        until = min(max(saved(self.directory), default=0) + new * CHECKPOINT_EVERY, last)
        job.wait_until(lambda: max(saved(self.directory), default=0) >= until, f"a checkpoint at {until}")
        time.sleep(self.rng.random())
        return max(saved(self.directory), default=0) < last

    def check_end(self, launcher: str, fault: Fault | None, result: Result) -> bool:
        if result.returncode == 0:
            assert summary(self.directory)["stopped_by"] == "finished", result
            return True
        assert fault is not None, result
        if fault.ends == "stopped":
            assert result.returncode == STOPPED[launcher], result
            assert summary(self.directory)["stopped_by"] == "signal", result
            assert max(saved(self.directory)) == summary(self.directory)["env_steps"], result
        else:
            assert result.returncode not in (0, 2, 75), result
        return False


@pytest.mark.timeout(MINUTES * 60 + 1500)
def test_a_run_under_random_faults_still_solves_cartpole(tmp_path):
    rng = random.Random(5)
    deadline = time.monotonic() + 60 * MINUTES
    met: Counter[str] = Counter()
    solved = 0
    for seed in itertools.count(1):
        run = Run(tmp_path / f"run{seed}", seed=seed, rng=rng)
        done = False
        while not done and (solved == 0 or time.monotonic() < deadline):
            name = rng.choice(list(FAULTS)) if time.monotonic() < deadline else ""
            done = run.attempt(FAULTS.get(name))
            met[name] += not done
        if not done:
            break
        # Returns of greedy play vary between updates: a run counts as solved by its best network, which it keeps.
        assert max(evaluations(run.directory).values()) >= SOLVED, met
        solved += 1
    print(f"{solved} runs solved, {met.total()} faults in {MINUTES:g} minutes: {dict(met)}")
    assert met.total() >= MINUTES
