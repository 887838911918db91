"""`hvdqn presets`: list the presets, or show one as its difference to the defaults. Never imports torch."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
import yaml

from hvdqn.config import ALGORITHMS, PRESETS, Config, parse_flags, preset_config, print_text
from hvdqn.errors import UserError


@dataclass(frozen=True)
class PresetsOptions:
    """List the presets, or print one as a YAML file with the settings in which it differs from the defaults."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ""
    """A preset, or an environment's and an algorithm's joined by a comma, as minatar,rainbow. Default: list them."""


def main(argv: Sequence[str]) -> int:
    """Run the `hvdqn presets` command; return 0, or 2 if there is no such preset."""
    try:
        options = parse_flags(PresetsOptions, argv, "hvdqn presets")
        print_text(describe(options.name) if options.name else list_presets())
    except UserError as error:
        print(f"hvdqn presets: error: {error}", file=sys.stderr)
        return 2
    return 0


def list_presets() -> str:
    """Return a line for each preset: its name, and the environment or the algorithm that it is for."""
    columns = shutil.get_terminal_size().columns
    width = max(map(len, PRESETS)) + 2
    lines = []
    for name in PRESETS:
        changed = difference(name)
        settings = [
            f"{key} {value}" for key, value in changed.items() if key not in ("env", "total_env_steps")
        ]
        config = preset_config(name)
        what = f"{config.environment.env}, {config.run.total_env_steps:,} env steps"
        if name in ALGORITHMS:
            what = "algorithm"
        text = f"{name:{width}}{what}: {', '.join(settings)}"
        lines.append(shortened(text, columns))
    return "\n".join([*lines, "", "'hvdqn presets NAME' prints all that a preset changes."])


def shortened(text: str, columns: int) -> str:
    """Return the text, cut to this many columns."""
    return text if len(text) <= columns else text[: columns - 4].rstrip(", ") + " ..."


def describe(names: str) -> str:
    """Return what one or several presets change, as YAML with the defaults as comments.

    Raises:
        UserError: there is no such preset.
    """
    usual = Config().flat()
    lines = [f"# --preset {names}, without what is equal to the defaults"]
    for name, value in difference(names).items():
        default = as_line(name, usual[name]).removeprefix(f"{name}: ")
        lines.append(f"{as_line(name, value):32}  # default: {default}")
    return "\n".join(lines)


def difference(names: str) -> dict[str, Any]:
    """Return the settings of presets that are not those of the defaults.

    Raises:
        UserError: there is no such preset.
    """
    usual = Config().flat()
    settings = preset_config(names).flat()
    return {name: value for name, value in settings.items() if name != "preset" and value != usual[name]}


def as_line(name: str, value: Any) -> str:
    """Return a setting as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return f"{name}: {text.removesuffix('...').strip()}"
