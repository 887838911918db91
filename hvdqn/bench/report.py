"""What the benchmarks have in common: flags, tables, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from hvdqn.config import UserError

LIBRARIES = ("torch", "numpy", "gymnasium", "ale-py", "horovod", "mpi4py", "stable-baselines3")


class Parser(argparse.ArgumentParser):
    """Flags of a benchmark; those that it does not know are left to training."""

    def __init__(self, prog: str, description: str, json_file: str) -> None:
        super().__init__(
            prog, f"{prog} [FLAGS] [TRAIN FLAGS]", description, "All other flags are those of hvdqn train.",
            allow_abbrev=False,
        )  # fmt: skip
        self.add_argument(
            "--json", type=Path, default=Path(json_file), metavar="FILE", help=f"default: {json_file}"
        )

    def error(self, message: str) -> NoReturn:
        """Refuse as hvdqn does, in one line."""
        raise UserError(message)


def machine() -> dict[str, Any]:
    """Where numbers come from: processor, cores this process may use, versions."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{library: found for library in LIBRARIES if (found := _version(library))},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write what was measured, and on which machine.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps({**content, "machine": machine()}, indent=2)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}; choose another file with --json") from None
