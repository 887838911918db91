"""The `hvdqn` command: train, eval, bench and plot. Each is imported only when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": ("hvdqn.train", "train a network; under a launcher, on all its ranks"),
    "eval": ("hvdqn.evaluate", "play a trained network greedily"),
    "bench": ("hvdqn.bench", "what training costs on this machine, and where the time goes"),
    "plot": ("hvdqn.plot", "draw learning curves of one or many runs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the command line to the command that it names; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: hvdqn COMMAND [...]\n")
        for name, (_, summary) in COMMANDS.items():
            print(f"  {name:8}{summary}")
        print("\n'hvdqn COMMAND --help' says more.")
        return 0
    if words[0] not in COMMANDS:
        print(f"hvdqn: error: unknown command '{words[0]}'; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if (
        "" not in sys.path
    ):  # the current folder, with a user's torso or wrapper in it: `python -m` looks there too
        sys.path.insert(0, "")
    code: int = importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
