"""Write the curves of a plot as files for other programs: CSV, and scores as JSON for rliable."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hvdqn.errors import UserError
from hvdqn.metrics import finite
from hvdqn.plot.groups import Group, Panel
from hvdqn.plot.statistics import common_grid, curve_of, summarize

if TYPE_CHECKING:
    from hvdqn.plot.runs import Array


def write_csv(path: Path, panels: list[Panel], x: str, smooth: int | None) -> None:
    """Write one row per point of each curve: the mean over runs, its band and the interquartile mean, where drawn.

    Raises:
        OSError: the file cannot be written.
        UserError: the runs of a curve have no common range of x.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["env", "curve", "runs", "key", x, "mean", "low", "high", "interquartile_mean"])
        for panel in panels:
            for group in panel.groups:
                curve = summarize(group, x, panel.y, smooth=smooth)
                columns = [curve.x, curve.line, *(curve.band or (None, None)), curve.dashed]
                for point in range(len(curve.x)):
                    numbers = ["" if column is None else column[point] for column in columns]
                    writer.writerow([panel.env, group.label, len(group.runs), panel.y, *numbers])


def write_scores(path: Path, panels: list[Panel], x: str, smooth: int | None) -> None:
    """Write `scores` as JSON, see `scores`.

    Raises:
        OSError: the file cannot be written.
        UserError: the runs do not fill the arrays.
    """
    path.write_text(json.dumps(finite(scores(panels, x, smooth)), allow_nan=False) + "\n", encoding="utf-8")


def scores(panels: list[Panel], x: str, smooth: int | None) -> dict[str, Any]:
    """Return the curves of single runs as arrays that rliable takes.

    Returns:
        `scores`: for each curve an array `[runs, tasks, points]`, where a task is an environment;
        `tasks`: the environments; `x`: for each task the `points` on the x-axis; `x_key` and `y_key`: what is shown.

    Raises:
        UserError: a curve has no runs, or another number of runs, in some environment, or there is no common range.
    """
    labels = list(dict.fromkeys(group.label for panel in panels for group in panel.groups))
    for label in labels:
        counts = {panel.env: len(runs_of(panel, label)) for panel in panels}
        if len(set(counts.values())) > 1:
            described = ", ".join(f"{count} in {env}" for env, count in counts.items())
            raise UserError(f"--json needs as many runs in each environment, and '{label}' has {described}")
    grids, tables = zip(*(table_of(panel, labels, x, smooth) for panel in panels), strict=True)
    points = max(len(grid) for grid in grids)
    values: dict[str, Any] = {}
    rows = np.cumsum([0, *(len(runs_of(panels[0], label)) for label in labels)])
    resampled = [resample(grid, table, points) for grid, table in zip(grids, tables, strict=True)]
    stacked = np.stack([table for _, table in resampled], axis=1)  # [runs of all curves, tasks, points]
    for label, first, end in zip(labels, rows, rows[1:], strict=False):
        values[label] = stacked[first:end].tolist()
    return {
        "scores": values,
        "tasks": [panel.env for panel in panels],
        "x": {panel.env: grid.tolist() for panel, (grid, _) in zip(panels, resampled, strict=True)},
        "x_key": x,
        "y_key": [panel.y for panel in panels],
    }


def runs_of(panel: Panel, label: str) -> list[Any]:
    """Return the runs of a curve in a panel; none if it is not there."""
    return next((group.runs for group in panel.groups if group.label == label), [])


def table_of(panel: Panel, labels: list[str], x: str, smooth: int | None) -> tuple[Array, Array]:
    """Return x `[points]` and y `[runs of all curves, points]` of a panel, in the order of the labels.

    Raises:
        UserError: there is no x that all runs reach.
    """
    runs = Group(panel.env, [run for label in labels for run in runs_of(panel, label)])
    try:
        return common_grid([curve_of(run, x, panel.y, smooth) for run in runs.runs])
    except ValueError as error:
        raise UserError(f"the runs in {panel.env} have no common range of {x}: {error}") from None


def resample(grid: Array, table: Array, points: int) -> tuple[Array, Array]:
    """Return x `[points]` and y `[runs, points]`, interpolated linearly unless there are as many points already."""
    if len(grid) == points:
        return grid, table
    new = np.linspace(grid[0], grid[-1], points)
    return new, np.stack([np.interp(new, grid, row) for row in table])
