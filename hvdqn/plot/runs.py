"""Read the settings and metrics of runs from their directories."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from hvdqn.errors import UserError
from hvdqn.links import follow_link
from hvdqn.metrics import METRICS_FILE, SUMMARY_FILE, read_metrics

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

CONFIG_FILE = "config.yaml"
LATEST_CHECKPOINT = "checkpoints/latest"
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class Run:
    """One run as read from its directory."""

    directory: Path
    settings: dict[str, Any]
    """The keys of config.yaml and summary.json; summary.json wins."""
    records: list[dict[str, Any]]
    """The lines of metrics.jsonl."""

    def curve(self, x: str, y: str) -> tuple[Array, Array]:
        """Return the values of two keys over all records, `[points]` each, sorted by x.

        Of several records with the same x, the last one counts.
        """
        points = {r[x]: r[y] for r in self.records if r.get(x) is not None and r.get(y) is not None}
        xs = sorted(points)
        return np.array(xs, dtype=np.float64), np.array([points[x] for x in xs], dtype=np.float64)

    def count(self, y: str) -> int:
        """Return the number of records that have a value of `y`."""
        return sum(record.get(y) is not None for record in self.records)


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Read each run at or below the paths once.

    Raises:
        UserError: there is no run, or a run is empty or damaged.
    """
    directories = [directory for path in paths for directory in _run_directories(path)]
    if not directories:
        raise UserError("no RUN given; name one or more run directories")
    unique = {directory.resolve(): directory for directory in directories}
    return [_read_run(directory) for directory in unique.values()]


def _run_directories(path: Path) -> list[Path]:
    """Return the path if it is a run directory, else the run directories below it."""
    if path.name == METRICS_FILE:
        path = path.parent
    try:
        if not path.is_dir():
            problem = "is not a directory" if path.exists() else "does not exist"
            raise UserError(f"{path} {problem}; give the run directory that training printed")
        if (path / METRICS_FILE).exists():
            return [path]
        # The file of a run that has just started is empty. It must not prevent a plot of the other runs.
        found = sorted(file.parent for file in path.rglob(METRICS_FILE) if file.stat().st_size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable") from None
    if not found:
        raise UserError(
            f"{path} contains no {METRICS_FILE} with records, at any depth; give a run directory of training"
        )
    return found


def _read_run(directory: Path) -> Run:
    path = directory / METRICS_FILE
    try:
        records = read_metrics(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; delete that line or leave the run out") from None
    not_numbers = {
        key
        for record in records
        for key, value in record.items()
        if not isinstance(value, (int, float, type(None)))
    }
    if not_numbers:
        raise UserError(f"{path} has a {min(not_numbers)} that is not a number; fix it or leave the run out")
    if not records:
        raise UserError(f"{path} has no records yet; wait for the first one or leave the run out")
    return Run(directory, _read_settings(directory), records)


def _read_settings(directory: Path) -> dict[str, Any]:
    """Return config.yaml updated by summary.json. An unfinished run has its world size in its newest checkpoint."""
    settings: dict[str, Any] = {}
    finished = (directory / SUMMARY_FILE).exists()
    for name in (CONFIG_FILE, SUMMARY_FILE if finished else MANIFEST_FILE):
        path = directory / name
        if name == MANIFEST_FILE:
            path = follow_link(directory / LATEST_CHECKPOINT) / name
        try:
            text = path.read_text(encoding="utf-8")
            loaded = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, yaml.YAMLError):
            loaded = None
        if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
            raise UserError(f"{path} cannot be read as a mapping; fix it, or delete it to plot without it")
        settings.update({"world_size": loaded.get("world_size")} if name == MANIFEST_FILE else loaded)
    return settings
