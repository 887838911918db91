"""`hvdqn bench peers`: compare hvdqn with Stable-Baselines3 on the same work, and with its own goals.

    hvdqn bench peers w1 w2 solve --peer-python /path/to/venv/bin/python      where Stable-Baselines3 is installed
    hvdqn bench peers w1-ranks w2-ranks replay startup                        these need no peer

Each row is a ratio of measurements that alternate on the same cores, because other work on a shared machine changes
absolute times. The table shows the median over rounds, the spread and the goal.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdqn.bench.jobs import available_engines, run_bench_job, run_command
from hvdqn.bench.loop import LoopTiming, from_json
from hvdqn.bench.report import Parser, Row, above_zero, has_bf16, one_or_more, print_goals, write_json
from hvdqn.errors import UserError

PROG = "hvdqn bench peers"
PEER_SCRIPT = Path(__file__).with_name("peer_sb3.py")


@dataclass(frozen=True)
class Setting:
    """The options that all comparisons share."""

    peer_python: str
    rounds: int
    seconds: float
    """Duration of one measurement of the loop."""
    cores: tuple[int, ...]

    def run_peer(self, workload: str, seed: int, cores: Sequence[int]) -> dict[str, Any]:
        """Run Stable-Baselines3 once, with one thread for each of these cores."""
        args = [workload, "--seed", str(seed), "--threads", str(len(cores))]
        output = run_command([self.peer_python, str(PEER_SCRIPT), *args], cores)
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result

    def time_whole_run(self, *flags: str) -> LoopTiming:
        """Time a whole run of hvdqn on one core."""
        return from_json(run_bench_job(["loop", "--whole-run", *flags], cores=self.cores[:1]))


def compare_cartpole(setting: Setting) -> Iterator[Row]:
    """Compare W1 with the peer: CartPole with a small MLP, one core, float32."""
    ratios = []
    for seed in range(setting.rounds):
        peer = setting.run_peer("cartpole", seed, setting.cores[:1])["env_steps_per_second"]
        timing = setting.time_whole_run("--preset", "bench-cartpole", "--seed", str(seed))
        ratios.append(timing.env_steps_per_second / peer)
    yield Row("W1, one core, fp32, over Stable-Baselines3", "x", tuple(ratios), 2.5)


def compare_pong(setting: Setting) -> Iterator[Row]:
    """Compare W2 with the peer: Pong with the Nature CNN, one core, float32 and bfloat16."""
    fp32, bf16, kilobytes = [], [], []
    for seed in range(setting.rounds):
        peer = setting.run_peer("pong", seed, setting.cores[:1])["env_steps_per_second"]
        flags = ("--preset", "bench-pong", "--seed", str(seed))
        timing = setting.time_whole_run(*flags)
        fp32.append(timing.env_steps_per_second / peer)
        if has_bf16():
            bf16.append(setting.time_whole_run(*flags, "--precision", "bf16").env_steps_per_second / peer)
        kilobytes.append(timing.replay_bytes_per_transition / 1e3)
    yield Row("W2, one core, fp32, over Stable-Baselines3", "x", tuple(fp32), 1.15)
    if bf16:
        yield Row("W2, one core, bf16, over Stable-Baselines3 fp32", "x", tuple(bf16), 2.0)
    else:
        print("this processor has no bfloat16: W2 in bf16 is left out")
    yield Row("memory of a transition of W2", " kB", tuple(kilobytes), 7.2, at_most=True)


def compare_ranks(setting: Setting, preset: str, goals: Mapping[str, float]) -> Iterator[tuple[Row, Row]]:
    """Measure the weak scaling of a preset from 1 to 2 ranks, each rank on a core of its own.

    Args:
        setting: the options.
        preset: the work of each rank.
        goals: the goal of the ratio by engine; engines that are not installed are left out.

    Yields:
        For each engine: the ratio of global rates, and the share of exposed communication.
    """
    args = ["loop", "--pin", "--seconds", str(setting.seconds), "--preset", preset]
    engines = [name for name in available_engines() if name in goals]
    if not engines:
        raise UserError(f"none of {', '.join(goals)} is installed here; run launch/setup.sh")
    ratios: dict[str, list[float]] = {name: [] for name in engines}
    exposed: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(setting.rounds):
        single = from_json(run_bench_job(args, cores=setting.cores))
        for name in engines:
            double = from_json(run_bench_job(args, name, 2, setting.cores))
            ratios[name].append(double.env_steps_per_second / single.env_steps_per_second)
            exposed[name].append(100 * double.exposed_share)
    for name in engines:
        ratio = Row(f"{preset}, 2 ranks over 1, {name}", "x", tuple(ratios[name]), goals[name])
        share = Row(f"{preset}, 2 ranks, {name}: exposed comm", "%", tuple(exposed[name]), 3.0, at_most=True)
        yield ratio, share


def scale_cartpole(setting: Setting) -> Iterator[Row]:
    """Measure W1 on 2 ranks."""
    goals = {"mpi": 1.9, "horovod-mpi": 1.3, "horovod-gloo": 1.3, "torch": 1.3}
    for ratio, _ in compare_ranks(setting, "bench-cartpole", goals):
        yield ratio


def scale_pong(setting: Setting) -> Iterator[Row]:
    """Measure W2 on 2 ranks."""
    for ratio, share in compare_ranks(setting, "bench-pong", {"horovod-mpi": 1.9, "horovod-gloo": 1.9}):
        yield from (ratio, share)


def compare_time_to_solve(setting: Setting) -> Iterator[Row]:
    """Compare the training time until CartPole is solved: 2 ranks, and the peer's tuned settings on 2 threads."""
    engine = next(iter(available_engines()), None)
    if engine is None:
        raise UserError("no launcher is installed here; run launch/setup.sh")
    ratios = []
    for seed in range(1, setting.rounds + 1):
        peer = setting.run_peer("solve", seed, setting.cores[:2])
        args = ["solve", "--preset", "cartpole", "--seed", str(seed)]
        ours = run_bench_job(args, engine, 2, setting.cores)
        for name, result in (("Stable-Baselines3", peer), ("hvdqn", ours)):
            if not result["solved"]:
                print(f"seed {seed}: {name} did not solve CartPole; its time is that of the whole run")
        ratios.append(ours["training_seconds"] / peer["training_seconds"])
    what = f"CartPole solved, 2 ranks, {engine}: seconds over Stable-Baselines3's"
    yield Row(what, "x", tuple(ratios), 1 / 3, at_most=True)


def compare_replay_sizes(setting: Setting) -> Iterator[Row]:
    """Compare add and sample at a million Atari transitions with ten thousand."""
    args = ["replay", "--preset", "bench-pong"]
    ratios = [run_bench_job(args, cores=setting.cores[:1])["ratio"] for _ in range(setting.rounds)]
    yield Row("replay, add + sample at 1M transitions over 10k", "x", tuple(ratios), 1.3, at_most=True)


def compare_startup(setting: Setting) -> Iterator[Row]:
    """Measure the start-up time beyond 1.25 times a bare import of torch."""
    args = ["startup", "--rounds", str(setting.rounds), "--preset", "smoke"]
    result = run_bench_job(args, cores=setting.cores)
    times = zip(result["first_env_step_seconds"], result["torch_seconds"], strict=True)
    beyond = tuple(step - 1.25 * torch for step, torch in times)
    yield Row("first env step, beyond 1.25 x import torch", " s", beyond, 1.0, at_most=True)


COMPARISONS: Mapping[str, Callable[[Setting], Iterator[Row]]] = {
    "w1": compare_cartpole,
    "w2": compare_pong,
    "w1-ranks": scale_cartpole,
    "w2-ranks": scale_pong,
    "solve": compare_time_to_solve,
    "replay": compare_replay_sizes,
    "startup": compare_startup,
}
NEED_PEER = {"w1", "w2", "solve"}


def compare(names: Sequence[str], setting: Setting, file: Path) -> None:
    """Make the comparisons one after the other; print and write the results after each.

    Raises:
        UserError: a run failed, the peer is missing, or the file cannot be written.
    """
    if NEED_PEER & set(names):
        try:
            run_command([setting.peer_python, "-c", "import stable_baselines3"])
        except UserError:
            raise UserError(
                f"{setting.peer_python} has no stable_baselines3; give a Python that has it with --peer-python"
            ) from None
    rows: list[Row] = []
    for name in names:
        new = list(COMPARISONS[name](setting))
        rows += new
        print_goals(f"{name}, {setting.rounds} rounds", new)
        write_json(file, {"rows": [row.as_json() for row in rows]})


def main(argv: Sequence[str]) -> int:
    """Run the `hvdqn bench peers` command; return the exit code.

    Raises:
        UserError: the input is wrong, or a job failed.
    """
    parser = Parser(PROG, __doc__, "bench-peers.json", trains=False)
    parser.add_argument("comparisons", nargs="*", metavar="|".join(COMPARISONS), help="default: all")
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PATH", help="a Python with Stable-Baselines3"
    )
    parser.add_argument("--rounds", type=one_or_more, default=3, help="number of rounds")
    parser.add_argument(
        "--seconds", type=above_zero, default=8.0, help="duration of one measurement of the loop"
    )
    options = parser.parse_args(argv)
    if unknown := set(options.comparisons) - set(COMPARISONS):
        raise UserError(
            f"unknown comparison {', '.join(sorted(unknown))}; choose from {', '.join(COMPARISONS)}"
        )
    cores = tuple(sorted(os.sched_getaffinity(0)))
    setting = Setting(options.peer_python, options.rounds, options.seconds, cores)
    compare(options.comparisons or list(COMPARISONS), setting, options.json)
    return 0
