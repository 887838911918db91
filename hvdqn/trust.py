"""Which code a run directory would make this process import."""

from __future__ import annotations

import json
import re
from contextlib import suppress

from hvdqn.config import Config


def code_to_import(config: Config) -> list[str]:
    """Return the settings of a run that name code, as flags: `--torso 'module:attribute'`."""
    environment = config.environment
    named = [("--env", environment.env), ("--eval-env", config.run.eval_env)]
    named += [*(("--wrapper", path) for path in environment.wrapper), ("--torso", config.network.torso)]
    found = [f"{flag} {value!r}" for flag, value in named if ":" in value]
    # Some environments import what a keyword argument names, such as the compatibility layers for old Gym.
    for flag, kwargs in (
        ("--env-kwargs", environment.env_kwargs),
        ("--eval-env-kwargs", config.run.eval_env_kwargs),
    ):
        with suppress(ValueError):  # without escapes, which would hide a name
            kwargs = json.dumps(json.loads(kwargs), ensure_ascii=False)
        if re.search(r'"[^\W\d][\w.]*:', kwargs):
            found.append(f"{flag} {kwargs!r}")
    return found
