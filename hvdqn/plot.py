"""`hvdqn plot`: learning curves of one or many runs as PNG or SVG. Never imports torch.

Statistics follow Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice":
bootstrap intervals over seeds, and the interquartile mean, which one lucky or failed seed does not move.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
import yaml

from hvdqn.config import Config, did_you_mean, parse_flags, settings_of_same_curve
from hvdqn.errors import UserError
from hvdqn.metrics import METRICS_FILE, SUMMARY_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SUFFIXES = (".png", ".svg")
BOOTSTRAP_RESAMPLES = 4000
GRID_POINTS = 400
SEEDS_FOR_INTERQUARTILE_MEAN = 4
POINTS_FOR_SMOOTHING = 20
# With 3 seeds a bootstrap band holds the true mean in three cases of four, with 10 in nine of ten.
SEEDS_FOR_BOOTSTRAP = 10
MANIFEST = "checkpoints/latest/manifest.json"

# What every curve is told by.
BASE = ("preset", "env", "world_size")

# Okabe & Ito's colours, told apart by colour-blind readers; their yellow is too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "-.", ":")
STYLE: dict[Any, Any] = {  # keys are str in some releases of matplotlib, literals in others
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#222222",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.fontsize": 9,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "svg.hashsalt": "hvdqn",
    "text.parse_math": False,  # a title may have dollars in it
}
Y_LABELS = {
    "eval_return_mean": "Evaluation return",
    "episode_return_mean": "Training episode return",
    "episode_length_mean": "Training episode length (env steps)",
    "loss": "Loss",
    "td_error": "TD error (mean absolute)",
    "q_mean": "Mean Q-value",
    "epsilon": "Epsilon",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm (before clipping)",
    "env_steps_per_second": "Env steps per second",
    "updates_per_second": "Updates per second",
}


@dataclass(frozen=True)
class PlotOptions:
    """Draw learning curves of one or many runs.

    Runs that differ only in their seed make one curve: their mean with a bootstrap 95% band, and their
    interquartile mean (dashed) from four seeds on. Every environment has its own panel.
    """

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN...", help_behavior_hint="(required)"),
    ]
    """Run directories, or directories that hold run directories at any depth."""
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            aliases=["-o"],
            metavar="FILE",
            help_behavior_hint="(default: curves.png, in RUN where one is given, else in this directory)",
        ),
    ] = None
    """FILE.png or FILE.svg."""
    x: Literal["env_steps", "wall_seconds"] = "env_steps"
    """What the curves run over."""
    y: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="KEY",
            help_behavior_hint="(default: eval_return_mean if there are evaluations along the way, else "
            "episode_return_mean)",
        ),
    ] = None
    """Any key of metrics.jsonl."""
    group: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="KEYS",
            help_behavior_hint="(default: preset,env,np, and whatever setting but the seed differs beyond these)",
        ),
    ] = None
    """What makes a curve, by comma: keys of config.yaml or summary.json, `np` for the world size."""
    title: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: none)")] = None
    """Above the panels."""


@dataclass(frozen=True)
class Run:
    """One run as read from its directory."""

    directory: Path
    settings: dict[str, Any]
    """config.yaml under summary.json: what a run may be grouped by."""
    records: list[dict[str, Any]]

    def name_of(self, key: str) -> str:
        """A setting as text; `?` where neither file says."""
        value = self.settings.get(key)
        if isinstance(value, list):
            return " ".join(map(str, value)) or "none"
        return "?" if value is None else str(value) or "none"

    def curve(self, x: str, y: str) -> tuple[Array, Array]:
        """Points `[points]`, `[points]` by rising x; the last one counts where several share an x."""
        points = {r[x]: r[y] for r in self.records if r.get(x) is not None and r.get(y) is not None}
        xs = sorted(points)
        return np.array(xs, dtype=np.float64), np.array([points[at] for at in xs], dtype=np.float64)


@dataclass(frozen=True)
class Group:
    """The runs of one environment that make one curve."""

    label: str
    runs: list[Run]

    @property
    def legend(self) -> str:
        """The label and how many seeds stand behind the curve."""
        seeds = {run.settings.get("seed") for run in self.runs}
        word = "seed" if len(seeds) == len(self.runs) and None not in seeds else "run"
        return f"{self.label} ({len(self.runs)} {word}{'s' if len(self.runs) > 1 else ''})"


@dataclass(frozen=True)
class Panel:
    """One environment's axes."""

    env: str
    groups: list[Group]
    y: str

    @property
    def records(self) -> Iterator[dict[str, Any]]:
        """All records of all runs."""
        return (record for group in self.groups for run in group.runs for record in run.records)


def main(argv: Sequence[str]) -> int:
    """The `hvdqn plot` command; returns the exit code: 0, or 2 where the user's input is wrong."""
    try:
        print(plot(parse_flags(PlotOptions, argv, "hvdqn plot")))
    except UserError as error:
        print(f"hvdqn plot: error: {error}", file=sys.stderr)
        return 2
    return 0


def plot(options: PlotOptions) -> Path:
    """Draw what the options say and return where the picture lies.

    Raises:
        UserError: an unreadable or empty run, an unknown key, an output that cannot be written.
    """
    out = options.out or _beside(options.runs) / "curves.png"
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"-o {out} is no picture that can be drawn; end it in {' or '.join(SUFFIXES)}")
    runs = read_runs(options.runs)
    panels = arrange(runs, options.group, options.y)
    for package in ("matplotlib", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"plot needs {package}, which is not installed; pip install 'hvdqn[plot]'")
    import matplotlib as mpl

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE):
            figure = draw(panels, options.x, options.title)
            figure.savefig(out, dpi=200, metadata={"Date": None} if out.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror or error}; give another place with -o"
        ) from None
    return out


def _beside(runs: Sequence[Path]) -> Path:
    if len(runs) != 1:
        return Path()
    return runs[0].parent if runs[0].name == METRICS_FILE else runs[0]


# Reading


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs at or below the paths, each once.

    Raises:
        UserError: no run there, or a run that holds nothing to draw or is damaged.
    """
    directories = [directory for path in paths for directory in _run_directories(path)]
    if not directories:
        raise UserError("no RUN given; name one or more run directories")
    once = {directory.resolve(): directory for directory in directories}
    return [_read_run(directory) for directory in once.values()]


def _run_directories(path: Path) -> list[Path]:
    if path.name == METRICS_FILE:
        path = path.parent
    try:
        if not path.is_dir():
            what = "is no directory" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}; give the run directory that training printed")
        if (path / METRICS_FILE).exists():
            return [path]
        # An empty file is a run that has only just begun: no reason to refuse the others around it.
        found = sorted(file.parent for file in path.rglob(METRICS_FILE) if file.stat().st_size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable") from None
    if not found:
        raise UserError(
            f"{path} holds no {METRICS_FILE} with records, at any depth; give a run directory of training"
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
    strange = {
        key
        for record in records
        for key, value in record.items()
        if not isinstance(value, (int, float, type(None)))
    }
    if strange:
        raise UserError(f"{path} holds a {min(strange)} that is no number; mend it or leave the run out")
    if not records:
        raise UserError(f"{path} holds no records yet; wait for the run's first one or leave the run out")
    return Run(directory, _settings(directory), records)


def _settings(directory: Path) -> dict[str, Any]:
    """config.yaml, then summary.json over it, or what a checkpoint says of a run that is still going."""
    settings: dict[str, Any] = {}
    finished = (directory / SUMMARY_FILE).exists()
    for name in ("config.yaml", SUMMARY_FILE if finished else MANIFEST):
        path = directory / name
        try:
            text = path.read_text(encoding="utf-8")
            loaded = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, yaml.YAMLError):
            loaded = None
        if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
            raise UserError(f"{path} cannot be read as a mapping; mend it, or delete it to plot without it")
        settings.update({"world_size": loaded.get("world_size")} if name == MANIFEST else loaded)
    return settings


# Grouping


def arrange(runs: list[Run], group: str | None, y: str | None) -> list[Panel]:
    """Panels by environment, curves by the group's keys, both in the order of the runs.

    Raises:
        UserError: a key that no run has.
    """
    keys = _group_keys(runs, group)
    usual = _usual(runs, keys) if group is None else {}
    panels: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        told = [key for key in keys if key != "env" and run.name_of(key) != usual.get(key)]
        label = ", ".join(_label(key, run.name_of(key)) for key in told)
        panels.setdefault(run.name_of("env"), {}).setdefault(label, []).append(run)
    return [
        Panel(
            env,
            [Group(label or "all runs", members) for label, members in groups.items()],
            _y_key([run for members in groups.values() for run in members], y),
        )
        for env, groups in panels.items()
    ]


def _group_keys(runs: list[Run], group: str | None) -> list[str]:
    known = {key for run in runs for key in run.settings}
    if group is None:
        base = [key for key in BASE if key in known]
        distinguishing = [key for key in Config().flat() if key not in settings_of_same_curve()]
        return [*base, *(key for key in distinguishing if _splits(runs, base, key))]
    words = [word.strip().replace("-", "_") for word in group.split(",") if word.strip()]
    keys = ["world_size" if word == "np" else word for word in words]
    for key in keys:
        if key not in known | {"env"}:
            hint = did_you_mean(key, sorted(known)) or "; such as preset,env,np"
            raise UserError(f"--group {key} stands in no run's config.yaml or {SUMMARY_FILE}{hint}")
    return keys


def _usual(runs: list[Run], keys: list[str]) -> dict[str, str]:
    """What most curves have in common, beyond `BASE`, goes without saying: of an ablation, only what was removed."""
    curves = {tuple(map(run.name_of, keys)) for run in runs}
    usual = {}
    for at, key in enumerate(keys):
        value, count = Counter(curve[at] for curve in curves).most_common(1)[0]
        if key not in BASE and 2 * count > len(curves):
            usual[key] = value
    return usual


def _splits(runs: list[Run], keys: list[str], key: str) -> bool:
    """Whether `key` takes several values among runs that agree in all of `keys`."""
    coarse = {tuple(map(run.name_of, keys)) for run in runs}
    return len({tuple(map(run.name_of, [*keys, key])) for run in runs}) > len(coarse)


def _label(key: str, value: str) -> str:
    if key == "preset":
        return "no preset" if value == "none" else value.replace(",", " + ")
    return f"{'np' if key == 'world_size' else key.replace('_', ' ')} {value}"


def _y_key(runs: list[Run], y: str | None) -> str:
    """What one panel shows.

    Raises:
        UserError: a run has no such key, or nothing that a learning curve is made of.
    """

    def points(run: Run, key: str) -> int:
        return sum(record.get(key) is not None for record in run.records)

    if y is None:
        if all(points(run, "eval_return_mean") > 1 for run in runs):
            return "eval_return_mean"
        y = "episode_return_mean"
        if not any(points(run, y) for run in runs) and any(points(run, "eval_return_mean") for run in runs):
            y = "eval_return_mean"
    for run in runs:
        if not points(run, y):
            known = sorted({key for record in run.records for key in record})
            hint = did_you_mean(y, known) or f"; there are {', '.join(known)}"
            raise UserError(f"{run.directory / METRICS_FILE} holds no {y} to draw{hint}")
    return y


# Statistics


def bootstrap_band(values: Array, confidence: float = 0.95, seed: int = 0) -> tuple[Array, Array]:
    """Percentile bootstrap interval of the mean over seeds.

    Args:
        values: `[seeds, points]`.
        confidence: share of resampled means inside the band.
        seed: of the resampling, so that one set of runs gives one picture.

    Returns:
        Lower and upper edge, `[points]` each.
    """
    seeds = len(values)
    # A resample is how often it drew each seed; all its means are then one matrix product.
    drawn = np.random.default_rng(seed).multinomial(seeds, [1 / seeds] * seeds, size=BOOTSTRAP_RESAMPLES)
    means = drawn @ values / seeds
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail], axis=0)
    return low, high


def interquartile_mean(values: Array) -> Array:
    """Mean of the middle half of the seeds at each point: `[seeds, points]` -> `[points]`."""
    from scipy import stats

    return np.asarray(stats.trim_mean(values, 0.25, axis=0), dtype=np.float64)


def common_grid(curves: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Curves `([points], [points])` over the range that all cover: x `[grid]` and y `[curves, grid]`.

    Points that all share are kept as they are, unless they are very many; others are interpolated linearly.

    Raises:
        ValueError: there is no x that all curves cover.
    """
    first = curves[0][0]
    if len(first) <= GRID_POINTS and all(np.array_equal(x, first) for x, _ in curves):
        return first, np.stack([y for _, y in curves])
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if start > end:
        raise ValueError(f"one begins at {start:,.0f}, another ends at {end:,.0f}")
    grid = np.linspace(start, end, min(GRID_POINTS, max(2, *(len(x) for x, _ in curves))))
    return grid, np.stack([np.interp(grid, x, y) for x, y in curves])


def smoothed(y: Array, share: float = 0.05) -> Array:
    """Centred moving mean over a share of the points: `[points]` -> `[points]`; narrower at the ends."""
    reach = max(1, round(len(y) * share / 2))
    total = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    reach_here = np.minimum(np.minimum(at, len(y) - 1 - at), reach)
    return np.asarray((total[at + reach_here + 1] - total[at - reach_here]) / (2 * reach_here + 1))


@dataclass(frozen=True)
class Curve:
    """What is drawn for one group. All arrays are `[points]`; None is not drawn."""

    x: Array
    line: Array
    band: tuple[Array, Array] | None = None
    dashed: Array | None = None
    pale: Array | None = None
    notes: tuple[str, ...] = ()
    """What the reader must know to read it."""


def summarise(group: Group, x: str, y: str) -> Curve:
    """The curve of a group: statistics over its seeds, or one run as it is.

    Raises:
        UserError: its runs share no stretch of x.
    """
    if len(group.runs) == 1:
        return _single(group.runs[0], x, y)
    curves = [run.curve(x, y) for run in group.runs]
    try:
        grid, values = common_grid(curves)
    except ValueError as error:
        raise UserError(
            f"the runs of '{group.label}' share no stretch of {x}: {error}; "
            f"give them apart, or tell them apart with --group"
        ) from None
    few = len(values) < SEEDS_FOR_BOOTSTRAP
    notes = [f"mean over seeds with bootstrap 95% band{', too narrow for so few seeds' * few}"]
    dashed = None
    if len(values) >= SEEDS_FOR_INTERQUARTILE_MEAN:
        dashed = interquartile_mean(values)
        notes.append("dashed: interquartile mean")
    ends = [at[-1] for at, _ in curves]
    if min(ends) < 0.95 * max(ends):
        shortest = group.runs[ends.index(min(ends))].directory.name
        notes.append(f"{group.label} ends where {shortest}, its shortest run, ends")
    return Curve(grid, values.mean(axis=0), bootstrap_band(values), dashed, notes=tuple(notes))


def _single(run: Run, x: str, y: str) -> Curve:
    at, values = run.curve(x, y)
    at_std, std = run.curve(x, y.removesuffix("_mean") + "_std")
    if np.array_equal(at, at_std):
        band = (values - std, values + std)
        return Curve(at, values, band, notes=("single run with ± one standard deviation over episodes",))
    if len(at) < POINTS_FOR_SMOOTHING:
        return Curve(at, values)
    return Curve(at, smoothed(values), pale=values, notes=("single run, smoothed; pale: as recorded",))


# Drawing


def draw(panels: list[Panel], x: str, title: str | None = None) -> Figure:
    """A figure with one axes for each panel.

    Raises:
        UserError: the runs of a group share no stretch of x.
    """
    from matplotlib.figure import Figure

    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (7.2, 4.5) if len(panels) == 1 else (4.6 * columns, 3.5 * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    labels = list(dict.fromkeys(group.label for panel in panels for group in panel.groups))
    notes: dict[str, None] = {}
    scale, x_label = _x_unit(panels, x)
    for at, (axes, panel) in enumerate(zip(all_axes, panels, strict=False)):
        for group in panel.groups:
            curve = summarise(group, x, panel.y)
            _draw_curve(axes, curve, group.legend, labels.index(group.label), scale)
            notes.update(dict.fromkeys(curve.notes))
        _finish(axes, panel)
        if at + columns >= len(panels):
            axes.set_xlabel(x_label)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    _legends(figure, list(all_axes[: len(panels)]), title)
    if notes:
        figure.supxlabel(_wrapped("; ".join(notes), figure), fontsize=8, color="#666666")
    return figure


def _draw_curve(axes: Axes, curve: Curve, label: str, at: int, scale: float) -> None:
    colour, line = COLOURS[at % len(COLOURS)], LINES[at // len(COLOURS) % len(LINES)]
    x = curve.x / scale
    if curve.band is not None:
        axes.fill_between(x, *curve.band, color=colour, alpha=0.18, linewidth=0)
    if curve.pale is not None:
        axes.plot(x, curve.pale, color=colour, alpha=0.4, linewidth=0.9)
    if curve.dashed is not None:
        axes.plot(x, curve.dashed, color=colour, linestyle="--", linewidth=1.1)
    marker = "o" if len(x) < POINTS_FOR_SMOOTHING else None
    axes.plot(
        x, curve.line, color=colour, linestyle=line, linewidth=1.8, marker=marker, markersize=3.5, label=label
    )


def _finish(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(panel.env, loc="left", fontsize=11)
    axes.set_ylabel(_y_label(panel))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _legends(figure: Figure, all_axes: list[Axes], title: str | None) -> None:
    """The title, over one legend outside the panels where all would say the same, else with one in each."""
    handles, texts = all_axes[0].get_legend_handles_labels()
    if all(axes.get_legend_handles_labels()[1] == texts for axes in all_axes):
        columns = max(1, int(figure.get_figwidth() * 12) // max(map(len, texts)))
        # The title is the legend's: a figure's own would lie under a legend outside the axes.
        shape = {"ncols": min(len(texts), columns), "title": title, "title_fontsize": 13}
        figure.legend(handles, texts, loc="outside upper center", **shape)
    else:
        for axes in all_axes:
            axes.legend(loc="best")
        if title:
            figure.suptitle(title, fontsize=13)


def _x_unit(panels: list[Panel], x: str) -> tuple[float, str]:
    """What to divide x by, and the axis label."""
    if x == "env_steps":
        return 1.0, "Env steps (all ranks)"
    longest = max(record.get(x) or 0.0 for panel in panels for record in panel.records)
    for seconds, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if longest >= 3 * seconds:
            return seconds, f"Wall time ({unit})"
    return 1.0, "Wall time (seconds)"


def _y_label(panel: Panel) -> str:
    label = Y_LABELS.get(panel.y, panel.y)
    if panel.y == "eval_return_mean":
        episodes = {record.get("eval_episodes") for record in panel.records if panel.y in record}
        if len(episodes) == 1 and None not in episodes:
            return f"{label} (mean of {episodes.pop():,.0f} episodes)"
    return label


def _wrapped(text: str, figure: Figure) -> str:
    """Lines that fit under the figure in small print."""
    return textwrap.fill(text, width=int(figure.get_figwidth() * 16))
