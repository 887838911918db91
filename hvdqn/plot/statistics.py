"""Statistics over the seeds of a curve.

They follow Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice": bootstrap
intervals over seeds, and the interquartile mean, which a single lucky or failed seed does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hvdqn.errors import UserError
from hvdqn.plot.groups import Group
from hvdqn.plot.runs import Run

if TYPE_CHECKING:
    from hvdqn.plot.runs import Array

BOOTSTRAP_RESAMPLES = 4000
GRID_POINTS = 400
MIN_SEEDS_FOR_INTERQUARTILE_MEAN = 4
MIN_POINTS_FOR_SMOOTHING = 20
# With 3 seeds, the bootstrap band contains the true mean in three of four cases; with 10 seeds in nine of ten.
MIN_SEEDS_FOR_BOOTSTRAP = 10


@dataclass(frozen=True)
class Curve:
    """Hold the arrays that are drawn for one group, `[points]` each; a line that is None is not drawn."""

    x: Array
    line: Array
    band: tuple[Array, Array] | None = None
    dashed: Array | None = None
    pale: Array | None = None
    notes: tuple[str, ...] = ()
    """Explanations for the reader, printed below the figure."""


def summarize(group: Group, x: str, y: str, *, only_line: bool = False, smooth: int | None = None) -> Curve:
    """Return the curve of a group: statistics over several runs, or a single run, smoothed if it is long.

    With `only_line`, the curve has no band, no dashed line and no pale line. `smooth` is the number of points over
    which each run is averaged; None: a long single run over 5% of its points.

    Raises:
        UserError: there is no x that all runs reach.
    """
    if len(group.runs) == 1:
        return _summarize_single(group.runs[0], x, y, only_line, smooth)
    curves = [curve_of(run, x, y, smooth) for run in group.runs]
    try:
        grid, values = common_grid(curves)
    except ValueError as error:
        raise UserError(
            f"the runs of '{group.label}' have no common range of {x}: {error}; "
            f"plot them separately, or separate them with --group"
        ) from None
    notes, band, dashed = [*smoothing_note(smooth), "mean over seeds"], None, None
    if not only_line:
        band = bootstrap_band(values)
        too_few = len(values) < MIN_SEEDS_FOR_BOOTSTRAP
        notes.append(f"band: bootstrap 95% interval{', too narrow for so few seeds' * too_few}")
        if len(values) >= MIN_SEEDS_FOR_INTERQUARTILE_MEAN:
            dashed = interquartile_mean(values)
            notes.append("dashed: interquartile mean")
    ends = [xs[-1] for xs, _ in curves]
    if min(ends) < 0.95 * max(ends):
        shortest = group.runs[ends.index(min(ends))].directory.name
        notes.append(f"{group.label} ends where its shortest run, {shortest}, ends")
    return Curve(grid, values.mean(axis=0), band, dashed, notes=tuple(notes))


def curve_of(run: Run, x: str, y: str, smooth: int | None) -> tuple[Array, Array]:
    """Return x and y of a run, `[points]` each, with the moving mean over `smooth` points, if that is given."""
    xs, values = run.curve(x, y)
    return (xs, moving_mean(values, smooth // 2)) if smooth and smooth > 1 else (xs, values)


def smoothing_note(smooth: int | None) -> list[str]:
    """Return what the reader must know of smoothing, if anything."""
    return [f"moving mean over {smooth} points"] if smooth and smooth > 1 else []


def _summarize_single(run: Run, x: str, y: str, only_line: bool, smooth: int | None) -> Curve:
    xs, values = run.curve(x, y)
    if smooth is not None:
        xs, line = curve_of(run, x, y, smooth)
        pale = values if smooth > 1 and not only_line else None
        return Curve(xs, line, pale=pale, notes=tuple(smoothing_note(smooth)))
    xs_of_std, std = run.curve(x, y.removesuffix("_mean") + "_std")
    if np.array_equal(xs, xs_of_std):
        if only_line:
            return Curve(xs, values)
        band = (values - std, values + std)
        return Curve(
            xs, values, band, notes=("band of a single run: ± one standard deviation over episodes",)
        )
    if len(xs) < MIN_POINTS_FOR_SMOOTHING:
        return Curve(xs, values)
    if only_line:
        return Curve(xs, smooth_share(values), notes=("single run, smoothed",))
    return Curve(xs, smooth_share(values), pale=values, notes=("single run, smoothed", "pale: as recorded"))


def bootstrap_band(values: Array, confidence: float = 0.95, seed: int = 0) -> tuple[Array, Array]:
    """Return the percentile bootstrap interval of the mean over seeds.

    Args:
        values: `[seeds, points]`.
        confidence: the share of resampled means inside the band.
        seed: the seed of the resampling; it is fixed so that the same runs give the same picture.

    Returns:
        The lower and the upper edge, `[points]` each.
    """
    seeds = len(values)
    # Row i counts how often resample i contains each seed, so one matrix product gives the means of all resamples.
    counts = np.random.default_rng(seed).multinomial(seeds, [1 / seeds] * seeds, size=BOOTSTRAP_RESAMPLES)
    means = counts @ values / seeds
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail], axis=0)
    return low, high


def interquartile_mean(values: Array) -> Array:
    """Return the mean without the lowest and the highest quarter of the seeds: `[seeds, points]` -> `[points]`.

    Each quarter is rounded down to whole seeds.
    """
    cut = len(values) // 4
    middle = np.sort(values, axis=0)[cut : len(values) - cut]
    return np.asarray(middle.mean(axis=0))


def common_grid(curves: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Return x `[grid]` and y `[curves, grid]` over the range that all curves `([points], [points])` cover.

    If all curves have the same x, and not too many, the points stay as they are. Otherwise interpolate linearly.

    Raises:
        ValueError: no x is covered by all curves.
    """
    first = curves[0][0]
    if len(first) <= GRID_POINTS and all(np.array_equal(x, first) for x, _ in curves):
        return first, np.stack([y for _, y in curves])
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if start > end:
        raise ValueError(f"one begins at {start:,.0f}, another ends at {end:,.0f}")
    grid = np.linspace(start, end, min(GRID_POINTS, max(2, *(len(x) for x, _ in curves))))
    return grid, np.stack([np.interp(grid, x, y) for x, y in curves])


def smooth_share(y: Array, share: float = 0.05) -> Array:
    """Return the moving mean over a window of a share of all points: `[points]` -> `[points]`."""
    return moving_mean(y, max(1, round(len(y) * share / 2)))


def moving_mean(y: Array, radius: int) -> Array:
    """Return the mean over each point and `radius` points on either side: `[points]` -> `[points]`.

    The window is narrower near the ends.
    """
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    radii = np.minimum(np.minimum(index, len(y) - 1 - index), radius)
    return np.asarray((total[index + radii + 1] - total[index - radii]) / (2 * radii + 1))
