"""`hvdqn bench`: what training costs on this machine, and where the time goes.

    hvdqn bench [TRAIN FLAGS]               rates, seconds by phase, memory, allreduce of every engine
    hvdqn bench scaling --np 1,2,4 [...]    weak and strong scaling, projected to more ranks
    hvdqn bench peers [...]                 side by side with Stable-Baselines3
    hvdqn bench solve [...]                 seconds until the greedy policy reaches a return
    hvdqn bench loop | allreduce [...]      one measurement by itself; under a launcher, of all its ranks
    hvdqn bench replay | startup [...]      whether a large replay is slower; seconds until the first env step
    hvdqn bench gpu [...]                   all that is promised of a GPU

Each prints a table and writes JSON; --help says more.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from hvdqn.config import did_you_mean
from hvdqn.errors import UserError

COMMANDS = ("allreduce", "gpu", "loop", "peers", "replay", "scaling", "solve", "startup")


def main(argv: Sequence[str] | None = None) -> int:
    """The `hvdqn bench` command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        near = did_you_mean(words[0], COMMANDS)
        print(
            f"hvdqn bench: error: there is no benchmark '{words[0]}'{near or '; there are ' + ', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    name = words.pop(0) if words and words[0] in COMMANDS else "costs"
    command = importlib.import_module(f"hvdqn.bench.{name}")
    try:
        code: int = command.main(words)
    except UserError as error:
        print(f"{command.PROG}: error: {error}", file=sys.stderr)
        return 2
    return code
