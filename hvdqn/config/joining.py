"""Find presets by their names, and join their settings."""

from __future__ import annotations

from typing import Any

from hvdqn.config.algorithms import ALGORITHMS, JOINED
from hvdqn.config.names import did_you_mean
from hvdqn.config.presets import FAMILIES, PRESETS
from hvdqn.errors import UserError


def preset_names(text: str) -> list[str]:
    """Return the names in `--preset TEXT`, each once.

    Raises:
        UserError: there is no such preset.
    """
    names = list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    for name in names:
        if name not in PRESETS:
            raise UserError(
                f"unknown preset '{name}'{did_you_mean(name, PRESETS)}; there are {', '.join(PRESETS)}"
            )
    return names


def fitting_preset(env: str) -> str:
    """Return the preset for an environment, or "" if there is none.

    A preset of one environment comes before that of a family, such as `minatar`.
    """
    environments = [name for name in PRESETS if name not in ALGORITHMS and not name.startswith("bench-")]
    envs = {name: str(PRESETS[name].get("env", "")) for name in environments}
    exact = [name for name, own in envs.items() if own == env and own.split("/")[0] not in FAMILIES]
    return exact[0] if exact else FAMILIES.get(env.partition("/")[0], "")


def preset_settings(text: str) -> dict[str, Any]:
    """Return the settings of one preset, or of several joined by commas. Their order does not matter.

    The preset of an algorithm wins over that of an environment, and `smoke` wins over both.

    Raises:
        UserError: there is no such preset, or two of them exclude each other.
    """
    names = preset_names(text)
    algorithms = [name for name in names if name in ALGORITHMS]
    environments = [name for name in names if name not in (*algorithms, "smoke")]
    for kind in (environments, algorithms):
        if len(kind) > 1:
            raise UserError(
                f"--preset {text}: {kind[0]} and {kind[1]} cannot both hold; join an environment's with an "
                "algorithm's, as atari,rainbow"
            )
    settings: dict[str, Any] = {}
    for name in (*environments, *algorithms):
        settings |= PRESETS[name]
    for pair, joined in JOINED.items():
        if set(pair) <= set(names):
            settings |= joined
    if "smoke" in names:
        settings |= PRESETS["smoke"]
    return settings
