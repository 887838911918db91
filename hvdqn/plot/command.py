"""The command line of `hvdqn plot`."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hvdqn.config import parse_flags
from hvdqn.errors import UserError
from hvdqn.metrics import METRICS_FILE
from hvdqn.paths import expanded
from hvdqn.plot.drawing import STYLE, draw
from hvdqn.plot.export import write_csv, write_scores
from hvdqn.plot.groups import Panel, arrange, rename
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
    labels: Annotated[
        str | None, tyro.conf.arg(metavar="NAMES", help_behavior_hint="(default: from --group)")
    ] = None
    """Names of the curves, in the order of the runs and joined by commas."""
    smooth: Annotated[
        int | None,
        tyro.conf.arg(
            metavar="POINTS", help_behavior_hint="(default: 5% of the points of a long single run)"
        ),
    ] = None
    """Average each run over this many neighbouring points; 0: draw what was recorded."""
    csv: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Write the curves as CSV. Without -o, there is no picture then."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Write the curve of each run as JSON for rliable: `scores` has an array [runs, environments, points] for each
    curve. Without -o, there is no picture then."""
    title: Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: none)")] = None
    """A title above the panels."""


def main(argv: Sequence[str]) -> int:
    """Run the `hvdqn plot` command; return 0, or 2 if the user's input is wrong."""
    try:
        for path in plot(parse_flags(PlotOptions, argv, "hvdqn plot")):
            print(path)
    except UserError as error:
        print(f"hvdqn plot: error: {error}", file=sys.stderr)
        return 2
    return 0


def plot(options: PlotOptions) -> list[Path]:
    """Draw the runs and write the files of their curves; return the paths of what was written.

    Raises:
        UserError: a run is unreadable or empty, a key is unknown, or a file cannot be written.
    """
    given = [expanded(path) for path in options.runs]
    if options.smooth is not None and options.smooth < 0:
        raise UserError(f"--smooth is {options.smooth}; give a number of points, or 0")
    out = expanded(options.out) if options.out else None
    if not out and not options.csv and not options.json:
        out = _default_folder(given) / "curves.png"
    if out and out.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"-o {out} is not a supported file format; use a name that ends in {' or '.join(SUFFIXES)}"
        )
    runs = read_runs(given)
    panels = arrange(runs, options.group, options.y)
    if options.labels is not None:
        panels = rename(panels, options.labels)
    written = []
    for path, write in ((options.csv, write_csv), (options.json, write_scores)):
        if path is not None:
            with _blame(expanded(path)):
                write(expanded(path), panels, options.x, options.smooth)
            written.append(expanded(path))
    if out is not None:
        _draw(out, panels, options)
        written.append(out)
    return written


def _draw(out: Path, panels: list[Panel], options: PlotOptions) -> None:
    """Draw the panels.

    Raises:
        UserError: matplotlib is missing, or the picture cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plot needs matplotlib, which is not installed; pip install 'hvdqn[plot]'")
    import matplotlib as mpl

    with _blame(out), mpl.rc_context(STYLE):
        figure = draw(panels, options.x, options.title, options.smooth)
        # Without a date, the same runs give the same SVG file.
        figure.savefig(out, dpi=200, metadata={"Date": None} if out.suffix.lower() == ".svg" else None)


@contextlib.contextmanager
def _blame(path: Path) -> Iterator[None]:
    """Make the folder of a file that the body writes.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        flag = "" if path.suffix.lower() not in SUFFIXES else " with -o"
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose another place{flag}"
        ) from None


def _default_folder(runs: Sequence[Path]) -> Path:
    """Return the run's own directory if there is only one, else the current directory."""
    if len(runs) != 1:
        return Path()
    return runs[0].parent if runs[0].name == METRICS_FILE else runs[0]
