"""`hvdqn bench startup`: seconds from the command line to the first env step, beside those of a bare `import torch`."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

from hvdqn.bench.jobs import run
from hvdqn.bench.report import Parser, one_or_more, print_table, write_json
from hvdqn.config import parse

PROG = "hvdqn bench startup"
# What `python -m hvdqn.train` does, but the first env step ends the process.
UNTIL_FIRST_STEP = """
import os, sys
from hvdqn import train
train.Training.act = lambda *_: os._exit(0)
sys.exit(train.main(sys.argv[1:]))
"""


def seconds(code: str, *words: str) -> float:
    """Wall time of a Python of its own.

    Raises:
        UserError: it failed.
    """
    began = time.perf_counter()
    run([sys.executable, "-c", code, *words])
    return time.perf_counter() - began


def measure(rounds: int, flags: Sequence[str]) -> list[tuple[float, float]]:
    """Bare torch and the first env step, in turn; the first of each is left out, for it fills the disk cache."""
    found = []
    for _ in range(rounds + 1):
        with tempfile.TemporaryDirectory(prefix="hvdqn-bench-") as folder:
            found.append((seconds("import torch"), seconds(UNTIL_FIRST_STEP, *flags, "--run-dir", folder)))
    return found[1:]


def main(argv: Sequence[str]) -> int:
    """The `hvdqn bench startup` command; returns the exit code.

    Raises:
        UserError: the input is wrong, or a job failed.
    """
    parser = Parser(PROG, __doc__, "bench-startup.json")
    parser.add_argument("--rounds", type=one_or_more, default=5, help="to take the median of")
    options, flags = parser.parse_known_args(argv)
    parse(flags, PROG)
    found = measure(options.rounds, flags)
    rows = [
        (name, f"{statistics.median(values):.2f}")
        for name, values in zip(("import torch", "first env step"), zip(*found, strict=True), strict=True)
    ]
    print_table(f"Median of {options.rounds}", ("until", "seconds"), rows)
    write_json(
        options.json,
        {
            "torch_seconds": [torch for torch, _ in found],
            "first_env_step_seconds": [step for _, step in found],
        },
    )
    return 0
