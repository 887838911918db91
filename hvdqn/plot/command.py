"""The command line of `hvdqn plot`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hvdqn.config import parse_flags
from hvdqn.errors import UserError
from hvdqn.metrics import METRICS_FILE
from hvdqn.paths import expanded
from hvdqn.plot.drawing import STYLE, draw
from hvdqn.plot.groups import arrange
from hvdqn.plot.runs import read_runs

SUFFIXES = (".png", ".svg")


@dataclass(frozen=True)
class PlotOptions:
    """Draw the learning curves of one or many runs.

    Runs that differ only in their seed make one curve: their mean with a bootstrap 95% band, and from four seeds on
    their interquartile mean (dashed). Each environment has its own panel. A panel with many curves shows only means.
    """

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN...", help_behavior_hint="(required)"),
    ]
    """Run directories, or directories that contain run directories at any depth."""
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            aliases=["-o"],
            metavar="FILE",
            help_behavior_hint="(default: curves.png, inside RUN if only one is given, else in this directory)",
        ),
    ] = None
    """FILE.png or FILE.svg."""
    x: Literal["env_steps", "wall_seconds"] = "env_steps"
    """The quantity on the x-axis."""
    y: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="KEY",
            help_behavior_hint="(default: eval_return_mean if the runs were evaluated during training, else "
            "episode_return_mean)",
        ),
    ] = None
    """The quantity on the y-axis: any key of metrics.jsonl."""
    group: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="KEYS",
            help_behavior_hint="(default: preset,env,np and every other setting but the seed that differs)",
        ),
    ] = None
    """Runs that agree in these comma-separated keys of config.yaml or summary.json make one curve. `np` is the number
    of ranks."""
    title: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: none)")] = None
    """A title above the panels."""


def main(argv: Sequence[str]) -> int:
    """Run the `hvdqn plot` command; return 0, or 2 if the user's input is wrong."""
    try:
        print(plot(parse_flags(PlotOptions, argv, "hvdqn plot")))
    except UserError as error:
        print(f"hvdqn plot: error: {error}", file=sys.stderr)
        return 2
    return 0


def plot(options: PlotOptions) -> Path:
    """Draw the runs and return the path of the picture.

    Raises:
        UserError: a run is unreadable or empty, a key is unknown, or the picture cannot be written.
    """
    given = [expanded(path) for path in options.runs]
    out = expanded(options.out) if options.out else _default_folder(given) / "curves.png"
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"-o {out} is not a supported file format; use a name that ends in {' or '.join(SUFFIXES)}"
        )
    runs = read_runs(given)
    panels = arrange(runs, options.group, options.y)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plot needs matplotlib, which is not installed; pip install 'hvdqn[plot]'")
    import matplotlib as mpl

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE):
            figure = draw(panels, options.x, options.title)
            # Without a date, the same runs give the same SVG file.
            figure.savefig(out, dpi=200, metadata={"Date": None} if out.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror or error}; choose another place with -o"
        ) from None
    return out


def _default_folder(runs: Sequence[Path]) -> Path:
    """Return the run's own directory if there is only one, else the current directory."""
    if len(runs) != 1:
        return Path()
    return runs[0].parent if runs[0].name == METRICS_FILE else runs[0]
