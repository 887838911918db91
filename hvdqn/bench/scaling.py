"""`hvdqn bench scaling`: measure weak and strong scaling over ranks of this machine, and project them to more ranks.

    hvdqn bench scaling --np 1,2,4 --engine mpi --preset atari

Weak scaling: every rank keeps its environments and its minibatch. Strong scaling: the ranks share the environments and
the minibatch of one rank. Efficiency is the rate of a rank divided by that of the single rank. A rank has as many
threads in a small job as in the largest one, so that ranks are compared and not threads. The projection, described in
`projection.py`, takes the largest number of ranks as the ranks of each host.
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
from hvdqn.bench.allreduce import AllreduceTiming
from hvdqn.bench.jobs import ENGINES, available_engines, run_bench_job
from hvdqn.bench.loop import LoopTiming
from hvdqn.bench.projection import (
    ASSUMPTION,
    FORMULAS,
    MODELS,
    SOURCE,
    Levels,
    Line,
    Projected,
    Work,
    fit,
    project,
)
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
    """The measured timings, fewest ranks first, and the projection."""

    engine: str
    weak: list[LoopTiming]
    strong: list[LoopTiming]
    levels: Levels
    projected: list[Projected]


def efficiencies(timings: Sequence[LoopTiming]) -> list[float]:
    """Return the rate of one rank in each job, divided by that in the first job."""
    first = timings[0].env_steps_per_second / timings[0].world_size
    return [timing.env_steps_per_second / timing.world_size / first for timing in timings]


def table_rows(timings: Sequence[LoopTiming]) -> list[tuple[str, ...]]:
    """Return the rows of the table under `HEADER`."""
    return [
        (
            f"{timing.world_size}",
            f"{timing.env_steps_per_second:,.0f}",
            f"{timing.updates_per_second:,.1f}",
            f"{efficiency:.0%}",
            f"{timing.exposed_share:.1%}",
        )
        for timing, efficiency in zip(timings, efficiencies(timings), strict=True)
    ]


def strong_scaling_flags(flags: Sequence[str], counts: Sequence[int]) -> dict[int, list[str]]:
    """Return the flags that divide one rank's work by each number of ranks that divides it."""
    config = parse(flags, PROG)
    envs, batch = config.environment.envs_per_rank, config.batch_per_rank
    return {
        count: ["--envs-per-rank", str(envs // count), "--batch-per-rank", str(batch // count)]
        for count in counts
        if envs % count == 0 and batch % count == 0
    }


def with_threads_of_largest_job(flags: Sequence[str], most_ranks: int) -> list[str]:
    """Return the flags with the threads per rank of the largest job, unless the user gives a number of threads."""
    if parse(flags, PROG).parallel.threads_per_rank:
        return list(flags)
    return [*flags, "--threads-per-rank", str(max(1, len(os.sched_getaffinity(0)) // most_ranks))]


def time_job(engine: str, ranks: int, seconds: float, flags: Sequence[str]) -> LoopTiming:
    """Time the loop in a job of this many ranks.

    Raises:
        UserError: the job failed, or had no update.
    """
    print(f"{ranks} rank{'s' if ranks > 1 else ''}: {' '.join(flags)}", flush=True)
    args = ["loop", "--seconds", str(seconds), *flags]
    timing = loop.from_json(run_bench_job(args, engine if ranks > 1 else "", ranks))
    if not timing.updates:
        raise UserError("no update took place during the measurement; raise --seconds")
    return timing


def measure(options: Namespace, counts: Sequence[int], flags: Sequence[str]) -> Scaling:
    """Run all jobs one after the other and print the measured tables.

    Raises:
        UserError: a job failed.
    """
    strong_flags = strong_scaling_flags(flags, counts)
    weak = [time_job(options.engine, count, options.seconds, flags) for count in counts]
    strong = [
        # On one rank, weak and strong scaling are the same job.
        timing
        if count == 1
        else time_job(options.engine, count, options.seconds, [*flags, *strong_flags[count]])
        for count, timing in zip(counts, weak, strict=True)
        if count in strong_flags
    ]
    if left_out := [str(count) for count in counts if count not in strong_flags]:
        print(
            f"strong scaling leaves out {', '.join(left_out)} ranks: "
            "the environments or the minibatch cannot be divided by it"
        )
    print_table(f"Weak scaling, {options.engine}: constant work per rank", HEADER, table_rows(weak))
    print_table(f"Strong scaling, {options.engine}: constant work per job", HEADER, table_rows(strong))
    within = time_messages(options.engine, max(counts), flags)
    # Without a measurement between hosts, assume that their links are like those of this host without shared memory.
    between = (
        read_messages(options.between)
        if options.between
        else time_messages(options.engine, max(counts), [*flags, "--host-sum", "off"])
    )
    return add_projection(options.engine, weak, strong, within, between, parse_projected(options.to))


def time_messages(engine: str, ranks: int, flags: Sequence[str]) -> AllreduceTiming:
    """Time messages of several sizes in a job of this many ranks."""
    return allreduce.from_json(run_bench_job(["allreduce", *flags], engine, ranks)["allreduce"])[0]


def read_messages(path: Path) -> AllreduceTiming:
    """Return what `hvdqn bench allreduce` measured.

    Raises:
        UserError: the file is of another command.
    """
    try:
        return allreduce.from_json(json.loads(path.read_text("utf-8"))["allreduce"])[0]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"--between '{path}' is no JSON file of hvdqn bench allreduce: {error!r}; run that with one rank on each "
            "of two or more hosts"
        ) from None


def add_projection(
    engine: str,
    weak: list[LoopTiming],
    strong: list[LoopTiming],
    messages: AllreduceTiming,
    between: AllreduceTiming,
    ranks: Sequence[int] = PROJECTED_RANKS,
) -> Scaling:
    """Return the measured scaling with its projection to more ranks.

    Args:
        engine: of the jobs.
        weak: weak scaling, fewest ranks first.
        strong: strong scaling.
        messages: sums over the ranks of one host.
        between: sums over one rank of each of several hosts.
        ranks: to project to.
    """
    single, largest = weak[0], weak[-1]
    hidden = largest.seconds_per_iteration["comm_hidden"] / largest.updates_per_iteration
    # While the environments step. With plain MPI, ranks sum between hosts only when they wait.
    window = sum(single.seconds_per_iteration[phase] for phase in ("act", "env", "add"))
    work = Work(
        seconds=single.iteration_seconds - single.seconds_per_iteration["comm_exposed"],
        updates=single.updates_per_iteration,
        # The hidden time also holds waiting for late ranks. No more than the whole allreduce can be hidden.
        hidden_seconds=min(hidden, messages.network_seconds),
        window_seconds=0.0 if engine == "mpi" else window / single.updates_per_iteration,
    )
    levels = Levels(line_of(messages), messages.world_size, line_of(between), between.world_size)
    counts = sorted({messages.world_size, *ranks})
    projected = project(levels, 4 * messages.network_floats, work, counts)
    return Scaling(engine, weak, strong, levels, projected)


def line_of(messages: AllreduceTiming) -> Line:
    """Fit a line to the times of messages."""
    return fit({4 * floats: seconds for floats, seconds in messages.seconds.items()})


def print_projection(scaling: Scaling) -> None:
    """Print the table of the projection, its formulas and its assumption."""
    levels = scaling.levels
    print_table(
        f"Projected weak scaling: a sum of n bytes over {levels.ranks_per_host} ranks of a host took "
        f"{describe(levels.within)}, over {levels.hosts} hosts {describe(levels.between)}",
        ("ranks", *(f"{model}: us, efficiency" for model in MODELS)),
        [
            (str(ranks), *(f"{1e6 * one.allreduce_seconds:,.0f}, {one.efficiency:.0%}" for one in models))
            for ranks, models in by_ranks(scaling.projected).items()
        ],
    )
    for text in (*FORMULAS.values(), f"({SOURCE})", ASSUMPTION):
        print(text)


def describe(line: Line) -> str:
    """Return the line as text."""
    return f"{1e6 * line.latency:,.3g} us + n / {1e-6 / max(line.seconds_per_byte, 1e-15):,.4g} MB/s"


def by_ranks(projected: Sequence[Projected]) -> Mapping[int, list[Projected]]:
    """Return the projections of both models, in the order of `MODELS`, for each number of ranks."""
    return {one.ranks: [other for other in projected if other.ranks == one.ranks] for one in projected}


def draw(scaling: Scaling, path: Path) -> None:
    """Draw the measured and the projected efficiency over the number of ranks."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from hvdqn.plot import COLOURS, STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 5.0), layout="constrained")
        axes = figure.subplots()
        measured = (("weak", scaling.weak, COLOURS[0]), ("strong", scaling.strong, COLOURS[1]))
        for name, timings, color in measured:
            ranks = [timing.world_size for timing in timings]
            axes.plot(ranks, efficiencies(timings), "o-", color=color, label=f"{name} scaling, measured")
        for model, style in zip(MODELS, ("--", ":"), strict=True):
            points = [one for one in scaling.projected if one.model == model]
            x, y = [one.ranks for one in points], [one.efficiency for one in points]
            axes.plot(x, y, style, color=COLOURS[0], label=f"weak scaling, projected: {model}")
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
    text = "\n".join((*FORMULAS.values(), "efficiency = work / (work + updates * exposed)", SOURCE))
    axes.text(0.02, 0.03, text, transform=axes.transAxes, fontsize=8, va="bottom")


def read_timings(directory: Path) -> list[LoopTiming]:
    """Return the timings that `hvdqn bench loop` wrote into a directory, fewest ranks first.

    Raises:
        UserError: there are none, or a JSON file is of another command.
    """
    try:
        files = sorted(directory.glob("*.json"))
        timings = [loop.from_json(json.loads(path.read_text("utf-8"))) for path in files]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{directory}' holds a JSON file that hvdqn bench loop did not write: {error!r}"
        ) from None
    if not timings:
        raise UserError(
            f"'{directory}' holds no JSON file of hvdqn bench loop; give the directory that it wrote to"
        )
    return sorted(timings, key=lambda timing: timing.world_size)


def parse_rank_counts(text: str) -> list[int]:
    """Return the numbers of ranks of `--np` in ascending order, and always 1.

    Raises:
        UserError: they are not integers above 0, or fewer than two.
    """
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words) or len(set(words)) < 2:
        raise UserError(
            f"--np is '{text}'; give at least two numbers of ranks separated by commas, as in 1,2,4"
        )
    return sorted({1, *map(int, words)})


def parse_projected(text: str) -> list[int]:
    """Return the numbers of ranks of `--to`.

    Raises:
        UserError: they are not integers above 0.
    """
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--to is '{text}'; give numbers of ranks separated by commas, as in 8,64,512")
    return sorted({int(word) for word in words})


def write_result(scaling: Scaling, path: Path) -> None:
    """Write the JSON file and, if matplotlib is installed, a figure beside it."""
    content: dict[str, Any] = {
        **asdict(scaling),
        "formulas": FORMULAS,
        "source": SOURCE,
        "assumption": ASSUMPTION,
    }
    write_json(path, content)
    if find_spec("matplotlib") is None:
        print(f"{path}   no figure: matplotlib is not installed; pip install 'hvdqn[plot]'")
        return
    figure = path.with_suffix(".png")
    draw(scaling, figure)
    print(f"{path}   {figure}")


def run_benchmark(options: Namespace, flags: Sequence[str]) -> None:
    """Measure and project the scaling; print and write the result.

    Raises:
        UserError: the input is wrong, or a job failed.
    """
    if not available_engines():
        raise UserError("no launcher is installed here; run launch/setup.sh")
    if options.engine not in available_engines():
        raise UserError(
            f"--engine {options.engine!r} is not installed; choose one of {', '.join(available_engines())}"
        )
    counts = parse_rank_counts(options.np)
    parse_projected(options.to)
    scaling = measure(options, counts, with_threads_of_largest_job(flags, max(counts)))
    print_projection(scaling)
    write_result(scaling, options.json)


def main(argv: Sequence[str]) -> int:
    """Run the `hvdqn bench scaling` command; return the exit code.

    Raises:
        UserError: the input is wrong, or a job failed.
    """
    parser = Parser(PROG, __doc__, "bench-scaling.json")
    parser.add_argument("--np", default="1,2", metavar="N,N,...", help="numbers of ranks")
    parser.add_argument("--engine", default=next(iter(available_engines()), ""), help=", ".join(ENGINES))
    parser.add_argument(
        "--seconds", type=above_zero, default=8.0, help="duration of one measurement of the loop"
    )
    parser.add_argument("--to", default="8,64,512", metavar="N,N,...", help="ranks of the projection")
    parser.add_argument(
        "--between",
        type=Path,
        metavar="FILE",
        help="what hvdqn bench allreduce wrote with one rank on each of several hosts (default: as on this host)",
    )
    parser.add_argument(
        "--read", type=Path, metavar="DIR", help="only print the table of what hvdqn bench loop wrote to DIR"
    )
    options, flags = parser.parse_known_args(argv)
    if not options.read:
        run_benchmark(options, flags)
    elif flags:
        raise UserError(f"{flags[0]} has no effect with --read, which measures nothing; leave it out")
    else:
        print_table(f"Weak scaling, {options.read}", HEADER, table_rows(read_timings(options.read)))
    return 0
