"""Which code a run directory would make this process import, and whether the user allows that."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hvdqn.config import Config
from hvdqn.errors import UserError


def code_to_import(config: Config, torso_only: bool = False) -> list[str]:
    """Return the settings of a run that name code, as flags: `--torso 'module:attribute'`.

    Args:
        config: settings of the run.
        torso_only: its environment is not made, so that only the torso would be imported.
    """
    environment, run = config.environment, config.run
    named = [("--torso", config.network.torso)]
    kwargs_of = []
    if not torso_only:
        wrappers = (("--wrapper", path) for path in environment.wrapper)
        named = [("--env", environment.env), ("--eval-env", run.eval_env), *wrappers, *named]
        kwargs_of = [("--env-kwargs", environment.env_kwargs), ("--eval-env-kwargs", run.eval_env_kwargs)]
    found = [f"{flag} {value!r}" for flag, value in named if ":" in value]
    # Some environments import what a keyword argument names, such as the compatibility layers for old Gym.
    for flag, kwargs in kwargs_of:
        with suppress(ValueError):  # without escapes, which would hide a name
            kwargs = json.dumps(json.loads(kwargs), ensure_ascii=False)
        if re.search(r'"[^\W\d][\w.]*:', kwargs):
            found.append(f"{flag} {kwargs!r}")
    return found


def check_trust(path: Path, found: Sequence[str], trust: bool, repeated: Sequence[str], remedy: str) -> None:
    """Refuse to import what a run names, unless the user allows it. Only then modules of the current folder are found.

    Args:
        path: of the run, for messages.
        found: what it names, from `code_to_import`.
        trust: whether everything is allowed.
        repeated: what is allowed.
        remedy: how to allow it, for the message.

    Raises:
        UserError: it is not allowed.
    """
    if unknown := [flag for flag in repeated if flag not in found]:
        raise UserError(f"'{path}' was not trained with {unknown[0]}; leave it out")
    refused = [flag for flag in found if flag not in repeated]
    if refused and not trust:
        raise UserError(f"'{path}' names code that would be imported: {', '.join(refused)}; {remedy}")
    folder = str(Path.cwd())
    if found and not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)
