"""Build the environments of a rank from an `EnvironmentConfig`, and report wrong settings in one line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from hvdqn.config import EnvironmentConfig, import_attribute, import_module, json_object
from hvdqn.envs.actions import Actions
from hvdqn.envs.atari import AtariGame, AtariVector, game_settings, is_atari
from hvdqn.envs.atari_variant import AtariVariant, is_variant
from hvdqn.envs.contract import (
    check_first_calls,
    check_first_vector_calls,
    check_flattened_size,
    check_observations,
    check_spaces,
    one_line,
    warn_once,
)
from hvdqn.envs.masks import MaskFromObservation
from hvdqn.envs.process_settings import process_settings_kept
from hvdqn.envs.rehearsal import continues_exactly
from hvdqn.envs.single import SingleEnvironment, as_exception, describe_close_failure
from hvdqn.envs.spaces import flatten_observations
from hvdqn.envs.vector import Environments
from hvdqn.envs.workers import WorkerVector, call_in_child
from hvdqn.errors import UserError
from hvdqn.faults import leave_signals_to_rank

# For each namespace of optional environments: the module that registers its ids, and the extra that installs it.
_FAMILIES = {"ALE": ("ale_py", "atari"), "MinAtar": ("minatar.gym", "minatar")}
# For each library that environments of Gymnasium need, as their error messages name it: the extra that installs it.
_LIBRARIES = {
    "pygame": "video",
    "Box2D": "box2d",
    "MinAtar": "minatar",
    "ale_py": "atari",
    "mujoco": "mujoco",
}


def make_environments(
    config: EnvironmentConfig, num_envs: int, seed: int, training: bool, threads: int = 0
) -> Environments:
    """Build the environments of one rank. Call `reset` on them before the first step.

    Atari ids (`ALE/...-v5`) have no sticky actions unless `--env-kwargs` sets `repeat_action_probability`.

    Args:
        config: the environment and its settings.
        num_envs: number of environments.
        seed: the seed of their first reset.
        training: False for evaluation, where rewards are never clipped and a lost life does not end the episode.
        threads: number of threads of an Atari vector; 0: one per core.

    Raises:
        UserError: the environment does not exist, or a DQN cannot play it.
    """
    spec = find_spec(config.env)
    if config.episodic_life and not is_atari(spec):
        raise UserError(f"--episodic-life needs an Atari environment such as ALE/Pong-v5, not '{config.env}'")
    build = _Build(config, spec, _read_kwargs(config, spec), training and config.episodic_life)
    with process_settings_kept():
        vector, kind = _make_vector(build, num_envs, threads)
    try:
        actions = Actions(vector.single_action_space, config.env, config.action_bins)
    except UserError:
        vector.close()
        raise
    return Environments(
        vector,
        seed,
        actions=actions,
        description=_describe(build, vector, kind),
        clip_rewards=training and config.clip_rewards,
        continues_exactly=functools.partial(
            continues_exactly, functools.partial(make_environments, config, 2, training=training)
        ),
    )


@process_settings_kept()
def find_spec(env: str) -> EnvSpec:
    """Return the Gymnasium spec of an id or `module:id`; import the module, or the package that the id needs.

    `module:name` may also be a function or class of the module that makes the environment.

    Raises:
        UserError: the id is not registered; the message suggests similar ids.
    """
    module, _, env_id = env.rpartition(":")
    if module:
        imported = import_module(module, f"--env '{env}'")
    family = env_id.split("/")[0]
    if family in _FAMILIES and not _register(family):
        extra = _FAMILIES[family][1]
        raise UserError(f"'{env_id}' needs the {extra} extra; pip install 'hvdqn[{extra}]'")
    if module and env_id not in gym.registry and callable(make := getattr(imported, env_id, None)):
        return EnvSpec(env_id, entry_point=make)
    if env_id not in gym.registry:
        for other in _FAMILIES:  # old Atari ids have no namespace, and any family may have similar ids
            _register(other)
    if env_id not in gym.registry:
        raise UserError(f"unknown environment '{env_id}'; {_advice(env_id, bool(module))}")
    return gym.registry[env_id]


def _advice(env_id: str, has_module: bool) -> str:
    """Return the advice for an unknown id: similar ids, and how to name the module that registers it."""
    near = _near_ids(env_id)
    if has_module:
        other = "give an id that its module registers"
    else:
        other = f"give a registered Gymnasium id, or module:{env_id} if a package of yours registers it"
    return f"did you mean {' or '.join(map(repr, near))}? Else {other}" if near else other


def _near_ids(env_id: str) -> list[str]:
    """Return the registered ids that are closest to an unknown one, compared without namespace and version."""
    names = {known: _bare_name(known) for known in sorted(gym.registry)}
    near = difflib.get_close_matches(_bare_name(env_id), sorted(set(names.values())), n=3, cutoff=0.7)
    return difflib.get_close_matches(env_id, [k for k, name in names.items() if name in near], n=3, cutoff=0)


def _bare_name(env_id: str) -> str:
    """Return an id without namespace and version, in lower case: "pong" for "ALE/Pong-v5"."""
    return re.sub(r"-v\d+$", "", env_id.rpartition("/")[2]).lower()


def _register(family: str) -> bool:
    """Register the ids of an optional package, a key of `_FAMILIES`; return False if it is not installed."""
    if any(env_id.startswith(f"{family}/") for env_id in gym.registry):
        return True
    try:
        module = importlib.import_module(_FAMILIES[family][0])
    except ImportError:
        return False
    if hasattr(module, "register_envs"):  # importing ale_py registers its ids
        module.register_envs()
    return True


@dataclasses.dataclass(frozen=True)
class _Build:
    """All that is needed to build one environment. Worker processes of an async vector get a pickled copy."""

    config: EnvironmentConfig
    spec: EnvSpec
    kwargs: dict[str, Any]
    episodic_life: bool


def _read_kwargs(config: EnvironmentConfig, spec: EnvSpec) -> dict[str, Any]:
    """Return the environment's constructor arguments from `--env-kwargs`; for Atari, see `game_settings`.

    Raises:
        UserError: `--env-kwargs` is no JSON object.
    """
    kwargs = json_object("--env-kwargs", config.env_kwargs)
    return game_settings(spec, kwargs) if is_atari(spec) else kwargs


def _make_vector(build: _Build, num_envs: int, threads: int) -> tuple[VectorEnv[Any, Any, Any], str]:
    """Build the vector environment that `--vectorization` names; return it and its kind: native, sync or async."""
    config, requested = build.config, build.config.vectorization
    is_single = is_atari(build.spec) and is_variant(build.kwargs)
    has_native = (
        build.spec.vector_entry_point is not None and not build.spec.additional_wrappers and not is_single
    )
    if requested == "native" and config.wrapper:
        raise UserError("--wrapper wraps single environments; use it with --vectorization sync or async")
    if requested == "native" and is_single:
        raise UserError(
            f"the native vector of '{config.env}' has no mode, difficulty or RAM; use --vectorization sync or async"
        )
    if requested == "native" and not has_native:
        raise UserError(f"'{config.env}' has no native vector; use --vectorization sync or async")
    if requested == "native" or (requested == "auto" and has_native and not config.wrapper):
        with _explain_errors(config):
            vector = _make_native(build, num_envs, threads)
        if isinstance(vector.single_observation_space, spaces.Box):
            if not is_atari(build.spec):
                check_first_vector_calls(vector, config.env)
            return vector, "native"
        vector.close()
        if requested == "native":
            raise UserError(f"the native vector of '{config.env}' has no Box observations; use sync or async")
    makers = [functools.partial(_make_single, build, index, os.getpid()) for index in range(num_envs)]
    if requested == "async":
        return WorkerVector(makers), "async"
    return _make_sync(makers), "sync"


def _make_sync(makers: Sequence[Callable[[], gym.Env[Any, Any]]]) -> SyncVectorEnv:
    """Return a vector of environments in this process; if one cannot be made, close those that were made."""
    made: list[gym.Env[Any, Any]] = []
    try:
        for maker in makers:
            made.append(maker())
    except BaseException:
        for env in made:
            env.close()
        raise
    makers = [functools.partial(_same, env) for env in made]
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)


def _same(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return env


def _make_native(build: _Build, num_envs: int, threads: int) -> VectorEnv[Any, Any, Any]:
    if is_atari(build.spec):
        return AtariVector(num_envs, threads, build.episodic_life, build.kwargs)
    return gym.make_vec(
        build.spec, num_envs=num_envs, vectorization_mode="vector_entry_point", **build.kwargs
    )


def _make_single(build: _Build, index: int, rank_pid: int) -> gym.Env[Any, Any]:
    """Build one environment of a sync or async vector.

    An async vector calls this in each worker process, and in the rank's, `rank_pid`, to learn the spaces.
    """
    own_process = os.getpid() != rank_pid
    if not own_process and build.config.vectorization == "async":
        return _known_spaces(build)
    if own_process:
        leave_signals_to_rank()
    try:
        env, config = _make_wrapped(build), build.config
        actions = Actions(env.action_space, config.env, config.action_bins)
        return SingleEnvironment(env, index, config.env, own_process, actions)
    except BaseException as raised:
        error = as_exception(raised)
        if index == 0 or own_process or isinstance(error, (UserError, KeyboardInterrupt)):
            raise error  # noqa: B904 - the same error, or one with its traceback
        raise UserError(
            f"one '{build.config.env}' could be made in this process, and no second one "
            f"({type(error).__name__}: {one_line(error)}); --vectorization async gives each a process of its own"
        ) from error


class _Spaces(gym.Env[Any, Any]):
    """Has the spaces and metadata of an environment, but cannot be stepped; an async vector needs no more of it."""

    def __init__(self, env: gym.Env[Any, Any]):
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.metadata, self.render_mode = env.metadata, env.render_mode
        self.close_failure = ""


_spaces: dict[str, _Spaces] = {}


def _known_spaces(build: _Build) -> _Spaces:
    """Return the spaces of an environment whose workers have processes of their own.

    It is never built in the rank's process: what a simulator opens there once, each worker would inherit.
    """
    key = repr(build)
    if key not in _spaces:
        _spaces[key] = call_in_child(functools.partial(_read_spaces, build))
        if _spaces[key].close_failure:
            warn_once(_spaces[key].close_failure)
    return _spaces[key]


def _read_spaces(build: _Build) -> _Spaces:
    """Return the spaces of an environment that is built for them alone, in a process of its own."""
    leave_signals_to_rank()
    try:
        env = _make_wrapped(build)
        Actions(env.action_space, build.config.env, build.config.action_bins)  # raises if a DQN cannot act
    except BaseException as error:
        raise as_exception(error)  # noqa: B904 - the same error, or one with its traceback
    found = _Spaces(env)
    try:
        env.close()
    except BaseException as error:
        found.close_failure = describe_close_failure(build.config.env, error)
    return found


def _make_wrapped(build: _Build) -> gym.Env[Any, Any]:
    """Build one environment with the user's wrappers; flatten its observations if their space is no Box."""
    config = build.config
    env: gym.Env[Any, Any]
    with _explain_errors(config):
        if is_atari(build.spec):
            game = AtariVariant if is_variant(build.kwargs) else AtariGame
            env = game(build.episodic_life, build.kwargs)
        else:
            env = gym.make(build.spec, disable_env_checker=True, **build.kwargs)
    for path in config.wrapper:
        env = _wrap(env, path)
    if MaskFromObservation.applies_to(env.observation_space):
        env = MaskFromObservation(env)
    check_spaces(env, config.env)
    check_observations(env.observation_space, config.env)
    if not isinstance(env.observation_space, spaces.Box):
        check_flattened_size(env.observation_space, config.env)
        check_first_calls(env, config.env)
        env = flatten_observations(env)
    else:
        check_first_calls(env, config.env)
    return env


@contextmanager
def _explain_errors(config: EnvironmentConfig) -> Iterator[None]:
    """Turn exceptions of the `with` block into a UserError if the user's settings cause them; pass on all others."""
    try:
        yield
    except UserError:
        raise
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        raise UserError(f"'{config.env}' lacks a dependency: {describe_missing_library(error)}") from error
    except (TypeError, ValueError, LookupError, AssertionError, AttributeError, gym.error.Error) as error:
        if isinstance(error, TypeError) and "must inherit from the gymnasium.Env" in str(error):
            raise UserError(f"'{config.env}' is no environment of Gymnasium: {one_line(error)}") from error
        if config.env_kwargs in ("", "{}"):
            if isinstance(error, TypeError) and "missing" in str(error):
                raise UserError(f"'{config.env}': {one_line(error)}; give it with --env-kwargs") from error
            raise
        raise UserError(
            f"--env-kwargs {config.env_kwargs} does not suit '{config.env}': {one_line(error)}"
        ) from error


def describe_missing_library(error: Exception) -> str:
    """Return one line for an ImportError or DependencyNotInstalled that says how to install the missing library."""
    message = one_line(error)
    for library, extra in _LIBRARIES.items():
        if library.lower() in message.lower():
            return f"{library} is not installed; pip install 'hvdqn[{extra}]'"
    return f"{message}; install what it needs"


def _wrap(env: gym.Env[Any, Any], path: str) -> gym.Env[Any, Any]:
    """Wrap an environment by the class or function that `path` names, written `module:attribute`.

    Raises:
        UserError: the wrapper cannot be imported or does not take this environment.
    """
    wrapper = import_attribute(path, "--wrapper")
    try:
        wrapped = wrapper(env)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        raise UserError(
            f"--wrapper '{path}' lacks a dependency: {describe_missing_library(error)}"
        ) from error
    except TypeError as error:
        raise UserError(
            f"--wrapper '{path}' cannot be called with an environment alone ({one_line(error)}); "
            "name a function that fills in the rest"
        ) from error
    except (ValueError, LookupError, AssertionError, AttributeError, gym.error.Error) as error:
        if not wrapper.__module__.startswith("gymnasium."):
            raise  # a bug in the user's wrapper keeps its traceback
        raise UserError(f"--wrapper '{path}' does not take this environment: {one_line(error)}") from error
    if not isinstance(wrapped, gym.Env):
        raise UserError(
            f"--wrapper '{path}' returned a {type(wrapped).__name__}; it must return a gymnasium.Env"
        )
    return wrapped


def _describe(build: _Build, vector: VectorEnv[Any, Any, Any], kind: str) -> str:
    """Return one line for the log: the environments, and those of their settings that results depend on."""
    mode = AutoresetMode(vector.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
    words = [build.config.env, f"{vector.num_envs} envs", f"{kind} vector", f"{mode.name} autoreset"]
    words += [f"wrapped by {path}" for path in build.config.wrapper]
    if is_atari(build.spec):
        words.append(f"frameskip {build.kwargs.get('frameskip', 4)}")
        words.append(f"sticky actions {build.kwargs['repeat_action_probability']}")
        words += [f"{name} {build.kwargs[name]}" for name in ("mode", "difficulty") if name in build.kwargs]
        words += ["RAM observations"] * (build.kwargs.get("obs_type") == "ram")
    if build.episodic_life:
        words.append("a lost life ends the episode")
    return ", ".join(words)
