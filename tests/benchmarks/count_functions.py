"""Count the functions of hvdqn that run in every update.

    python -m tests.benchmarks.count_functions                   the preset smoke, one process, on the CPU
    python -m tests.benchmarks.count_functions --preset cartpole  other flags of hvdqn.train replace it

The number says how many functions, in how many files, a reader has to follow to understand one update. A function
counts if it runs at least 0.9 times per update. Comprehensions and generator expressions are functions too.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType

import hvdqn
from hvdqn import train

PACKAGE = Path(hvdqn.__file__).parent
DEFAULT_FLAGS = ("--preset", "smoke")
LEAST_CALLS_PER_UPDATE = 0.9


def count_calls(argv: Sequence[str]) -> Counter[CodeType]:
    """Train with these flags and count the calls of every Python function in the main thread."""
    calls: Counter[CodeType] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls[frame.f_code] += 1

    sys.setprofile(count)
    try:
        exit_code = train.main(argv)
    finally:
        sys.setprofile(None)
    if exit_code:
        sys.exit(exit_code)
    return calls


def calls_per_update(calls: Counter[CodeType], updates: int) -> dict[tuple[str, str], float]:
    """Return the calls per update of each function of the project, by file and qualified name."""
    found: Counter[tuple[str, str]] = Counter()
    for code, count in calls.items():
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE):
            name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has no co_qualname
            found[path.relative_to(PACKAGE).as_posix(), name] += count
    return {function: count / updates for function, count in found.items()}


def main(argv: Sequence[str]) -> None:
    """Run training and print the report."""
    with tempfile.TemporaryDirectory() as folder:
        calls = count_calls([*(argv or DEFAULT_FLAGS), "--run-dir", folder])
        updates = json.loads((Path(folder) / "summary.json").read_text("utf-8"))["updates"]
    every_update = {
        function: rate
        for function, rate in calls_per_update(calls, updates).items()
        if rate >= LEAST_CALLS_PER_UPDATE
    }
    files = Counter(file for file, _ in every_update)
    print(f"{len(every_update)} functions in {len(files)} files run in every one of {updates:,} updates")
    for file, count in sorted(files.items()):
        print(f"\n{file}: {count}")
        for (other, name), rate in sorted(every_update.items()):
            if other == file:
                print(f"  {rate:8.2f}  {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
