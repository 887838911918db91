"""From a command line to a checked `Config`. Precedence: defaults < `--preset` < `--config FILE.yaml` < flags."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import yaml

from hvdqn.config.fields import flag_of
from hvdqn.config.flags import HELP_FLAGS, print_help, read_flags
from hvdqn.config.settings import Config, preset_config, setting
from hvdqn.config.validation import check
from hvdqn.config.values import value_of_data
from hvdqn.errors import UserError
from hvdqn.paths import expanded


def parse(argv: Sequence[str], prog: str = "python -m hvdqn.train") -> Config:
    """Return the run that a command line describes, checked as far as one process can.

    Raises:
        UserError: something in it is wrong.
        SystemExit: 0 after `--help`.
    """
    _refuse_repeated(argv, "--preset", "join them by comma, as in minatar,rainbow")
    _refuse_repeated(argv, "--config", "give one file")
    words = [word for word in argv if word not in HELP_FLAGS]
    flags = read_flags(Config, words)
    path = flags.pop("config", "")
    in_file = read_config_file(path) if path else {}
    file_preset = in_file.pop("preset", "")
    default = preset_config(flags.pop("preset", "") or file_preset).replace(**in_file)
    if len(words) < len(argv):
        print_help(Config, prog, default)
    config = default.replace(**flags)
    with _blame_file(path, {flag_of(name) for name in in_file if name not in flags}):
        check(config)
    return config


def _refuse_repeated(argv: Sequence[str], flag: str, remedy: str) -> None:
    if sum(word.split("=")[0] == flag for word in argv) > 1:
        raise UserError(f"{flag} is given twice; {remedy}")


def read_config_file(path: str) -> dict[str, Any]:
    """Return the settings in a YAML file, by name. Keys without a value are left out.

    Raises:
        UserError: the file is unreadable or no mapping, or a key or a value is wrong.
    """
    try:
        loaded = yaml.safe_load(expanded(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text"
        raise UserError(f"cannot read the config file '{path}': {reason}; give a YAML file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark is not None else ""
        raise UserError(
            f"the config file '{path}' is not valid YAML{line}; write one 'key: value' a line"
        ) from None
    if not isinstance(loaded, (dict, type(None))):
        raise UserError(f"the config file '{path}' holds no mapping; write one 'key: value' a line")
    settings: dict[str, Any] = {}
    with _blame_file(path):
        for key, data in (loaded or {}).items():
            field = setting(str(key).replace("-", "_"))
            if data is not None and field.name != "config":
                settings[field.name] = value_of_data(field, data)
    return settings


@contextlib.contextmanager
def _blame_file(path: str, flags: Collection[str] | None = None) -> Iterator[None]:
    """Add the file to the message of a UserError; if flags are given, only if the message names one of them."""
    try:
        yield
    except UserError as error:
        if flags is not None and not set(str(error).split()) & set(flags):
            raise
        raise UserError(f"in the config file '{path}': {error}") from None


def as_yaml(config: Config) -> str:
    """Return all settings as YAML. Given with `--config`, it repeats the run in a directory of its own."""
    settings = {name: value for name, value in config.flat().items() if name not in ("run_dir", "resume")}
    return yaml.safe_dump(settings, sort_keys=False)
