"""`hvdqn bench peers`: compare hvdqn with other libraries on the same work, and with its own goals.

    hvdqn bench peers w1 w2 solve --peer-python /path/to/venv/bin/python      where Stable-Baselines3 is installed
    hvdqn bench peers w1-sbx w1-64 --peer-python /path/to/venv/bin/python     where SBX is (pip install sbx-rl)
    hvdqn bench peers w1-cleanrl --peer-python ... --cleanrl cleanrl/dqn.py   CleanRL's script, and what it imports
    hvdqn bench peers pqn-cleanrl --peer-python ... --cleanrl cleanrl/pqn.py
    hvdqn bench peers w1-ranks w2-ranks replay startup                        these need no peer

Without names it makes every comparison whose peer is there. Each row is a ratio of measurements that alternate on the
same cores, because other work on a shared machine changes absolute times. The table shows the median over rounds, the
spread and the goal.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdqn.bench.jobs import available_engines, run_bench_job, run_command
from hvdqn.bench.loop import LoopTiming, from_json
from hvdqn.bench.report import (
    Parser,
    Row,
    above_zero,
    has_bf16,
    one_or_more,
    print_goals,
    print_message,
    write_json,
)
from hvdqn.errors import UserError

PROG = "hvdqn bench peers"
PEER_SCRIPTS = {name: Path(__file__).with_name(f"peer_{name}.py") for name in ("sb3", "sbx")}
# The work of the preset bench-cartpole with the one environment that CleanRL's dqn.py allows: an update every 8 steps.
CLEANRL_FLAGS = (
    "--total-timesteps=40000", "--learning-rate=2.5e-4", "--buffer-size=10000", "--learning-starts=1000",
    "--batch-size=128", "--train-frequency=8", "--target-network-frequency=500",
)  # fmt: skip
# Rollouts of 64 steps of 32 environments, and 4 epochs of 16 minibatches, in both programs.
PQN_FLAGS = (
    "--preset", "bench-cartpole,pqn", "--envs-per-rank", "32", "--rollout-steps", "64", "--epochs", "4",
    "--minibatches", "16",
)  # fmt: skip
CLEANRL_PQN_FLAGS = (
    "--total-timesteps=40000", "--num-envs=32", "--num-steps=64", "--update-epochs=4", "--num-minibatches=16",
    "--no-cuda",
)  # fmt: skip
CLEANRL_SCRIPTS = {"w1-cleanrl": "dqn.py", "pqn-cleanrl": "pqn.py"}


@dataclass(frozen=True)
class Setting:
    """The options that all comparisons share."""

    peer_python: str
    cleanrl: Path | None
    """CleanRL's dqn.py or pqn.py."""
    rounds: int
    seconds: float
    """Duration of one measurement of the loop."""
    cores: tuple[int, ...]

    def run_peer(self, workload: str, seed: int, cores: Sequence[int]) -> dict[str, Any]:
        """Run Stable-Baselines3 once, with one thread for each of these cores."""
        return self._run_script("sb3", [workload, "--seed", str(seed), "--threads", str(len(cores))], cores)

    def run_sbx(self, workload: str, seed: int) -> float:
        """Run SBX once on one core; return its env steps per second."""
        result = self._run_script("sbx", [workload, "--seed", str(seed)], self.cores[:1])
        return float(result["env_steps_per_second"])

    def run_cleanrl(self, seed: int, *flags: str) -> float:
        """Run CleanRL's script once on one core; return its env steps per second.

        Raises:
            UserError: it failed, or printed no speed.
        """
        with tempfile.TemporaryDirectory(prefix="hvdqn-bench-") as folder:  # it writes to the current folder
            command = [
                "env",
                "-C",
                folder,
                self.peer_python,
                str(self.cleanrl),
                *flags,
                f"--seed={seed}",
            ]
            output = run_command(command, self.cores[:1])
        speeds = re.findall(r"SPS: (\d+)", output)
        if not speeds:
            raise UserError(f"{self.cleanrl} printed no line with SPS; is it CleanRL's script?")
        return float(speeds[-1])

    def _run_script(self, peer: str, args: Sequence[str], cores: Sequence[int]) -> dict[str, Any]:
        output = run_command([self.peer_python, str(PEER_SCRIPTS[peer]), *args], cores)
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
    yield Row("W1, one core, fp32, over Stable-Baselines3", "x", tuple(ratios), 3.5)


def compare_with_sbx(setting: Setting) -> Iterator[Row]:
    """Compare W1 with SBX."""
    yield ratio_over_sbx(setting, "W1, one core, fp32, over SBX", "cartpole", None)


def compare_64_with_sbx(setting: Setting) -> Iterator[Row]:
    """Compare W1 with SBX, both with 64 environments and 8 updates for each step of all of them."""
    what = "W1 with 64 environments, one core, fp32, over SBX"
    yield ratio_over_sbx(setting, what, "cartpole-64", 2.0, "--envs-per-rank", "64")


def ratio_over_sbx(setting: Setting, what: str, workload: str, goal: float | None, *flags: str) -> Row:
    """Return the ratio of the rates of hvdqn and SBX on one of SBX's workloads."""
    ratios = []
    for seed in range(setting.rounds):
        peer = setting.run_sbx(workload, seed)
        timing = setting.time_whole_run("--preset", "bench-cartpole", "--seed", str(seed), *flags)
        ratios.append(timing.env_steps_per_second / peer)
    return Row(what, "x", tuple(ratios), goal)


def compare_with_cleanrl(setting: Setting) -> Iterator[Row]:
    """Compare W1 with CleanRL, both with one environment."""
    ratios = []
    for seed in range(setting.rounds):
        peer = setting.run_cleanrl(seed, *CLEANRL_FLAGS)
        flags = ("--envs-per-rank", "1", "--loss", "mse", "--max-grad-norm", "0")
        timing = setting.time_whole_run("--preset", "bench-cartpole", "--seed", str(seed), *flags)
        ratios.append(timing.env_steps_per_second / peer)
    yield Row("W1 with one environment, one core, fp32, over CleanRL", "x", tuple(ratios))


def compare_pqn_with_cleanrl(setting: Setting) -> Iterator[Row]:
    """Compare PQN on CartPole with CleanRL's, both with 32 environments."""
    ratios = []
    for seed in range(setting.rounds):
        peer = setting.run_cleanrl(seed, *CLEANRL_PQN_FLAGS)
        timing = setting.time_whole_run(*PQN_FLAGS, "--seed", str(seed))
        ratios.append(timing.env_steps_per_second / peer)
    yield Row("PQN with 32 environments, one core, fp32, over CleanRL", "x", tuple(ratios), 2.0)


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
    "w1-sbx": compare_with_sbx,
    "w1-64": compare_64_with_sbx,
    "w1-cleanrl": compare_with_cleanrl,
    "pqn-cleanrl": compare_pqn_with_cleanrl,
    "w2": compare_pong,
    "w1-ranks": scale_cartpole,
    "w2-ranks": scale_pong,
    "solve": compare_time_to_solve,
    "replay": compare_replay_sizes,
    "startup": compare_startup,
}
# The module that a comparison needs in the peers' Python.
NEEDS = {
    **dict.fromkeys(("w1", "w2", "solve"), "stable_baselines3"),
    **dict.fromkeys(("w1-sbx", "w1-64"), "sbx"),
    **dict.fromkeys(CLEANRL_SCRIPTS, "torch"),
}


def missing_peer(name: str, setting: Setting) -> str:
    """Return what a comparison needs and does not have, as a message; "" if nothing is missing."""
    script = CLEANRL_SCRIPTS.get(name, "")
    if script and (setting.cleanrl is None or setting.cleanrl.name != script):
        return f"{name} needs CleanRL's script; give the path of its {script} with --cleanrl"
    if name in NEEDS:
        try:
            run_command([setting.peer_python, "-c", f"import {NEEDS[name]}"])
        except UserError:
            return (
                f"{setting.peer_python} has no {NEEDS[name]}, which {name} needs; "
                "give a Python that has it with --peer-python"
            )
    return ""


def compare(names: Sequence[str], setting: Setting, file: Path) -> None:
    """Make the comparisons one after the other; print and write the results after each.

    Args:
        names: of the comparisons; none: all whose peer is there.
        setting: the options.
        file: for the results.

    Raises:
        UserError: a run failed, the peer is missing, or the file cannot be written.
    """
    missing = {name: missing_peer(name, setting) for name in names or COMPARISONS}
    for message in filter(None, missing.values()):
        if names:
            raise UserError(message)
        print_message(f"left out: {message}")
    rows: list[Row] = []
    for name in (name for name, message in missing.items() if not message):
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
        "--peer-python", default=sys.executable, metavar="PATH", help="a Python with the peers"
    )
    parser.add_argument("--cleanrl", type=Path, metavar="FILE", help="CleanRL's dqn.py or pqn.py")
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
    cleanrl = options.cleanrl.absolute() if options.cleanrl else None
    setting = Setting(options.peer_python, cleanrl, options.rounds, options.seconds, cores)
    compare(options.comparisons, setting, options.json)
    return 0
