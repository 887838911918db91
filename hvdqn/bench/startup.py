"""`hvdqn bench startup`: time from the command line to the first env step, compared with a bare `import torch`."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

from hvdqn.bench.jobs import run_command
from hvdqn.bench.report import Parser, one_or_more, print_table, write_json
from hvdqn.bench.training import TRAIN_UNTIL_FIRST_ENV_STEP
from hvdqn.config import parse

PROG = "hvdqn bench startup"


def time_python(code: str, *args: str) -> float:
    """Return the wall time of a new Python process that runs this code.

    Raises:
        UserError: it failed.
    """
    began = time.perf_counter()
    run_command([sys.executable, "-c", code, *args])
    return time.perf_counter() - began


def measure(rounds: int, flags: Sequence[str]) -> list[tuple[float, float]]:
    """Return the seconds of `import torch` and of the first env step in each round.

    One more round comes first, to fill the disk cache; it is not returned.
    """
    times = []
    for _ in range(rounds + 1):
        with tempfile.TemporaryDirectory(prefix="hvdqn-bench-") as folder:
            torch_seconds = time_python("import torch")
            step_seconds = time_python(TRAIN_UNTIL_FIRST_ENV_STEP, *flags, "--run-dir", folder)
        times.append((torch_seconds, step_seconds))
    return times[1:]


def main(argv: Sequence[str]) -> int:
    """Run the `hvdqn bench startup` command; return the exit code.

    Raises:
        UserError: the input is wrong, or a job failed.
    """
    parser = Parser(PROG, __doc__, "bench-startup.json")
    parser.add_argument("--rounds", type=one_or_more, default=5, help="number of rounds; the median is shown")
    options, flags = parser.parse_known_args(argv)
    parse(flags, PROG)
    times = measure(options.rounds, flags)
    torch_seconds = [seconds for seconds, _ in times]
    step_seconds = [seconds for _, seconds in times]
    rows = [
        ("import torch", f"{statistics.median(torch_seconds):.2f}"),
        ("first env step", f"{statistics.median(step_seconds):.2f}"),
    ]
    print_table(f"Median of {options.rounds}", ("until", "seconds"), rows)
    write_json(options.json, {"torch_seconds": torch_seconds, "first_env_step_seconds": step_seconds})
    return 0
