"""`hvdqn bench`: measure the cost of training on this machine.

    hvdqn bench [TRAIN FLAGS]               rates, seconds by phase, memory, allreduce of every engine
    hvdqn bench scaling --np 1,2,4 [...]    weak and strong scaling, projected to more ranks
    hvdqn bench peers [...]                 comparison with Stable-Baselines3, SBX and CleanRL
    hvdqn bench solve [...]                 seconds until the greedy policy reaches a return
    hvdqn bench loop | allreduce [...]      one measurement by itself; under a launcher, of all its ranks
    hvdqn bench kernels [...]               an update of a small network over its bare matrix products
    hvdqn bench replay | startup [...]      speed of a large replay; seconds until the first env step
    hvdqn bench gpu [...]                   speed and accuracy of a GPU

Each prints a table and writes JSON; see --help of each.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from hvdqn.bench.report import print_message
from hvdqn.config import did_you_mean
from hvdqn.errors import EXIT_USER_ERROR, UserError
from hvdqn.paths import folder_remembered

COMMANDS = ("allreduce", "gpu", "kernels", "loop", "peers", "replay", "scaling", "solve", "startup")


@folder_remembered()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the `hvdqn bench` command; return the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    name = ""
    if args and not args[0].startswith("-"):
        name = args.pop(0)
        if name not in COMMANDS:
            hint = did_you_mean(name, COMMANDS) or f"; choose one of {', '.join(COMMANDS)}"
            print_message(f"hvdqn bench: error: unknown benchmark '{name}'{hint}")
            return EXIT_USER_ERROR
    command = importlib.import_module(f"hvdqn.bench.{name or 'costs'}")
    try:
        code: int = command.main(args)
    except UserError as error:
        print_message(f"{command.PROG}: error: {error}")
        return EXIT_USER_ERROR
    return code
