"""`hvdqn bench`: what training costs on this machine, and where the time goes.

    hvdqn bench [TRAIN FLAGS]           rates, seconds by phase, memory, allreduce of every engine
    hvdqn bench loop [TRAIN FLAGS]      the training loop alone; what the others start under a launcher

Each prints a table and writes JSON. Imports lazily: only what the command named needs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = ("loop", "peers", "solve")


def main(argv: Sequence[str] | None = None) -> int:
    """The `hvdqn bench` command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and words[0] in COMMANDS else "loop"
    code: int = importlib.import_module(f"hvdqn.bench.{name}").main(words)
    return code
