"""Turn a command line into a checked `Config`.

Precedence: defaults < `--preset` < `config.yaml` of the run that is resumed < `--config FILE.yaml` < flags.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hvdqn.config.fields import flag_of
from hvdqn.config.flags import (
    HELP_FLAGS,
    PRINT_CONFIG_FLAG,
    VERSION_FLAG,
    print_help,
    print_text,
    print_version,
    read_flags,
)
from hvdqn.config.joining import preset_names
from hvdqn.config.settings import Config, preset_config, setting, settings_of_one_launch
from hvdqn.config.validation import check
from hvdqn.config.values import value_of_data
from hvdqn.errors import UserError
from hvdqn.paths import expanded

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"


def parse(argv: Sequence[str], prog: str = "python -m hvdqn.train") -> Config:
    """Return the settings that a command line describes, checked as far as one process can check them.

    Raises:
        UserError: something in it is wrong.
        SystemExit: 0 after `--help`, `--version` or `--print-config`.
    """
    if VERSION_FLAG in argv:
        print_version()
    _refuse_repeated(argv, "--preset", "join them by comma, as in minatar,rainbow")
    _refuse_repeated(argv, "--config", "give one file")
    words = [word for word in argv if word not in (*HELP_FLAGS, PRINT_CONFIG_FLAG)]
    flags = read_flags(Config, words)
    path = flags.pop("config", "")
    in_file = read_config_file(path) if path else {}
    run_path, in_run = _read_config_of_run({**in_file, **flags})
    preset = _agreed_preset(flags.pop("preset", ""), in_file.pop("preset", None), path)
    preset = _preset_of_run(preset, in_run.pop("preset", None), run_path)
    default = preset_config(preset or "").replace(**{**in_run, **in_file})
    if set(HELP_FLAGS) & set(argv):
        print_help(Config, prog, default)
    config = default.replace(**flags)
    with _blame_file(path, {flag_of(name) for name in in_file if name not in flags}):
        check(config)
    if PRINT_CONFIG_FLAG in argv:
        print_text(as_yaml(config).rstrip())
        raise SystemExit(0)
    if run_path:
        log.info(f"settings not given here are those of {run_path}")
    return config


def _refuse_repeated(argv: Sequence[str], flag: str, remedy: str) -> None:
    if sum(word.split("=")[0] == flag for word in argv) > 1:
        raise UserError(f"{flag} is given twice; {remedy}")


def _read_config_of_run(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the path of the config.yaml in the run directory, and its settings; "" and none if there is no such file.

    Settings that belong to one launch, such as the engine, are left out. With `--resume never` the file is not read.
    """
    if not given.get("run_dir") or given.get("resume") == "never":
        return "", {}
    path = Path(given["run_dir"]).expanduser() / CONFIG_FILE
    if not path.is_file():
        return "", {}
    settings, left_out = read_config_file(str(path)), settings_of_one_launch()
    return str(path), {name: value for name, value in settings.items() if name not in left_out}


def _agreed_preset(flag: str, in_file: str | None, path: str) -> str | None:
    """Return the preset that `--preset` or the config file names; None if neither does.

    The config file of a run holds every setting. Another preset beside it would change nothing but the recorded name.

    Raises:
        UserError: both name one, and not the same.
    """
    if not flag or in_file is None:
        return flag or in_file
    if not _same_presets(flag, in_file):
        raise UserError(
            f"--preset {flag} beside the config file '{path}', which holds the settings of {_words(in_file)}; "
            "leave one of them out"
        )
    return flag


def _preset_of_run(given: str | None, in_run: str | None, path: str) -> str | None:
    """Return the preset of the run that is resumed; the given one if there is no run.

    Raises:
        UserError: another one is given.
    """
    if given is not None and in_run is not None and not _same_presets(given, in_run):
        raise UserError(
            f"'{Path(path).parent}' was begun with {_words(in_run)}, not {_words(given)}; keep it, or choose another "
            "--run-dir"
        )
    return given if in_run is None else in_run


def _same_presets(one: str, other: str) -> bool:
    return set(preset_names(one)) == set(preset_names(other))


def _words(preset: str) -> str:
    return f"--preset {preset}" if preset else "no preset"


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
