"""Measure networks that two ranks hold between them against two ranks that each hold all of it.

    mpirun -np 2 python -m tests.benchmarks.model_parallel speed.json      seconds per update, over width and minibatch
    mpirun -np 2 python -m tests.benchmarks.model_parallel memory M        peak memory of a rank, --hidden 8192 8192
    python -m tests.benchmarks.model_parallel chart speed.json docs/images/model-parallel.png

An update is sampling aside: the gradient of a given minibatch, its exchange and the step of Adam, with Double DQN, from
128 numbers through two hidden layers to 6 Q-values. The chart shows how many times as fast `--model-parallel 2` is.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

from hvdqn.comm import Comm, connect
from hvdqn.config import Config
from hvdqn.metrics import PhaseTimer
from hvdqn.networks import make_network
from hvdqn.replay import Batch
from hvdqn.sync import RankGroup
from tests.learning_ranks import LearningRank

WIDTHS, BATCHES = (512, 1024, 2048, 4096, 8192), (32, 128, 512, 1024)
INPUTS, ACTIONS = 128, 6
SECONDS, MOST_UPDATES, LONG_SECONDS = 0.6, 50, 2.0
PASSES = 3  # of Double DQN through the layers: two of the online network, one of the target network


def make_batch(size: int) -> Batch:
    """Return a random minibatch."""
    rng = np.random.default_rng(0)
    return Batch(
        observation=rng.normal(size=(size, INPUTS)).astype(np.float32),
        action=rng.integers(ACTIONS, size=size),
        reward=rng.normal(size=size).astype(np.float32),
        next_observation=rng.normal(size=(size, INPUTS)).astype(np.float32),
        discount=np.full(size, 0.99, np.float32),
        weight=np.ones(size, np.float32),
        row_ids=np.arange(size),
    )


def make_rank(comm: Comm, group: RankGroup | None, width: int, batch: int) -> LearningRank:
    """Return a rank that holds a whole network, or its part of one."""
    config = Config().replace(hidden=(width, width), batch_per_rank=batch)
    torch.manual_seed(0)
    network = make_network(config.network, "huber", (INPUTS,), 1, False, ACTIONS, group)
    return LearningRank(config, comm, network, group=group)


def seconds_per_update(comm: Comm, rank: LearningRank, batch: Batch) -> float:
    """Return the mean seconds of an update on the slowest rank; a first one is left out unless updates are long."""
    taken: list[float] = []
    for update in range(MOST_UPDATES + 1):
        comm.barrier()
        began = time.perf_counter()
        rank.update(batch)
        seconds = max(comm.all_gather_object(time.perf_counter() - began))
        if update or seconds > LONG_SECONDS:
            taken.append(seconds)
        if sum(taken) > SECONDS:
            break
    return sum(taken) / len(taken)


def measure(comm: Comm, path: Path) -> None:
    """Measure every width and minibatch; write the seconds per update as JSON."""
    rows = []
    group = RankGroup(comm, 2, PhaseTimer())
    for width in WIDTHS:
        for batch in BATCHES:
            seconds = [
                seconds_per_update(comm, make_rank(comm, one, width, batch), make_batch(batch))
                for one in (None, group)
            ]
            rows.append({"width": width, "batch": batch, "data": seconds[0], "model": seconds[1]})
            if comm.rank == 0:
                sys.stdout.write(f"{width:5} {batch:5} data {seconds[0]:8.4f} s, model {seconds[1]:8.4f} s\n")
                sys.stdout.flush()
                path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    group.close()


def measure_memory(comm: Comm, size: int) -> None:
    """Print the peak memory of each rank after three updates, and what it was before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    group = RankGroup(comm, size, PhaseTimer()) if size > 1 else None
    rank = make_rank(comm, group, 8192, 32)
    for _ in range(3):
        rank.update(make_batch(32))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index, (low, high) in enumerate(comm.all_gather_object((before, peak))):
        if comm.rank == 0:
            sys.stdout.write(
                f"--model-parallel {size}, rank {index}: {high / 1e6:.2f} GB, {low / 1e6:.2f} GB before the network\n"
            )
    if group is not None:
        group.close()


def draw(path: Path, image: Path) -> None:
    """Draw how many times as fast two ranks are that hold one network between them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = json.loads(path.read_text(encoding="utf-8"))
    speed = {(row["width"], row["batch"]): row["data"] / row["model"] for row in rows}
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for batch in BATCHES:
        line = axes.plot(
            WIDTHS, [speed[width, batch] for width in WIDTHS], "o-", label=f"{batch} transitions a rank"
        )
        axes.axvline(PASSES * 2 * batch, color=line[0].get_color(), linestyle=":", linewidth=1)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(WIDTHS[0] * 0.8, WIDTHS[-1] * 1.25)
    axes.set_xticks(WIDTHS, map(str, WIDTHS))
    axes.set_xlabel("units of both hidden layers; dotted: equal bytes, 3 x 2 x minibatch")
    axes.set_ylabel("times as fast as two whole networks")
    axes.legend()
    figure.savefig(image, dpi=120)


def main(arguments: list[str]) -> None:
    """Measure or draw."""
    if arguments[0] == "chart":
        draw(Path(arguments[1]), Path(arguments[2]))
        return
    torch.set_num_threads(1)
    comm = connect("mpi")
    if arguments[0] == "memory":
        measure_memory(comm, int(arguments[1]))
    else:
        measure(comm, Path(arguments[0]))
    comm.close()


if __name__ == "__main__":
    main(sys.argv[1:])
