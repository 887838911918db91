"""Faults done for real to one rank, given to a run as `--wrapper tests.distributed.sabotage:NAME`.

The wrapper is called in every rank with each environment; rank 1 does the damage. It begins once learning has, in
the 200th step of its environments, so that every rank is inside its loop.
"""

from __future__ import annotations

import functools
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from hvdqn.checkpoint import directory
from hvdqn.comm import launcher_rank
from hvdqn.learner import Learner

FIRST_STEP = 200
NEVER_ENDS_SECONDS = 10_000.0

Env = gym.Env[Any, Any]
Result = tuple[Any, Any, bool, bool, dict[str, Any]]


class Sabotaged(gym.Wrapper[Any, Any, Any, Any]):
    """On rank 1, hands the results of steps from `FIRST_STEP` on to `damage`, `times` times."""

    taken = 0  # over all environments of this process
    done = 0

    def __init__(self, env: Env, damage: Callable[[Result], Result], times: int) -> None:
        super().__init__(env)
        # A function, and so no part of the state that a checkpoint keeps: the next attempt has its own.
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
    """And its clock is eleven days ahead."""
    _skew_clock()

    def dawdles(result: Result) -> Result:
        time.sleep(0.01)  # a step of CartPole takes less than a hundredth of it
        return result

    return Sabotaged(env, dawdles, times=1_000_000)


@functools.cache
def _skew_clock() -> None:
    if launcher_rank() == 1:
        right = time.time
        time.time = lambda: right() + 1e6


def rank_1_five_times_slower(env: Env) -> Env:
    """Each step of an environment sleeps 2 ms, on rank 1 10 ms: the cores are not what ranks wait for."""
    slow = 5 if launcher_rank() == 1 else 1
    return Dawdling(env, 2e-3 * slow)


def all_equally_slow(env: Env) -> Env:
    """The same without a straggler."""
    return Dawdling(env, 2e-3)


class Dawdling(gym.Wrapper[Any, Any, Any, Any]):
    def __init__(self, env: Env, seconds: float) -> None:
        super().__init__(env)
        self.seconds = seconds

    def step(self, action: Any) -> Result:
        time.sleep(self.seconds)
        return self.env.step(action)


def nan_gradient(env: Env) -> Env:
    _wrap_backward()
    return env


@functools.cache
def _wrap_backward() -> None:
    """Spoil the gradients of rank 1's updates 5 to 7."""
    backward = Learner.backward
    calls = 0

    def spoilt(self: Learner, batch: Any) -> Any:
        nonlocal calls
        told = backward(self, batch)
        calls += 1
        if self.comm.rank == 1 and 5 <= calls < 8:
            self.gradient[17] = float("nan")
        return told

    Learner.backward = spoilt  # type: ignore[method-assign]


def flipped_bit(env: Env) -> Env:
    _wrap_finish()
    return env


@functools.cache
def _wrap_finish() -> None:
    """Flip the lowest bit of one of rank 1's weights after its 20th update."""
    finish = Learner.finish_update
    calls = 0

    def flips(self: Learner) -> Any:
        nonlocal calls
        told = finish(self)
        calls += 1
        if self.comm.rank == 1 and calls == 20:
            self.parameters.numpy().view(np.uint8)[4 * 123] ^= 1
        return told

    Learner.finish_update = flips  # type: ignore[method-assign]


def full_disk(env: Env) -> Env:
    """From its second checkpoint on, rank 1 can write no file above 1 kB."""
    _before_shard(lambda path, calls: _limit_files() if calls == 2 else None)
    return env


def _limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def removed_directory(env: Env) -> Env:
    """While its second checkpoint is being written, rank 1 deletes the folder of checkpoints."""
    _before_shard(lambda path, calls: shutil.rmtree(path.parents[1]) if calls == 2 else None)
    return env


def signalled_while_writing(env: Env) -> Env:
    """Rank 1 gets SIGTERM in the middle of its first checkpoint."""
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
    """An environment whose insides are others where HVDQN_TEST_FAULT is set, as after an upgrade."""
    return gym.Wrapper(env) if os.environ.get("HVDQN_TEST_FAULT") else env


def chosen(env: Env) -> Env:
    """The fault that HVDQN_TEST_FAULT names, so that each attempt of one run can have another; none without."""
    name = os.environ.get("HVDQN_TEST_FAULT", "")
    wrapped: Env = globals()[name](env) if name else env
    # Always wrapped, so that an attempt can take over the environments of the one before.
    return wrapped if isinstance(wrapped, Sabotaged) else Sabotaged(wrapped, lambda result: result, times=0)
