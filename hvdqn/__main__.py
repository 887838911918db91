"""The `hvdqn` command. Each of its commands is imported only when it is called.

Shell completion of the commands and their flags, for bash (or zsh, or fish):

    hvdqn --tyro-print-completion bash > ~/.local/share/bash-completion/completions/hvdqn
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Union

from hvdqn import __version__

# Name -> module that is imported, with its function unless that is `main`; and one line of help.
COMMANDS = {
    "train": ("hvdqn.train:command", "train a network; under a launcher, on all its ranks"),
    "eval": ("hvdqn.evaluate", "play a trained network greedily"),
    "bench": ("hvdqn.bench", "what training costs on this machine, and where the time goes"),
    "plot": ("hvdqn.plot", "draw learning curves of one or many runs"),
    "tune": ("hvdqn.tune", "search for good settings, with many processes at once"),
    "launch": ("hvdqn.launchers.launch", "start a run with horovodrun, mpirun, torchrun or elastic"),
    "install-horovod": (
        "hvdqn.launchers.launch:install_horovod",
        "build Horovod for the torch of this environment",
    ),
    "presets": ("hvdqn.presets", "list tuned settings, or show what one preset changes"),
}
COMPLETION_FLAG = "--tyro-print-completion"
VERSION_FLAG = "--version"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names with the words after it; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == VERSION_FLAG:
        print(f"hvdqn {__version__}")
        return 0
    if words[0] == COMPLETION_FLAG:
        return complete(words[1:])
    if words[0] not in COMMANDS:
        near = get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(COMMANDS)}"
        return refuse(f"unknown command '{words[0]}'; {hint}")
    # Modules in the current folder, such as a user's torso or wrapper, can be imported as with `python -m`. But `eval`
    # reads run directories of others, which must not choose what is imported: it adds the folder once they are trusted.
    # Not as "": an environment may change the current folder.
    with suppress(OSError):  # it was removed
        if words[0] != "eval" and "" not in sys.path and (folder := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, folder)
    module, _, function = COMMANDS[words[0]][0].partition(":")
    code: int = getattr(importlib.import_module(module), function or "main")(words[1:])
    return code


@dataclass
class ScriptOptions:
    """A script of launch/, which reads its own flags."""


def usage() -> str:
    """Return the help of the command itself."""
    lines = [f"  {name:17}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        (
            "usage: hvdqn COMMAND [...]\n",
            *lines,
            "\n'hvdqn COMMAND --help' lists the flags of a command.",
            f"'hvdqn {VERSION_FLAG}' prints the version.",
            f"'hvdqn {COMPLETION_FLAG} bash' prints a completion script; zsh and fish work too.",
        )
    )


def complete(words: Sequence[str]) -> int:
    """Print the script that completes this command in a shell; return the exit code."""
    from hvdqn.config import print_completion
    from hvdqn.errors import UserError

    try:
        print_completion(options_of_commands(), " ".join(words), "hvdqn")
    except UserError as error:
        return refuse(str(error))
    return 0


def options_of_commands() -> Any:
    """Return the union of the commands' options, from which the completion script is made.

    A benchmark has flags of its own beside those of training; only the latter are completed.
    """
    from tyro.conf import subcommand

    from hvdqn.bench import COMMANDS as BENCHMARKS
    from hvdqn.config import Config
    from hvdqn.evaluate import EvalOptions
    from hvdqn.plot import PlotOptions
    from hvdqn.presets import PresetsOptions
    from hvdqn.tune import TuneOptions

    benchmarks: Any = Union[tuple(Annotated[Config, subcommand(name)] for name in BENCHMARKS)]  # noqa: UP007
    options: dict[str, Any] = {
        "train": Config,
        "eval": EvalOptions,
        "bench": benchmarks,
        "plot": PlotOptions,
        "tune": TuneOptions,
        "presets": PresetsOptions,
        "launch": ScriptOptions,
        "install-horovod": ScriptOptions,
    }
    commands = (
        Annotated[options[name], subcommand(name, description=summary)]
        for name, (_, summary) in COMMANDS.items()
    )
    return Union[tuple(commands)]  # noqa: UP007


def refuse(message: str) -> int:
    """Print what is wrong with the input; return the exit code."""
    from hvdqn.errors import EXIT_USER_ERROR

    print(f"hvdqn: error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):  # from Python 3.11 on
        del sys.path[0]  # the current folder, which `python -m` put there; `main` decides
    sys.exit(main())
