"""Flags, tables and JSON files of the benchmarks."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from hvdqn.comm import launcher_rank
from hvdqn.errors import UserError
from hvdqn.metrics import finite, number
from hvdqn.paths import absolute

LIBRARIES = ("torch", "numpy", "gymnasium", "ale-py", "horovod", "mpi4py", "stable-baselines3")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Add each flag's default to its help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.option_strings and action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if has_default else action.help


class Parser(argparse.ArgumentParser):
    """Parser of a benchmark's own flags, with `--json`.

    Args:
        prog: the command, as `hvdqn bench loop`.
        description: the text of `--help`.
        json_file: the default of `--json`.
        trains: if True, the help says that all other flags are those of training.
    """

    def __init__(self, prog: str, description: str, json_file: str, trains: bool = True) -> None:
        super().__init__(
            prog,
            f"{prog} [FLAGS]{' [TRAIN FLAGS]' if trains else ''}",
            description,
            "All other flags are those of hvdqn train." if trains else "",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--json",
            type=writable_file,
            default=json_file,
            metavar="FILE",
            help="file to write the result to",
        )

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError`, so that wrong flags are reported in one line."""
        raise UserError(message)


def writable_file(text: str) -> Path:
    """Return the path of a file that can be written; checked before a long measurement begins.

    Only rank 0 checks, because only rank 0 writes.
    """
    path = str(absolute(text))
    # os.path is used because pathlib raises an error for a folder that may not be entered.
    folder = os.path.dirname(path)  # noqa: PTH120
    target = path if os.path.exists(path) else folder  # noqa: PTH110
    if launcher_rank() == 0 and (os.path.isdir(path) or not os.access(target, os.W_OK)):  # noqa: PTH112
        raise argparse.ArgumentTypeError(f"cannot write '{text}'; choose another file")
    return Path(path)


def above_zero(text: str) -> float:
    """Return the value of a flag that must be a finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")


def one_or_more(text: str) -> int:
    """Return the value of a flag that must be an integer of 1 or more."""
    with contextlib.suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")


def machine() -> dict[str, Any]:
    """Return the processor, the number of cores this process may use, and the versions of the libraries."""
    versions = {library: _version(library) for library in LIBRARIES}
    return {
        "processor": _cpuinfo("model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{library: found for library, found in versions.items() if found},
    }


def has_bf16() -> bool:
    """Return True if the processor multiplies bfloat16 in hardware; otherwise torch emulates it slowly."""
    return bool({"avx512_bf16", "amx_bf16"} & set(_cpuinfo("flags").split()))


def _cpuinfo(name: str) -> str:
    """Return a field of the first processor in /proc/cpuinfo, or "" if there is none."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def print_message(text: str) -> None:
    """Print progress or an error on standard error; standard output is for the tables."""
    print(text, file=sys.stderr, flush=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with the first column aligned left and the others right."""
    from rich.console import Console
    from rich.table import Table

    print(title)
    table = Table(*header[:1])
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    # If the output is not a terminal, rich assumes 80 columns and wraps the numbers.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@dataclass(frozen=True)
class Row:
    """The values of one measurement, one per round, and their goal."""

    what: str
    unit: str
    values: tuple[float, ...]
    goal: float | None = None
    at_most: bool = False
    """If True, smaller values are better."""

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.values)

    @property
    def reached(self) -> bool | None:
        """True if the median reaches the goal, None if there is no goal."""
        if self.goal is None:
            return None
        return self.median <= self.goal if self.at_most else self.median >= self.goal

    def as_json(self) -> dict[str, Any]:
        """Return the row as JSON data."""
        return {**asdict(self), "median": self.median, "reached": self.reached}

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the table: name of the measurement, median, smallest to largest, goal, goal reached."""
        spread = f"{_format(min(self.values))} to {_format(max(self.values))}"
        goal = "" if self.goal is None else f"{'<=' if self.at_most else '>='} {number(self.goal)}"
        reached = {None: "", True: "yes", False: "no"}[self.reached]
        return (self.what, _format(self.median, self.unit), spread, goal, reached)


def _format(value: float, unit: str = "") -> str:
    return "never" if math.isinf(value) else number(value) + unit


def print_goals(title: str, rows: Sequence[Row]) -> None:
    """Print the measurements and their goals."""
    print_table(title, ("what", "median", "spread", "goal", "reached"), [row.cells() for row in rows])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result and the machine it was measured on.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(finite({**content, "machine": machine()}), allow_nan=False, indent=2)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}; choose another file with --json") from None
