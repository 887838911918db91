"""Draw panels of learning curves with matplotlib."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

from hvdqn.plot.groups import Group, Panel
from hvdqn.plot.statistics import MIN_POINTS_FOR_SMOOTHING, Curve, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The first six are those of Okabe and Ito, which colour-blind readers can distinguish, without their second blue.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#E377C2", "#000000", "#F0A800", "#7A28A8", "#8B4A2B", "#94C11F", "#9A9A9A",
)  # fmt: skip
LINES = ("-", "-.", ":")
# A panel with more curves shows only their lines, because overlapping bands cannot be told apart.
MAX_CURVES_WITH_BANDS = 4
STYLE: dict[Any, Any] = {  # some releases of matplotlib declare the keys as str, others as literals
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
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "svg.hashsalt": "hvdqn",
    "text.parse_math": False,  # a title may contain dollar signs
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


def draw(panels: list[Panel], x: str, title: str | None = None, smooth: int | None = None) -> Figure:
    """Return a figure with one axes per panel and one legend above all of them.

    Raises:
        UserError: the runs of a group have no common range of x.
    """
    from matplotlib.figure import Figure

    legend = legend_labels(panels)
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = (7.2, 4.2) if len(panels) == 1 else (4.6 * columns, 3.5 * rows)
    font_size = 9 if len(legend) <= 12 else 7
    legend_columns = _legend_columns(width, list(legend.values()), font_size)
    legend_height = 0.022 * font_size * math.ceil(len(legend) / legend_columns) + (0.3 if title else 0.0)
    height = max(height, 2.2 * legend_height) + legend_height  # the legend takes less than a third
    figure = Figure(figsize=(width, height), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    notes = shared_facts(panels)
    scale, x_label = _x_unit(panels, x)
    handles: dict[str, Any] = {}
    for index, (axes, panel) in enumerate(zip(all_axes, panels, strict=False)):
        only_line = len(panel.groups) > MAX_CURVES_WITH_BANDS
        for group in panel.groups:
            curve = summarize(group, x, panel.y, only_line=only_line, smooth=smooth)
            handles[group.label] = _draw_curve(axes, curve, list(legend).index(group.label), scale)
            notes += [note for note in curve.notes if note not in notes]
        _label_axes(axes, panel)
        if index + columns >= len(panels):
            axes.set_xlabel(x_label)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    # The title belongs to the legend: matplotlib would draw a figure's title over a legend outside the axes.
    figure.legend(
        [handles[label] for label in legend],
        list(legend.values()),
        loc="outside upper center",
        ncols=legend_columns,
        fontsize=font_size,
        title=title,
        title_fontsize=13,
    )
    if notes:
        text = textwrap.fill("; ".join(notes), width=int(width * 16))
        figure.supxlabel(text, fontsize=8, color="#666666")
    return figure


def legend_labels(panels: list[Panel]) -> dict[str, str]:
    """Return the legend text of each curve, keyed by the curve's label.

    The text ends with the number of seeds. If all curves have the same number, the note below the figure says it once
    instead (see `shared_facts`).
    """
    groups: dict[str, list[Group]] = {}
    for panel in panels:
        for group in panel.groups:
            groups.setdefault(group.label, []).append(group)
    if _common_seeds(panels) is not None:
        return {label: label for label in groups}
    texts = {}
    for label, members in groups.items():
        counts = sorted({len(group.runs) for group in members})
        seeds = members[0].seeds if len(counts) == 1 else f"{counts[0]} to {counts[-1]} runs"
        texts[label] = f"{label} ({seeds})"
    return texts


def shared_facts(panels: list[Panel]) -> list[str]:
    """Return short texts on what all curves have in common (seeds, ranks), for the note below the figure."""
    facts = []
    seeds = _common_seeds(panels)
    if seeds is not None:
        several = len({group.label for panel in panels for group in panel.groups}) > 1
        facts.append(f"{seeds} per curve" if several else seeds)
    sizes = {run.settings.get("world_size") for panel in panels for run in panel.runs}
    if len(sizes) == 1 and sizes != {None} and sizes != {1}:
        facts.append(f"{sizes.pop()} ranks")
    return facts


def _common_seeds(panels: list[Panel]) -> str | None:
    """Return the number of seeds in words if all curves have the same, else None."""
    seeds = {group.seeds for panel in panels for group in panel.groups}
    return seeds.pop() if len(seeds) == 1 else None


def _legend_columns(width: float, texts: list[str], font_size: float) -> int:
    """Return how many columns of these texts fit into a figure of this width in inches."""
    column_width = font_size * (0.0072 * max(map(len, texts)) + 0.055)  # the text, then the line and the gap
    rows = math.ceil(len(texts) / max(1, int(width / column_width)))
    return math.ceil(len(texts) / rows)  # fill the columns evenly


def _draw_curve(axes: Axes, curve: Curve, index: int, scale: float) -> Any:
    """Draw a curve in the colour number `index`, with x divided by `scale`; return its line, for the legend."""
    colour, style = COLOURS[index % len(COLOURS)], LINES[index // len(COLOURS) % len(LINES)]
    x = curve.x / scale
    if curve.band is not None:
        axes.fill_between(x, *curve.band, color=colour, alpha=0.12, linewidth=0)
    if curve.pale is not None:
        axes.plot(x, curve.pale, color=colour, alpha=0.25, linewidth=0.8)
    if curve.dashed is not None:
        axes.plot(x, curve.dashed, color=colour, linestyle="--", linewidth=1.1)
    marker = "o" if len(x) < MIN_POINTS_FOR_SMOOTHING else None
    (line,) = axes.plot(
        x, curve.line, color=colour, linestyle=style, linewidth=1.8, marker=marker, markersize=3.5
    )
    return line


def _label_axes(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(panel.env, loc="left", fontsize=11)
    axes.set_ylabel(_y_label(panel))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _x_unit(panels: list[Panel], x: str) -> tuple[float, str]:
    """Return the number by which x is divided and the axis label; wall time becomes seconds, minutes or hours."""
    if x == "env_steps":
        return 1.0, "Env steps (all ranks)"
    longest = max(record.get(x) or 0.0 for panel in panels for run in panel.runs for record in run.records)
    for seconds, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if longest >= 3 * seconds:
            return seconds, f"Wall time ({unit})"
    return 1.0, "Wall time (seconds)"


def _y_label(panel: Panel) -> str:
    label = Y_LABELS.get(panel.y, panel.y)
    if panel.y == "eval_return_mean":
        records = [record for run in panel.runs for record in run.records if panel.y in record]
        episodes = {record.get("eval_episodes") for record in records}
        if len(episodes) == 1 and None not in episodes:
            return f"{label} (mean of {episodes.pop():,.0f} episodes)"
    return label
