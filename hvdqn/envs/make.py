"""From an id to a vector environment, and from whatever is wrong with it to one line for the user."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import FlattenObservation

from hvdqn.config import EnvironmentConfig, did_you_mean, import_attribute, import_module
from hvdqn.envs import snapshot
from hvdqn.envs.atari import LIFE_LOST, AtariGame, AtariVector, game_settings, is_atari
from hvdqn.envs.vector import Environments
from hvdqn.errors import UserError

# Namespaces that come with an extra: the module that registers them, and the extra's name.
_FAMILIES = {"ALE": ("ale_py", "atari"), "MinAtar": ("minatar.gym", "minatar")}
_NATIVE = "vector_entry_point"  # Gymnasium's word for a vector that the environment itself offers
_READABLE = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def make_environments(
    config: EnvironmentConfig, envs: int, seed: int, training: bool, threads: int = 0
) -> Environments:
    """Build one rank's environments; call `reset` next.

    Atari ids (`ALE/...-v5`) are played without sticky actions unless `--env-kwargs` sets
    `repeat_action_probability`.

    Args:
        config: which environment, and what is done to it.
        envs: how many.
        seed: of this rank and this use of them.
        training: False in evaluation, where rewards are raw and an episode has all its lives.
        threads: threads of an Atari vector; 0: one a core.

    Raises:
        UserError: no such environment, or one that a DQN cannot play; its line names the remedy.
    """
    spec = find_spec(config.env)
    if config.episodic_life and not is_atari(spec):
        raise UserError(f"--episodic-life needs an Atari environment such as ALE/Pong-v5, not '{config.env}'")
    build = _Build(config, spec, _read_kwargs(config, spec), training and config.episodic_life)
    vector, how = _make_vector(build, envs, threads)
    try:
        _check_actions(vector.single_action_space, config.env)
    except UserError:
        vector.close()
        raise
    return Environments(
        vector,
        seed,
        description=_describe(build, vector, how),
        clip_rewards=training and config.clip_rewards,
        twin=functools.partial(_make_twin, config, training),
    )


def find_spec(env: str) -> EnvSpec:
    """The registration of an id or `module:id`. Imports the module, or the extra that the id belongs to.

    Raises:
        UserError: nothing is registered under it; near matches are named.
    """
    module, _, env_id = env.rpartition(":")
    if module:
        import_module(module, f"--env '{env}'")
    family = env_id.split("/")[0]
    if family in _FAMILIES and not _register(family):
        extra = _FAMILIES[family][1]
        raise UserError(f"'{env_id}' needs the {extra} extra; pip install 'hvdqn[{extra}]'")
    if env_id not in gym.registry:
        for other in _FAMILIES:  # old Atari ids have no namespace; and near matches may lie in any family
            _register(other)
    if env_id not in gym.registry:
        near = did_you_mean(env_id, sorted(gym.registry))
        raise UserError(
            f"unknown environment '{env_id}'{near or '; give a registered Gymnasium id or module:id'}"
        )
    return gym.registry[env_id]


def _register(family: str) -> bool:
    """Make the ids of an extra known; False where it is not installed."""
    if any(env_id.startswith(f"{family}/") for env_id in gym.registry):
        return True
    try:
        module = importlib.import_module(_FAMILIES[family][0])
    except ImportError:
        return False
    if hasattr(module, "register_envs"):  # ale_py registers its ids by being imported
        module.register_envs()
    return True


@dataclasses.dataclass(frozen=True)
class _Build:
    """All that one environment is made from; travels to the worker processes of an async vector."""

    config: EnvironmentConfig
    spec: EnvSpec
    kwargs: dict[str, Any]
    episodic_life: bool


def _read_kwargs(config: EnvironmentConfig, spec: EnvSpec) -> dict[str, Any]:
    try:
        kwargs = json.loads(config.env_kwargs or "{}")
    except json.JSONDecodeError as error:
        raise UserError(
            f'--env-kwargs {config.env_kwargs!r} is not JSON ({error.msg}); write {{"name": value}}'
        ) from None
    if not isinstance(kwargs, dict):
        raise UserError(f'--env-kwargs {config.env_kwargs!r} is no JSON object; write {{"name": value}}')
    return game_settings(spec, kwargs) if is_atari(spec) else kwargs


def _make_vector(build: _Build, envs: int, threads: int) -> tuple[VectorEnv[Any, Any, Any], str]:
    """The vector environment that the config asks for, and what kind of vector it is."""
    config, asked = build.config, build.config.vectorization
    offered = build.spec.vector_entry_point is not None and not build.spec.additional_wrappers
    if asked == "native" and config.wrapper:
        raise UserError("--wrapper wraps single environments; use it with --vectorization sync or async")
    if asked == "native" and not offered:
        raise UserError(f"'{config.env}' has no native vector; use --vectorization sync or async")
    if asked == "native" or (asked == "auto" and offered and not config.wrapper):
        with _construction(config):
            vector = _make_native(build, envs, threads)
        if isinstance(vector.single_observation_space, spaces.Box):
            return vector, "native"
        vector.close()
        if asked == "native":
            raise UserError(f"the native vector of '{config.env}' has no Box observations; use sync or async")
    makers = [functools.partial(_make_single, build, index, os.getpid()) for index in range(envs)]
    if asked == "async":
        return AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP), "async"
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP), "sync"


def _make_native(build: _Build, envs: int, threads: int) -> VectorEnv[Any, Any, Any]:
    if is_atari(build.spec):
        return AtariVector(envs, threads, build.episodic_life, build.kwargs)
    return gym.make_vec(build.spec, num_envs=envs, vectorization_mode=_NATIVE, **build.kwargs)


def _make_twin(config: EnvironmentConfig, training: bool, seed: int) -> Environments:
    """Two environments of the same build in this process, for the rehearsal of `Environments.state`."""
    if config.vectorization == "async":
        config = dataclasses.replace(config, vectorization="sync")
    return make_environments(config, 2, seed, training)


def _make_single(build: _Build, index: int, owner: int) -> gym.Env[Any, Any]:
    """One environment with the user's wrappers around it; runs in a worker where the vector is async."""
    if os.getpid() != owner:
        # Signals reach every process of a job. The rank answers them; its workers end when it does.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
    config = build.config
    env: gym.Env[Any, Any]
    with _construction(config):
        if is_atari(build.spec):
            env = AtariGame(build.episodic_life, build.kwargs)
        else:
            env = gym.make(build.spec, disable_env_checker=True, **build.kwargs)
    for path in config.wrapper:
        env = _wrap(env, path)
    _check_observations(env.observation_space, config.env)
    if not isinstance(env.observation_space, spaces.Box):
        env = FlattenObservation(env)
    return _Outermost(env, index)


class _Outermost(gym.Wrapper[Any, Any, Any, Any]):
    """What every single environment ends in: it drops infos nobody reads, and saves its state as plain data."""

    def __init__(self, env: gym.Env[Any, Any], index: int):
        super().__init__(env)
        self._index = index

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        observation, _ = self.env.reset(seed=seed, options=options)
        return observation, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if not (terminated or truncated):
            return observation, reward, False, False, {}
        # A copy: the reset that follows may write to the same buffer.
        final = np.array(observation)
        return final, reward, bool(terminated), bool(truncated), {LIFE_LOST: bool(info.get(LIFE_LOST))}

    def save_state(self) -> dict[str, Any] | None:
        return snapshot.save(self.env)

    def load_state(self, states: list[dict[str, Any]]) -> str:
        """Its own of all envs' states: a vector's `call` tells every env the same; what does not fit, or ""."""
        try:
            snapshot.load(self.env, states[self._index])
        except ValueError as error:  # raised, it would end the worker of an async vector
            return str(error)
        return ""


@contextmanager
def _construction(config: EnvironmentConfig) -> Iterator[None]:
    """Tell a constructor's complaint about the user's settings as one line; let bugs keep their traceback."""
    try:
        yield
    except UserError:
        raise
    except gym.error.DependencyNotInstalled as error:
        raise UserError(f"'{config.env}' lacks a dependency: {_line(error)}") from error
    except ImportError as error:
        raise UserError(
            f"'{config.env}' cannot be imported: {_line(error)}; install what it needs"
        ) from error
    except (TypeError, ValueError, LookupError, AssertionError, AttributeError, gym.error.Error) as error:
        if config.env_kwargs in ("", "{}"):
            if isinstance(error, TypeError) and "missing" in str(error):
                raise UserError(f"'{config.env}': {_line(error)}; give it with --env-kwargs") from error
            raise
        raise UserError(
            f"--env-kwargs {config.env_kwargs} does not suit '{config.env}': {_line(error)}"
        ) from error


def _wrap(env: gym.Env[Any, Any], path: str) -> gym.Env[Any, Any]:
    wrapper = import_attribute(path, "--wrapper")
    try:
        wrapped = wrapper(env)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        raise UserError(f"--wrapper '{path}' lacks a dependency: {_line(error)}; install it") from error
    except TypeError as error:
        raise UserError(
            f"--wrapper '{path}' cannot be called with an environment alone ({_line(error)}); "
            "name a function that fills in the rest"
        ) from error
    except (ValueError, LookupError, AssertionError, AttributeError, gym.error.Error) as error:
        if not wrapper.__module__.startswith("gymnasium."):
            raise  # a bug of the user's own keeps its traceback
        raise UserError(f"--wrapper '{path}' does not take this environment: {_line(error)}") from error
    if not isinstance(wrapped, gym.Env):
        raise UserError(
            f"--wrapper '{path}' returned a {type(wrapped).__name__}; it must return a gymnasium.Env"
        )
    return wrapped


def _check_actions(space: gym.Space[Any], env: str) -> None:
    if not isinstance(space, spaces.Discrete):
        raise UserError(
            f"'{env}' has the action space {_line(space)}; DQN needs Discrete actions: "
            "choose another environment, or make them Discrete by a --wrapper"
        )


def _check_observations(space: gym.Space[Any], env: str, where: str = "") -> None:
    """Refuse what has no fixed number of numbers: text, sequences, graphs, spaces nobody knows."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        for name, part in parts:
            _check_observations(part, env, f"{where}[{name!r}]")
    elif not isinstance(space, _READABLE):
        raise UserError(
            f"'{env}' observes a {type(space).__name__} space{' at ' + where if where else ''}; hvdqn reads Box, "
            "Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of those: drop the rest by a --wrapper"
        )


def _describe(build: _Build, vector: VectorEnv[Any, Any, Any], how: str) -> str:
    """Everything about the environments that changes what a result means, in one line."""
    mode = AutoresetMode(vector.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
    said = [build.config.env, f"{vector.num_envs} envs", f"{how} vector", f"{mode.name} autoreset"]
    said += [f"wrapped by {path}" for path in build.config.wrapper]
    if is_atari(build.spec):
        said.append(f"frameskip {build.kwargs.get('frameskip', 4)}")
        said.append(f"sticky actions {build.kwargs['repeat_action_probability']}")
    if build.episodic_life:
        said.append("a lost life ends the episode")
    return ", ".join(said)


def _line(thing: object, width: int = 200) -> str:
    text = " ".join(str(thing).split())
    return text if len(text) <= width else text[: width - 3] + "..."
