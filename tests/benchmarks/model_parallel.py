"""Measure networks that two ranks hold between them against two ranks that each hold all of it.

    mpirun -np 2 python -m tests.benchmarks.model_parallel speed docs/images/model-parallel.png
    mpirun -np 2 python -m tests.benchmarks.model_parallel memory M

The first prints the seconds of an update over width and minibatch and draws the chart, the second the peak memory of
each rank with --hidden 8192 8192. `--short` behind either uses small networks.

An update is the gradient of a given minibatch, its exchange and the step of Adam, with Double DQN, from 128
numbers through two hidden layers to 6 Q-values. The chart shows how many times as fast `--model-parallel 2` is.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
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
    network = make_network(config.network, "huber", (INPUTS,), 1, False, ACTIONS, group=group)
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


def measure_speed(comm: Comm, image: Path, widths: Sequence[int], batches: Sequence[int]) -> None:
    """Measure every width and minibatch, print the seconds per update and draw the chart."""
    speed: dict[tuple[int, int], float] = {}
    group = RankGroup(comm, 2, PhaseTimer())
    for width in widths:
        for batch in batches:
            data, model = (
                seconds_per_update(comm, make_rank(comm, one, width, batch), make_batch(batch))
                for one in (None, group)
            )
            speed[width, batch] = data / model
            if comm.rank == 0:
                print(
                    f"{width:5} units, {batch:4} transitions: {data:8.4f} s whole, {model:8.4f} s split",
                    flush=True,
                )
    group.close()
    if comm.rank == 0:
        draw(speed, widths, batches, image)


def measure_memory(comm: Comm, size: int, width: int) -> None:
    """Print the peak memory of each rank after three updates, and what it was before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    group = RankGroup(comm, size, PhaseTimer()) if size > 1 else None
    rank = make_rank(comm, group, width, 32)
    for _ in range(3):
        rank.update(make_batch(32))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index, (low, high) in enumerate(comm.all_gather_object((before, peak))):
        if comm.rank == 0:
            print(
                f"--model-parallel {size}, rank {index}: {high / 1e6:.2f} GB, {low / 1e6:.2f} GB of it imports"
            )
    if group is not None:
        group.close()


def draw(
    speed: Mapping[tuple[int, int], float], widths: Sequence[int], batches: Sequence[int], image: Path
) -> None:
    """Draw how many times as fast two ranks are that hold one network between them, by width and minibatch."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for batch in batches:
        line = axes.plot(
            widths, [speed[width, batch] for width in widths], "o-", label=f"{batch} transitions a rank"
        )
        axes.axvline(PASSES * 2 * batch, color=line[0].get_color(), linestyle=":", linewidth=1)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(widths[0] * 0.8, widths[-1] * 1.25)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.set_xlabel("units of both hidden layers; dotted: equal bytes, 3 x 2 x minibatch")
    axes.set_ylabel("times as fast as two whole networks")
    axes.legend()
    figure.savefig(image, dpi=120)


def main(what: str, which: str, *words: str) -> None:
    """Measure speed or memory."""
    short = "--short" in words
    torch.set_num_threads(1)
    comm = connect("mpi")
    if what == "memory":
        measure_memory(comm, int(which), 64 if short else 8192)
    else:
        measure_speed(comm, Path(which), *(((64, 128), (32, 64)) if short else (WIDTHS, BATCHES)))
    comm.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
