"""`hvdqn bench peers`: the same work on Stable-Baselines3, in turn on the same cores; and what hvdqn promises itself.

    hvdqn bench peers w1 w2 solve --peer-python /path/to/venv/bin/python      where Stable-Baselines3 is installed
    hvdqn bench peers w1-ranks w2-ranks replay startup                        these need no peer

Rows are ratios of what was timed in turn, round by round: numbers of a machine that others share are worth only that.
Printed is the median over rounds, its spread, and the goal.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdqn.bench.jobs import available, bench, run
from hvdqn.bench.loop import Loop, from_json
from hvdqn.bench.report import Parser, Row, above_zero, has_bf16, one_or_more, print_goals, write_json
from hvdqn.errors import UserError

PROG = "hvdqn bench peers"
PEER_SCRIPT = Path(__file__).with_name("peer_sb3.py")


@dataclass(frozen=True)
class Setting:
    """What all comparisons are made with."""

    peer_python: str
    rounds: int
    seconds: float
    """Of one measurement of a steady loop."""
    cores: tuple[int, ...]

    def peer(self, workload: str, seed: int, cores: Sequence[int]) -> dict[str, Any]:
        """One run of the peer, on as many threads as cores."""
        words = [workload, "--seed", str(seed), "--threads", str(len(cores))]
        printed = run([self.peer_python, str(PEER_SCRIPT), *words], cores)
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return found

    def whole(self, *flags: str) -> Loop:
        """One whole run of hvdqn on one core."""
        return from_json(bench(["loop", "--whole-run", *flags], cores=self.cores[:1]))


def against_peer(setting: Setting) -> Iterator[Row]:
    """W1: CartPole with a small MLP, one core, float32."""
    ratios = []
    for seed in range(setting.rounds):
        theirs = setting.peer("cartpole", seed, setting.cores[:1])["env_steps_per_second"]
        ours = setting.whole("--preset", "bench-cartpole", "--seed", str(seed))
        ratios.append(ours.env_steps_per_second / theirs)
    yield Row("W1, one core, fp32, over Stable-Baselines3", "x", tuple(ratios), 2.5)


def images_against_peer(setting: Setting) -> Iterator[Row]:
    """W2: Pong with the Nature CNN, one core, float32 and bfloat16."""
    fp32, bf16, kilobytes = [], [], []
    for seed in range(setting.rounds):
        theirs = setting.peer("pong", seed, setting.cores[:1])["env_steps_per_second"]
        flags = ("--preset", "bench-pong", "--seed", str(seed))
        ours = setting.whole(*flags)
        fp32.append(ours.env_steps_per_second / theirs)
        if has_bf16():
            bf16.append(setting.whole(*flags, "--precision", "bf16").env_steps_per_second / theirs)
        kilobytes.append(ours.replay_bytes_per_transition / 1e3)
    yield Row("W2, one core, fp32, over Stable-Baselines3", "x", tuple(fp32), 1.15)
    if bf16:
        yield Row("W2, one core, bf16, over Stable-Baselines3 fp32", "x", tuple(bf16), 2.0)
    else:
        print("this processor has no bfloat16: W2 in bf16 is left out")
    yield Row("memory of a transition of W2", " kB", tuple(kilobytes), 7.2, at_most=True)


def ranks(setting: Setting, preset: str, goals: Mapping[str, float]) -> Iterator[tuple[str, Row, Row]]:
    """Weak scaling of a preset at 2 ranks over 1, each rank on a core of its own.

    Yields:
        For every engine there is: its name, the ratio of global rates, and the share of exposed communication.
    """
    words = ["loop", "--pin", "--seconds", str(setting.seconds), "--preset", preset]
    engines = [name for name in available() if name in goals]
    if not engines:
        raise UserError(f"none of {', '.join(goals)} is installed here; run launch/setup.sh")
    ratios: dict[str, list[float]] = {name: [] for name in engines}
    exposed: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(setting.rounds):
        alone = from_json(bench(words, cores=setting.cores))
        for name in engines:
            loop = from_json(bench(words, name, 2, setting.cores))
            ratios[name].append(loop.env_steps_per_second / alone.env_steps_per_second)
            exposed[name].append(100 * loop.exposed_share)
    for name in engines:
        ratio = Row(f"{preset}, 2 ranks over 1, {name}", "x", tuple(ratios[name]), goals[name])
        share = Row(f"{preset}, 2 ranks, {name}: exposed comm", "%", tuple(exposed[name]), 3.0, at_most=True)
        yield name, ratio, share


def small_ranks(setting: Setting) -> Iterator[Row]:
    """W1 on 2 ranks."""
    goals = {"mpi": 1.9, "horovod-mpi": 1.3, "horovod-gloo": 1.3, "torch": 1.3}
    for _, ratio, _ in ranks(setting, "bench-cartpole", goals):
        yield ratio


def image_ranks(setting: Setting) -> Iterator[Row]:
    """W2 on 2 ranks."""
    for _, ratio, share in ranks(setting, "bench-pong", {"horovod-mpi": 1.9, "horovod-gloo": 1.9}):
        yield from (ratio, share)


def solved(setting: Setting) -> Iterator[Row]:
    """Seconds of training until CartPole is solved, 2 ranks against the peer's tuned settings on 2 threads."""
    engine = next(iter(available()), None)
    if engine is None:
        raise UserError("no launcher is installed here; run launch/setup.sh")
    ratios = []
    for seed in range(1, setting.rounds + 1):
        theirs = setting.peer("solve", seed, setting.cores[:2])
        ours = bench(["solve", "--preset", "cartpole", "--seed", str(seed)], engine, 2, setting.cores)
        for name, found in (("Stable-Baselines3", theirs), ("hvdqn", ours)):
            if not found["solved"]:
                print(f"seed {seed}: {name} did not solve CartPole; its time is that of its whole run")
        ratios.append(ours["training_seconds"] / theirs["training_seconds"])
    what = f"CartPole solved, 2 ranks, {engine}: seconds over Stable-Baselines3's"
    yield Row(what, "x", tuple(ratios), 1 / 3, at_most=True)


def large_replay(setting: Setting) -> Iterator[Row]:
    """Add and sample at a million Atari transitions over ten thousand."""
    words = ["replay", "--preset", "bench-pong"]
    ratios = [bench(words, cores=setting.cores[:1])["ratio"] for _ in range(setting.rounds)]
    yield Row("replay, add + sample at 1M transitions over 10k", "x", tuple(ratios), 1.3, at_most=True)


def first_step(setting: Setting) -> Iterator[Row]:
    """What start-up takes beyond 1.25 times a bare import of torch."""
    found = bench(["startup", "--rounds", str(setting.rounds), "--preset", "smoke"], cores=setting.cores)
    both = zip(found["first_env_step_seconds"], found["torch_seconds"], strict=True)
    beyond = tuple(step - 1.25 * torch for step, torch in both)
    yield Row("first env step, beyond 1.25 x import torch", " s", beyond, 1.0, at_most=True)


COMPARISONS: Mapping[str, Callable[[Setting], Iterator[Row]]] = {
    "w1": against_peer,
    "w2": images_against_peer,
    "w1-ranks": small_ranks,
    "w2-ranks": image_ranks,
    "solve": solved,
    "replay": large_replay,
    "startup": first_step,
}
NEED_PEER = {"w1", "w2", "solve"}


def compare(names: Sequence[str], setting: Setting, file: Path) -> None:
    """Make the comparisons one after the other; print and write what there is after each.

    Raises:
        UserError: a run failed, the peer is missing, or the file cannot be written.
    """
    if NEED_PEER & set(names):
        try:
            run([setting.peer_python, "-c", "import stable_baselines3"])
        except UserError:
            raise UserError(
                f"{setting.peer_python} has no stable_baselines3; give one that does with --peer-python"
            ) from None
    rows: list[Row] = []
    for name in names:
        new = list(COMPARISONS[name](setting))
        rows += new
        print_goals(f"{name}, {setting.rounds} rounds", new)
        write_json(file, {"rows": [row.as_json() for row in rows]})


def main(argv: Sequence[str]) -> int:
    """The `hvdqn bench peers` command; returns the exit code.

    Raises:
        UserError: the input is wrong, or a job failed.
    """
    parser = Parser(PROG, __doc__, "bench-peers.json", trains=False)
    parser.add_argument("comparisons", nargs="*", metavar="|".join(COMPARISONS), help="default: all")
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PATH", help="which has Stable-Baselines3"
    )
    parser.add_argument("--rounds", type=one_or_more, default=3, help="in turn")
    parser.add_argument("--seconds", type=above_zero, default=8.0, help="of one measurement of a loop")
    options = parser.parse_args(argv)
    unknown = set(options.comparisons) - set(COMPARISONS)
    if unknown:
        raise UserError(f"give comparisons of {', '.join(COMPARISONS)}")
    cores = tuple(sorted(os.sched_getaffinity(0)))
    setting = Setting(options.peer_python, options.rounds, options.seconds, cores)
    compare(options.comparisons or list(COMPARISONS), setting, options.json)
    return 0
