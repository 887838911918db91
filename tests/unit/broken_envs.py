"""Environments that break a rule of Gymnasium, or keep it in an unusual way. Importing this module registers them."""

from __future__ import annotations

import io
import os
import random
import sys
import tempfile
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space


class Plain(gym.Env[Any, int]):
    """Keeps every rule. The observation is the step, and an episode has four steps."""

    observation_space = spaces.Box(0, 9, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action: int) -> Any:
        self.steps += 1
        return self.observe(), self.reward(), self.steps >= 4, False, {}

    def observe(self) -> Any:
        return np.full(2, self.steps, np.float32)

    def reward(self) -> Any:
        return 1.0


class OldReset(Plain):
    def reset(self) -> Any:  # type: ignore[override]
        return super().reset()[0]


class NoOptions(Plain):
    def reset(self, seed: int | None = None) -> Any:  # type: ignore[override]
        return super().reset(seed=seed)


class OnlyObservation(Plain):
    def reset(self, **kwargs: Any) -> Any:
        return super().reset(**kwargs)[0]


class OldStep(Plain):
    def step(self, action: int) -> Any:
        observation, reward, terminated, _, info = super().step(action)
        return observation, reward, terminated, info


class NoInfo(Plain):
    def step(self, action: int) -> Any:
        return *super().step(action)[:4], None


class ThreeFlags(Plain):
    def step(self, action: int) -> Any:
        observation, reward, _, truncated, info = super().step(action)
        return observation, reward, np.zeros(3, bool), truncated, info


class WrongShape(Plain):
    def observe(self) -> Any:
        return np.zeros((2, 1), np.float32)


class WrongShapeInStep(Plain):
    def observe(self) -> Any:
        return np.zeros(3 if self.steps else 2, np.float32)


class Ragged(Plain):
    def observe(self) -> Any:
        return [[1.0], [2.0, 3.0]]


class WrongDtype(Plain):
    observation_space = spaces.Box(0, 255, (2,), np.uint8)


class MissingKey(Plain):
    observation_space = spaces.Dict(a=spaces.Discrete(2), b=spaces.Discrete(2))

    def observe(self) -> Any:
        return {"a": 1}


class OutOfDiscrete(Plain):
    observation_space = spaces.Discrete(2)

    def observe(self) -> Any:
        return 7


class Nothing(Plain):
    observation_space = spaces.Dict({})

    def observe(self) -> Any:
        return {}


class NoSpace(Plain):
    observation_space = None  # type: ignore[assignment]


class NoEnvironment:
    """Has everything but the base class."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = Plain.observation_space, Plain.action_space

    metadata: dict[str, Any] = {}  # noqa: RUF012 - Gymnasium's convention


class OldWrapper(gym.Wrapper[Any, Any, Any, Any]):
    """A wrapper that knows the old API only."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, _, info = self.env.step(action)
        return observation, reward, terminated, info


class Masked(Plain):
    """Tells which actions are possible."""

    def reset(self, **kwargs: Any) -> Any:
        return super().reset(**kwargs)[0], {"action_mask": np.array([1, 0], np.int8)}


class Rewarding(Plain):
    """Gives rewards of several kinds, one after the other."""

    def __init__(self, rewards: str) -> None:
        self.rewards = REWARDS[rewards]

    def reward(self) -> Any:
        return self.rewards[self.steps % len(self.rewards)]


REWARDS: dict[str, list[Any]] = {
    "single": [np.array([1.5]), [1.5], np.array(1.5), np.float32(1.5)],
    "numbers": [2, True, np.bool_(True), np.int8(1)],
    "odd": [Decimal("1.5"), (1.5,), np.array([[1.5]]), "1.5"],
    "two": [np.array([1.0, 2.0])],
    "none": [None],
    "empty": [[]],
    "complex": [1j],
    "late": [1.0, 1.0, np.zeros(3)],
}


class Global(Plain):
    """Draws its observations from the generators that all code of a process shares."""

    def observe(self) -> Any:
        return np.array([np.random.rand(), random.random()], np.float32)  # noqa: NPY002


class ChangesFolder(Plain):
    """Works in a new folder of its own, as wrappers of simulators do."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - Gymnasium's convention

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        os.chdir(tempfile.mkdtemp(dir=os.environ["SIMULATOR_FOLDERS"]))

    def render(self) -> Any:
        return np.zeros((8, 8, 3), np.uint8)


class Single(Plain):
    """A simulator of which a process may open one, or, with `ever`, one in its whole life.

    A forked process inherits what is open.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - Gymnasium's convention
    open_now = built = 0
    seeds: list[int] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, ever: bool = False, render_mode: str | None = None) -> None:
        if self.open_now:
            raise RuntimeError("a simulation is already running in this process")
        Single.open_now += 1
        Single.built += 1
        self.ever, self.render_mode = ever, render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed is not None:
            self.seeds.append(seed)
        return super().reset(seed=seed)

    def reward(self) -> Any:
        return 3.0

    def render(self) -> Any:
        return np.zeros((8, 8, 3), np.uint8)

    def close(self) -> None:
        if not self.ever:
            Single.open_now = 0


class Changes(Plain):
    """Changes settings of the whole process, as the modules of simulators do."""

    def __init__(self, what: str) -> None:
        CHANGES[what]()


CHANGES: dict[str, Callable[[], object]] = {
    "recursion limit": lambda: sys.setrecursionlimit(300),
    "sys.stdout": lambda: setattr(sys, "stdout", io.StringIO()),
    "umask": lambda: os.umask(0o777),
    "floating-point errors": lambda: np.seterr(all="raise"),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "gradient mode": lambda: torch.set_grad_enabled(False),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic mode": lambda: torch.use_deterministic_algorithms(True),
    "number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
}


class ClosesOutput(Plain):
    """Closes standard output, each time that one is made."""

    def __init__(self) -> None:
        sys.stdout.close()


class Large(Plain):
    """Observes numbers that float32 does not hold."""

    observation_space = spaces.Box(-1e300, 1e300, (2,), np.float64)

    def observe(self) -> Any:
        return np.array([1e300, np.nan])


class Typed(Plain):
    """Observes numbers of this dtype."""

    def __init__(self, dtype: str) -> None:
        self.observation_space = spaces.Box(0, 1, (2,), np.dtype(dtype).type)

    def observe(self) -> Any:
        return np.ones(2, self.observation_space.dtype)


class RaisesInClose(Plain):
    """Cannot be closed."""

    def __init__(self, leaves: bool = False) -> None:
        self.leaves = leaves

    def close(self) -> None:
        if self.leaves:
            sys.exit(3)
        raise AttributeError("'NoneType' object has no attribute 'close'")


class OwnVector(VectorEnv[Any, Any, Any]):
    """A vector environment that breaks the rule that `fault` names."""

    def __init__(self, num_envs: int = 1, fault: str = "", render_mode: str | None = None) -> None:
        self.num_envs, self.fault = num_envs, fault
        self.single_observation_space, self.single_action_space = Plain.observation_space, Plain.action_space
        self.observation_space = batch_space(Plain.observation_space, num_envs)
        self.action_space = batch_space(Plain.action_space, num_envs)
        mode = gym.vector.AutoresetMode.SAME_STEP if fault == "final" else gym.vector.AutoresetMode.NEXT_STEP
        self.metadata = {"autoreset_mode": mode}

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        size = 3 if self.fault == "observation" else 2
        infos = {"action_mask": np.ones((self.num_envs, 2))} if self.fault == "mask" else {}
        return np.zeros((self.num_envs, size), np.float32), infos

    def step(self, actions: Any) -> Any:
        none = np.zeros(self.num_envs, bool)
        rewards = np.zeros((self.num_envs, 1) if self.fault == "reward" else self.num_envs)
        ended = np.full(self.num_envs, self.fault == "final")
        result = np.zeros((self.num_envs, 2), np.float32), rewards, ended, none, {}
        return result[:4] if self.fault == "step" else result


for _class in (
    Plain,
    OldReset,
    NoOptions,
    OnlyObservation,
    OldStep,
    NoInfo,
    ThreeFlags,
    WrongShape,
    WrongShapeInStep,
    Ragged,
    WrongDtype,
    MissingKey,
    OutOfDiscrete,
    Nothing,
    NoSpace,
    NoEnvironment,
    Masked,
    Rewarding,
    Global,
    ChangesFolder,
    Single,
    Changes,
    ClosesOutput,
    Large,
    Typed,
    RaisesInClose,
):
    gym.register(f"Broken{_class.__name__}-v0", _class)
gym.register("BrokenOwnVector-v0", Plain, vector_entry_point=OwnVector)
