"""Real faults on one rank, selected with `--wrapper tests.distributed.sabotage:NAME`.

Every rank calls the wrapper with each environment; only rank 1 does damage. Most faults begin with the 200th step of
its environments, when learning has begun and every rank is inside its loop.
"""

from __future__ import annotations

import functools
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from torch import Tensor

from hvdqn.checkpoint import directory
from hvdqn.comm import launcher_rank
from hvdqn.learner import Learner
from hvdqn.replay import Batch
from hvdqn.trainer import Trainer

FIRST_STEP = 200
NEVER_ENDS_SECONDS = 10_000.0

Env = gym.Env[Any, Any]
Result = tuple[Any, Any, bool, bool, dict[str, Any]]


class Sabotaged(gym.Wrapper[Any, Any, Any, Any]):
    """On rank 1, replace the results of `times` steps, from `FIRST_STEP` on, by what `damage` returns for them."""

    taken = 0  # over all environments of this process
    done = 0

    def __init__(self, env: Env, damage: Callable[[Result], Result], times: int) -> None:
        super().__init__(env)
        # Functions are not part of the state that a checkpoint keeps: the next attempt has its own.
        self.damage = lambda result: damage(result) if self._is_its_turn(times) else result

    def step(self, action: Any) -> Result:
        Sabotaged.taken += 1
        return self.damage(self.env.step(action))

    def _is_its_turn(self, times: int) -> bool:
        if launcher_rank() != 1 or Sabotaged.taken < FIRST_STEP or Sabotaged.done >= times:
            return False
        Sabotaged.done += 1
        return True


def nan_reward(env: Env) -> Env:
    return Sabotaged(env, lambda r: (r[0], float("nan"), *r[2:]), times=1)


def inf_reward(env: Env) -> Env:
    return Sabotaged(env, lambda r: (r[0], float("inf"), *r[2:]), times=1)


def nan_rewards(env: Env) -> Env:
    return Sabotaged(env, lambda r: (r[0], float("nan"), *r[2:]), times=1_000_000)


def nan_observation(env: Env) -> Env:
    return Sabotaged(env, lambda r: (np.full_like(r[0], np.nan), *r[1:]), times=1)


def bug(env: Env) -> Env:
    def raises(result: Result) -> Result:
        raise RuntimeError("the environment of this rank broke")

    return Sabotaged(env, raises, times=1)


def leaves(env: Env) -> Env:
    return Sabotaged(env, lambda _: sys.exit(0), times=1)


def hangs(env: Env) -> Env:
    def sleeps(result: Result) -> Result:
        _hang()
        return result

    return Sabotaged(env, sleeps, times=1)


def hangs_while_built(env: Env) -> Env:
    if launcher_rank() == 1:
        _hang()
    return env


def _hang() -> None:
    print("hanging now", flush=True)
    time.sleep(NEVER_ENDS_SECONDS)


def slow_to_build(env: Env) -> Env:
    time.sleep(0.5)
    return env


def ten_times_slower(env: Env) -> Env:
    """Make steps slow, and set rank 1's clock eleven days ahead."""
    _skew_clock()

    def slowed(result: Result) -> Result:
        time.sleep(0.01)  # a step of CartPole takes less than a hundredth of it
        return result

    return Sabotaged(env, slowed, times=1_000_000)


@functools.cache
def _skew_clock() -> None:
    if launcher_rank() == 1:
        right = time.time
        time.time = lambda: right() + 1e6


def rank_1_five_times_slower(env: Env) -> Env:
    """Sleep 2 ms in each step of an environment, 10 ms on rank 1, so that ranks do not wait for cores."""
    slow = 5 if launcher_rank() == 1 else 1
    return SlowSteps(env, 2e-3 * slow)


def all_equally_slow(env: Env) -> Env:
    """Sleep 2 ms in each step on all ranks."""
    return SlowSteps(env, 2e-3)


class SlowSteps(gym.Wrapper[Any, Any, Any, Any]):
    def __init__(self, env: Env, seconds: float) -> None:
        super().__init__(env)
        self.seconds = seconds

    def step(self, action: Any) -> Result:
        time.sleep(self.seconds)
        return self.env.step(action)


def nan_gradient(env: Env) -> Env:
    _wrap_compute_gradient()
    return env


@functools.cache
def _wrap_compute_gradient() -> None:
    """Put a NaN into the gradients of rank 1's updates 5 to 7."""
    compute_gradient = Learner.compute_gradient
    calls = 0

    def with_nan(self: Learner, batch: Batch) -> Tensor:
        nonlocal calls
        learned = compute_gradient(self, batch)
        calls += 1
        if launcher_rank() == 1 and 5 <= calls < 8:
            self.gradient[17] = float("nan")
        return learned

    Learner.compute_gradient = with_nan  # type: ignore[method-assign]


def flipped_bit(env: Env) -> Env:
    _wrap_finish_update()
    return env


@functools.cache
def _wrap_finish_update() -> None:
    """Flip the lowest bit of one of rank 1's weights after its 20th update."""
    finish_update = Trainer.finish_update
    calls = 0

    def flips(self: Trainer) -> None:
        nonlocal calls
        finish_update(self)
        calls += 1
        if launcher_rank() == 1 and calls == 20:
            self.learner.parameters.numpy().view(np.uint8)[4 * 123] ^= 1

    Trainer.finish_update = flips  # type: ignore[method-assign]


def full_disk(env: Env) -> Env:
    """Limit rank 1's files to 1 kB from its second checkpoint on."""
    _before_shard(lambda path, calls: _limit_files() if calls == 2 else None)
    return env


def _limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def removed_directory(env: Env) -> Env:
    """Delete the folder of checkpoints while rank 1 writes its second one."""
    _before_shard(lambda path, calls: shutil.rmtree(path.parents[1]) if calls == 2 else None)
    return env


def signalled_while_writing(env: Env) -> Env:
    """Send SIGTERM to rank 1 in the middle of its first checkpoint."""
    _before_shard(lambda path, calls: os.kill(os.getpid(), signal.SIGTERM) if calls == 1 else None)
    return env


@functools.cache
def _wrap_write_part() -> list[Callable[[Path, int], None]]:
    write_part = directory.write_part
    faults: list[Callable[[Path, int], None]] = []
    calls = 0

    def faulty(path: Path, *arguments: Any) -> Any:
        nonlocal calls
        calls += launcher_rank() == 1
        if launcher_rank() == 1:
            faults[0](path, calls)
        return write_part(path, *arguments)

    directory.write_part = faulty
    return faults


def _before_shard(fault: Callable[[Path, int], None]) -> None:
    _wrap_write_part().append(fault)


def another_build(env: Env) -> Env:
    """Wrap the environment once more if HVDQN_TEST_FAULT is set, as an upgrade might."""
    return gym.Wrapper(env) if os.environ.get("HVDQN_TEST_FAULT") else env


def chosen(env: Env) -> Env:
    """Apply the fault that HVDQN_TEST_FAULT names, if any, so that each attempt of one run can have another one."""
    name = os.environ.get("HVDQN_TEST_FAULT", "")
    wrapped: Env = globals()[name](env) if name else env
    # Always wrapped, so that an attempt can restore the environments of the one before.
    return wrapped if isinstance(wrapped, Sabotaged) else Sabotaged(wrapped, lambda result: result, times=0)
