"""`hvdqn bench scaling`: weak and strong scaling over ranks of this machine, and what follows for more.

    hvdqn bench scaling --np 1,2,4 --engine mpi --preset atari

Weak: every rank keeps its environments and its minibatch. Strong: the job's stay the same, shared by the ranks. A rank
has as many threads in a small job as in the largest, or else threads would scale and not ranks.
Efficiency is the rate of a rank over that of the smallest job. The projection is described in `projection.py`.
"""

from __future__ import annotations

import json
import os
import textwrap
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdqn.bench import allreduce, loop
from hvdqn.bench.allreduce import Allreduce
from hvdqn.bench.jobs import ENGINES, available, bench
from hvdqn.bench.loop import Loop
from hvdqn.bench.projection import ASSUMPTION, FORMULAS, MODELS, SOURCE, Line, Projected, Work, fit, project
from hvdqn.bench.report import Parser, above_zero, print_table, write_json
from hvdqn.config import parse
from hvdqn.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROG = "hvdqn bench scaling"
PROJECTED_RANKS = (8, 64, 512)
HEADER = ("ranks", "env steps/s", "updates/s", "efficiency", "exposed comm")


@dataclass(frozen=True)
class Scaling:
    """What was measured, and what follows."""

    engine: str
    weak: list[Loop]
    strong: list[Loop]
    line: Line
    line_ranks: int
    projected: list[Projected]


def efficiencies(loops: Sequence[Loop]) -> list[float]:
    """Rate of a rank over that in the first job."""
    single = loops[0].env_steps_per_second / loops[0].world_size
    return [one.env_steps_per_second / one.world_size / single for one in loops]


def rows(loops: Sequence[Loop]) -> list[tuple[str, ...]]:
    """Of the table, under `HEADER`."""
    return [
        (
            f"{one.world_size}",
            f"{one.env_steps_per_second:,.0f}",
            f"{one.updates_per_second:,.1f}",
            f"{efficiency:.0%}",
            f"{one.exposed_share:.1%}",
        )
        for one, efficiency in zip(loops, efficiencies(loops), strict=True)
    ]


def shares(flags: Sequence[str], counts: Sequence[int]) -> dict[int, list[str]]:
    """Flags that give each of so many ranks its share of one rank's work; where it divides."""
    config = parse(flags, PROG)
    envs, batch = config.environment.envs_per_rank, config.replay.batch_per_rank
    return {
        n: ["--envs-per-rank", str(envs // n), "--batch-per-rank", str(batch // n)]
        for n in counts
        if envs % n == 0 and batch % n == 0
    }


def with_threads(flags: Sequence[str], most_ranks: int) -> list[str]:
    """Flags that give a rank of every job the threads that one of the largest has, unless the user says how many."""
    if parse(flags, PROG).parallel.threads_per_rank:
        return list(flags)
    return [*flags, "--threads-per-rank", str(max(1, len(os.sched_getaffinity(0)) // most_ranks))]


def timed(engine: str, ranks: int, seconds: float, flags: Sequence[str]) -> Loop:
    """One job.

    Raises:
        UserError: it failed, or had no update.
    """
    print(f"{ranks} rank{'s' * (ranks > 1)}: {' '.join(flags)}", flush=True)
    words = ["loop", "--seconds", str(seconds), *flags]
    found = loop.from_json(bench(words, engine if ranks > 1 else "", ranks))
    if not found.updates:
        raise UserError("no update fell into the time that was measured; raise --seconds")
    return found


def measure(options: Namespace, counts: Sequence[int], flags: Sequence[str]) -> Scaling:
    """Run all jobs, one after the other.

    Raises:
        UserError: one failed.
    """
    split = shares(flags, counts)
    weak = [timed(options.engine, n, options.seconds, flags) for n in counts]
    strong = [
        one if n == 1 else timed(options.engine, n, options.seconds, [*flags, *split[n]])
        for n, one in zip(counts, weak, strict=True)
        if n in split
    ]
    if left_out := [str(n) for n in counts if n not in split]:
        print(
            f"strong scaling leaves out {', '.join(left_out)} ranks: environments or minibatch do not divide by it"
        )
    show_measured(options.engine, weak, strong)
    job = bench(["allreduce", *flags], options.engine, max(counts))
    return projected(options.engine, weak, strong, allreduce.from_json(job["allreduce"])[0])


def projected(engine: str, weak: list[Loop], strong: list[Loop], messages: Allreduce) -> Scaling:
    """Add what follows for more ranks."""
    line = fit({4 * floats: seconds for floats, seconds in messages.seconds.items()})
    alone, most = weak[0], weak[-1]
    hidden = most.seconds_per_iteration["comm_hidden"] / most.updates_per_iteration
    work = Work(
        seconds=alone.iteration_seconds - alone.seconds_per_iteration["comm_exposed"],
        updates=alone.updates_per_iteration,
        # Ranks that were late for each other are in it too: no more can have been hidden than there was.
        hidden_seconds=min(hidden, messages.network_seconds),
    )
    counts = sorted({messages.world_size, *PROJECTED_RANKS})
    found = project(line, messages.world_size, 4 * messages.network_floats, work, counts)
    return Scaling(engine, weak, strong, line, messages.world_size, found)


def show_measured(engine: str, weak: Sequence[Loop], strong: Sequence[Loop]) -> None:
    """Print the tables of what was measured."""
    print_table(f"Weak scaling, {engine}: each rank's work stays", HEADER, rows(weak))
    print_table(f"Strong scaling, {engine}: the job's work stays", HEADER, rows(strong))


def show_projected(scaling: Scaling) -> None:
    """Print the table of what follows."""
    line = scaling.line
    print_table(
        f"Projected weak scaling from {scaling.line_ranks} ranks: an allreduce of n bytes took "
        f"{1e6 * line.latency:,.3g} us + n / {1e-6 / max(line.seconds_per_byte, 1e-15):,.4g} MB/s",
        ("ranks", *(f"{model}: us, efficiency" for model in MODELS)),
        [
            (str(ranks), *(f"{1e6 * one.allreduce_seconds:,.0f}, {one.efficiency:.0%}" for one in both))
            for ranks, both in by_ranks(scaling.projected).items()
        ],
    )
    for text in (*FORMULAS.values(), f"({SOURCE})", ASSUMPTION):
        print(text)


def by_ranks(found: Sequence[Projected]) -> Mapping[int, list[Projected]]:
    """Both models of each number of ranks, in the order of `MODELS`."""
    return {one.ranks: [other for other in found if other.ranks == one.ranks] for one in found}


def draw(scaling: Scaling, path: Path) -> None:
    """Efficiency over ranks, measured and projected, with the formulas."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from hvdqn.plot import COLOURS, STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 5.0), layout="constrained")
        axes = figure.subplots()
        for name, loops, colour in (
            ("weak", scaling.weak, COLOURS[0]),
            ("strong", scaling.strong, COLOURS[1]),
        ):
            x, y = [one.world_size for one in loops], efficiencies(loops)
            axes.plot(x, y, "o-", color=colour, label=f"{name} scaling, measured")
        for model, line in zip(MODELS, ("--", ":"), strict=True):
            points = [one for one in scaling.projected if one.model == model]
            x, y = [one.ranks for one in points], [one.efficiency for one in points]
            axes.plot(x, y, line, color=COLOURS[0], label=f"weak scaling, projected: {model}")
        _label(axes, scaling)
        figure.supxlabel(textwrap.fill(ASSUMPTION, 110), fontsize=8, color="#666666")
        figure.savefig(path, dpi=150)


def _label(axes: Axes, scaling: Scaling) -> None:
    first = scaling.weak[0]
    axes.set_title(f"{first.env}, {first.parameters:,} parameters, {scaling.engine}")
    axes.set_xscale("log", base=2)
    ranks = sorted({one.world_size for one in scaling.weak} | {one.ranks for one in scaling.projected})
    axes.set_xticks(ranks, [str(count) for count in ranks])
    axes.set_xlabel("Ranks")
    axes.set_ylabel("Efficiency: rate of a rank over that of one alone")
    axes.set_ylim(0, 1.1)
    axes.legend(loc="upper right")
    text = "\n".join((*FORMULAS.values(), "efficiency = work / (work + updates max(T - hidden, 0))", SOURCE))
    axes.text(0.02, 0.03, text, transform=axes.transAxes, fontsize=8, va="bottom")


def read(directory: Path) -> list[Loop]:
    """The loops that were timed into a directory, fewest ranks first.

    Raises:
        UserError: there are none.
    """
    try:
        files = sorted(directory.glob("*.json"))
        found = [loop.from_json(json.loads(path.read_text("utf-8"))) for path in files]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{directory}' holds a file that hvdqn bench loop did not write: {error!r}"
        ) from None
    if not found:
        raise UserError(f"'{directory}' holds no JSON of hvdqn bench loop; give the directory of all of them")
    return sorted(found, key=lambda one: one.world_size)


def rank_counts(text: str) -> list[int]:
    """What --np asks for, ascending.

    Raises:
        UserError: not whole numbers above 0, or fewer than two of them.
    """
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words) or len(set(words)) < 2:
        raise UserError(f"--np is '{text}'; give at least two numbers of ranks by comma, as in 1,2,4")
    return sorted({1, *map(int, words)})


def scale(options: Namespace, flags: Sequence[str]) -> None:
    """Measure, or read what was measured; print, write, draw.

    Raises:
        UserError: the input is wrong, or a job failed.
    """
    if options.read:
        if flags:
            raise UserError(f"{flags[0]} is of no use beside --read, which measures nothing; leave it out")
        print_table(f"Weak scaling, {options.read}", HEADER, rows(read(options.read)))
        return
    if not available():
        raise UserError("no launcher is installed here; run launch/setup.sh")
    if options.engine not in available():
        raise UserError(f"--engine {options.engine!r} is not installed; there are {', '.join(available())}")
    counts = rank_counts(options.np)
    scaling = measure(options, counts, with_threads(flags, max(counts)))
    show_projected(scaling)
    content: dict[str, Any] = {
        **asdict(scaling),
        "formulas": FORMULAS,
        "source": SOURCE,
        "assumption": ASSUMPTION,
    }
    write_json(options.json, content)
    if find_spec("matplotlib") is None:
        print(f"{options.json}   no picture: matplotlib is not installed; pip install 'hvdqn[plot]'")
        return
    picture = options.json.with_suffix(".png")
    draw(scaling, picture)
    print(f"{options.json}   {picture}")


def main(argv: Sequence[str]) -> int:
    """The `hvdqn bench scaling` command; returns the exit code.

    Raises:
        UserError: the input is wrong, or a job failed.
    """
    parser = Parser(PROG, __doc__, "bench-scaling.json")
    parser.add_argument("--np", default="1,2", metavar="N,N,...", help="numbers of ranks")
    parser.add_argument("--engine", default=next(iter(available()), ""), help=", ".join(ENGINES))
    parser.add_argument("--seconds", type=above_zero, default=8.0, help="of one measurement of a loop")
    parser.add_argument(
        "--read", type=Path, metavar="DIR", help="only print the table of what hvdqn bench loop wrote there"
    )
    options, flags = parser.parse_known_args(argv)
    scale(options, flags)
    return 0
