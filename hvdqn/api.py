"""What `hvdqn.train(...)` takes and returns: settings by name, an environment as an object, and the result of a run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdqn.config import Config, check, import_attribute, parse, preset_config, setting, value_of_data
from hvdqn.errors import UserError
from hvdqn.policy import Policy, load


@dataclass(frozen=True)
class Result:
    """How a run ended; the same on every rank.

    Attributes:
        run_dir: its directory.
        summary: the content of its summary.json.
        returns: of the episodes of the last evaluation; empty without one, as of a run that was over before.
    """

    run_dir: Path
    summary: Mapping[str, Any]
    returns: tuple[float, ...]

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint."""
        return self.run_dir / "checkpoints" / "latest"

    def policy(self) -> Policy:
        """Load the trained policy."""
        return load(self.checkpoint, trust=True)


def make_config(
    config: Config | str | Path | None, env: str | Callable[..., Any] | None, settings: Mapping[str, Any]
) -> Config:
    """Return checked settings.

    Args:
        config: to begin with, or a YAML file of settings.
        env: an id, or a function that makes the environment.
        settings: by name, as in a YAML file. They change those of `config`, or of the `preset` among them.

    Raises:
        UserError: a setting is unknown or wrong.
    """
    given = dict(settings)
    preset = given.pop("preset", "")
    if preset and config is not None:
        raise UserError("preset beside config, which has its own; leave one of them out")
    if isinstance(config, (str, Path)):
        config = parse(["--config", str(config)])
    if callable(env):
        given |= settings_of_factory(env, given.get("env_kwargs"))
    elif env is not None:
        given["env"] = env
    values = {name: value_of_data(setting(name), _as_data(value)) for name, value in given.items()}
    made = (config or preset_config(preset)).replace(**values)
    check(made)
    return made


def _as_data(value: Any) -> Any:
    """Return a value as YAML would give it."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def settings_of_factory(factory: Callable[..., Any], env_kwargs: Any) -> dict[str, Any]:
    """Return the settings that name a function which makes an environment, so that every process can find it.

    Args:
        factory: a function or class of a module, or a `functools.partial` of one with keyword arguments.
        env_kwargs: more keyword arguments, if any.

    Raises:
        UserError: it cannot be found by its name.
    """
    kwargs = dict(env_kwargs or {})
    while isinstance(factory, functools.partial) and not factory.args:
        kwargs = {**factory.keywords, **kwargs}
        factory = factory.func
    name = f"{getattr(factory, '__module__', '')}:{getattr(factory, '__qualname__', '')}"
    try:
        found = import_attribute(name, "env")
    except UserError:
        found = None
    if found is not factory:
        raise UserError(
            f"env is {factory!r}, which other processes cannot find by name; give a function or class of a module"
        )
    try:
        return {"env": name, "env_kwargs": json.dumps(kwargs)}
    except TypeError as error:
        raise UserError(
            f"the arguments of env are not JSON ({error}); give numbers, text, lists or dicts"
        ) from None
