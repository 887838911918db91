"""What the benchmarks have in common: flags, tables, JSON."""

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

LIBRARIES = ("torch", "numpy", "gymnasium", "ale-py", "horovod", "mpi4py", "stable-baselines3")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds each flag's default to its help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_one = action.option_strings and action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if has_one else action.help


class Parser(argparse.ArgumentParser):
    """Flags of a benchmark; those that it does not know are left to training, where it trains what it is told."""

    def __init__(self, prog: str, description: str, json_file: str, trains: bool = True) -> None:
        super().__init__(
            prog,
            f"{prog} [FLAGS]{' [TRAIN FLAGS]' * trains}",
            description,
            "All other flags are those of hvdqn train." * trains,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        self.add_argument(
            "--json",
            type=writable,
            default=json_file,
            metavar="FILE",
            help="where to write what was measured",
        )

    def error(self, message: str) -> NoReturn:
        """Refuse as hvdqn does, in one line."""
        raise UserError(message)


def writable(text: str) -> Path:
    """A flag's file, which whoever writes it can write: to be found out before hours are measured."""
    folder = os.path.dirname(text) or "."  # noqa: PTH120 - what Path asks of a folder may raise
    target = text if os.path.exists(text) else folder  # noqa: PTH110
    if launcher_rank() == 0 and (os.path.isdir(text) or not os.access(target, os.W_OK)):  # noqa: PTH112
        raise argparse.ArgumentTypeError(f"cannot write '{text}'; choose another file")
    return Path(text)


def above_zero(text: str) -> float:
    """A flag's number of seconds, or whatever else must be above zero."""
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")


def one_or_more(text: str) -> int:
    """A flag's number of rounds, ranks, or whatever else there must be one of."""
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"'{text}' is no whole number of 1 or more")


def machine() -> dict[str, Any]:
    """Where numbers come from: processor, cores this process may use, versions."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{library: found for library in LIBRARIES if (found := _version(library))},
    }


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself; elsewhere torch emulates it, slowly."""
    return bool({"avx512_bf16", "amx_bf16"} & set(_cpuinfo("flags").split()))


def _processor() -> str:
    return _cpuinfo("model name") or platform.machine()


def _cpuinfo(name: str) -> str:
    """What the first processor says of itself."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its first column to the left and numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    print(title)
    table = Table(*header[:1])
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    # Off a terminal rich would assume 80 columns and fold the numbers.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@dataclass(frozen=True)
class Row:
    """What was measured, round by round, and the goal."""

    what: str
    unit: str
    values: tuple[float, ...]
    """One a round."""
    goal: float | None = None
    at_most: bool = False
    """Whether less is better."""

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the goal, if there is one."""
        if self.goal is None:
            return None
        return self.median <= self.goal if self.at_most else self.median >= self.goal

    def as_json(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "median": self.median, "reached": self.met}

    def cells(self) -> tuple[str, ...]:
        """As it is printed."""

        def shown(value: float, unit: str = "") -> str:
            return "never" if math.isinf(value) else number(value) + unit

        spread = f"{shown(min(self.values))} to {shown(max(self.values))}"
        goal = "" if self.goal is None else f"{'<=' if self.at_most else '>='} {number(self.goal)}"
        reached = {None: "", True: "yes", False: "no"}[self.met]
        return (self.what, shown(self.median, self.unit), spread, goal, reached)


def print_goals(title: str, rows: Sequence[Row]) -> None:
    """Print what was measured beside its goals."""
    print_table(title, ("what", "median", "spread", "goal", "reached"), [row.cells() for row in rows])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write what was measured, and on which machine.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(finite({**content, "machine": machine()}), allow_nan=False, indent=2)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}; choose another file with --json") from None
