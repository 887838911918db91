"""Measure how the strategies (--sync) compare.

    python -m tests.launch.measure_sync straggler    3 acting ranks, one of them 5 times slower
    python -m tests.launch.measure_sync network      2 hosts, 20 ms and 50 Mbit/s apart, Nature CNN; as root
    python -m tests.launch.measure_sync traffic      messages and bytes of a rank per update, 3 ranks, CartPole
    python -m tests.launch.measure_sync cartpole 1 2 3 4 5    returns on 3 ranks, for each seed

Rates are those of whole runs after learning has begun, without checkpoints and evaluations. Run it on an idle machine.
Add --short to check in seconds that it works, on fewer ranks and with a small network; the numbers then mean nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tests.distributed.runs import summary
from tests.launch.hosts import Cluster
from tests.launchers import REPOSITORY, Result, clean_environment, launch

TIMEOUT_SECONDS = 280
DELAY_MS, MBIT = 20.0, 50.0
UNTIMED = (
    "--checkpoint-every",
    "0",
    "--eval-every",
    "0",
    "--eval-episodes",
    "1",
    "--checkpoint-replay",
    "no",
)
SHORT_CARTPOLE = ("--total-env-steps", "1500", "--eval-episodes", "1")
STRAGGLER = "--preset smoke --vectorization sync --envs-per-rank 2 --log-every 60 --replay-capacity 20000"


def rate(run_dir: Path, whole_updates: int = 1) -> float:
    """Return env steps per second between the first and last metrics line with updates.

    The number of updates between them is a multiple of `whole_updates`.
    """
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "lr" in line and line["updates"] > 0]  # evaluations have none
    first = lines[0]
    last = [line for line in lines if (line["updates"] - first["updates"]) % whole_updates == 0][-1]
    seconds: float = last["wall_seconds"] - first["wall_seconds"]
    return (last["env_steps"] - first["env_steps"]) / seconds


def mpirun(np: int, run_dir: Path, *flags: str) -> Result:
    argv = ["-m", "hvdqn.train", "--comm", "mpi", "--run-dir", str(run_dir), *flags]
    result = launch("mpirun", np, argv, TIMEOUT_SECONDS)
    assert result.returncode == 0, result
    return result


def straggler(folder: Path, short: bool) -> None:
    """Environments sleep for 2 ms per step, on the straggler for 10 ms, so that ranks need no core of their own."""
    for sync, np in (("gradients", 2), ("server", 3)) if short else (("gradients", 3), ("server", 4)):
        rates = []
        for wrapper, total in (("all_equally_slow", 9_000), ("rank_1_five_times_slower", 4_000)):
            total = 400 if short else total
            run_dir = folder / f"{sync}-{wrapper}"
            mpirun(
                np, run_dir, *STRAGGLER.split(), *UNTIMED, "--sync", sync, "--total-env-steps", str(total),
                "--wrapper", f"tests.distributed.sabotage:{wrapper}",
            )  # fmt: skip
            rates.append(rate(run_dir))
        alike, slowed = rates
        print(
            f"{sync}: {alike:,.0f} env steps/s alike, {slowed:,.0f} with a straggler: {slowed / alike:.0%} is left"
        )
        print(f"   {dict(list(summary(run_dir).get('staleness', {}).items())[:12])}", flush=True)


def traffic(folder: Path, short: bool) -> None:
    """Print the counted and the predicted traffic."""
    np, total = (2, "800") if short else (3, "12000")
    for sync in ("gradients", "parameters", "server"):
        mpirun(np, folder / sync, "--preset", "smoke", "--sync", sync, "--total-env-steps", total)
        print(f"{sync}: {summary(folder / sync)['traffic']}", flush=True)


def network(folder: Path, short: bool) -> None:
    """Run two ranks on two hosts. Before and after that on one host, for comparison, because the rate may drift."""
    one, two = "h1:2", "h1:1,h2:1"
    order = [("gradients", one), ("parameters", two), ("gradients", two)]
    if not short:
        order[2:2] = [("gradients", one)]
        order += [("gradients", one), ("parameters", two), ("gradients", one)]
    average_every, fill, batch = (2, 256, 64) if short else (50, 2048, 512)
    game = "smoke" if short else """atari --env-kwargs {"max_num_frames_per_episode":400}"""
    updates = {"gradients": 2 if short else 25, "parameters": average_every + 2}
    rates: dict[tuple[str, str], list[float]] = {}
    with Cluster(2, folder, DELAY_MS, MBIT) as cluster:
        print(f"links are slowed by {cluster.slowed_by}", flush=True)
        for number, (sync, hosts) in enumerate(order):
            # An update every 128 env steps, once replay has been filled.
            flags = f"""--preset {game} --comm mpi --sync {sync} --sync-every {average_every} --envs-per-rank 16
                --batch-per-rank {batch} --replay-ratio {batch / 64} --learning-starts {fill}
                --replay-capacity 20000 --threads-per-rank 1 --log-every 128 --target-every 12800
                --total-env-steps {fill + 128 * (updates[sync] + 1)}"""
            run_dir = folder / str(number)
            words = [str(REPOSITORY / "launch" / "mpirun.sh"), "--hosts", hosts, "--interfaces", "eth0", "--"]
            words += [*flags.split(), *UNTIMED, "--run-dir", str(run_dir)]
            environment = clean_environment() | {"HVDQN_VENV": sys.prefix}
            with cluster.start(words, environment, TIMEOUT_SECONDS, folder) as job:
                result = job.wait()
            assert result.returncode == 0, result
            found = rate(run_dir, average_every if sync == "parameters" else 1)
            rates.setdefault((sync, hosts), []).append(found)
            print(f"{sync}, {hosts}: {found:,.1f} env steps/s, {summary(run_dir)['seconds']}", flush=True)
    here = fmean(rates["gradients", one])
    for sync in updates:
        print(
            f"{sync}: {fmean(rates[sync, two]) / here:.0%} of the rate of one host is left on two", flush=True
        )


def cartpole(folder: Path, short: bool, seeds: Sequence[str]) -> None:
    """Print the return of the greedy policy after training, over 100 episodes."""
    np, size = (2, SHORT_CARTPOLE) if short else (3, ())
    strategies = {"server": (), "parameters": ("--sync-every", "10"), "gradients": ()}
    for seed in seeds:
        for sync, flags in strategies.items():
            run_dir = folder / f"{sync}-{seed}"
            mpirun(np, run_dir, "--preset", "cartpole", "--seed", seed, "--sync", sync, *flags, *size)
            done: dict[str, Any] = summary(run_dir)
            print(
                f"{sync}, seed {seed}: {done['eval_return_mean']} in {done['wall_seconds']:.0f} s", flush=True
            )


def main(argv: Sequence[str]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measures = {"straggler": straggler, "network": network, "traffic": traffic, "cartpole": cartpole}
    what, *rest = [word for word in argv if word != "--short"]
    with tempfile.TemporaryDirectory(prefix="measure-") as name:
        measures[what](Path(name), "--short" in argv, *([rest] if rest else []))


if __name__ == "__main__":
    main(sys.argv[1:])
