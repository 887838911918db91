"""One rank of test_prioritized.py: `prioritized_worker.py COMM`, started by a launcher.

Each rank fills its replay with unequal priorities. The mean gradient of many weighted minibatches must equal the
gradient over all transitions of the job, each counted once.
"""

from __future__ import annotations

import sys
import traceback

import numpy as np
import torch

from hvdqn.comm import Comm, connect
from hvdqn.config import parse
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import build_parts
from hvdqn.rank import Acting, Parts
from hvdqn.replay import Batch, Importance, PrioritizedReplay
from hvdqn.sync.statistics import REPORTED

UPDATES, BATCH = 400, 32
REPORT = (0.0,) * len(REPORTED)
# The learning rate is too small to change a weight, so every update is of the same network.
FLAGS = f"""--env CartPole-v1 --replay prioritized --priority-alpha 1 --hidden 16 --batch-per-rank {BATCH} --lr 1e-30
    --lr-scaling none --max-grad-norm 0 --envs-per-rank 3 --replay-capacity 2000 --learning-starts 100 --gamma 0.9"""


def fill(acting: Acting, rank: int) -> np.ndarray:
    """Fill this rank's replay, differently on each rank, with priorities that matter for the gradient.

    Returns:
        The rows of all transitions.
    """
    replay = acting.replay
    assert isinstance(replay, PrioritizedReplay)
    replay.start(acting.actor.start())
    for _ in range(40 + 50 * rank):
        actions = acting.actor.choose(1.0)
        replay.add(actions, acting.actor.step(actions))
    rows = replay.sampleable_rows()
    angles = np.abs(replay.observation[:][rows, 2])  # so priorities depend on the observations
    td_errors = (0.02 + angles) * (1 + 4 * rank)
    replay.update_priorities(replay.row_ids(rows), td_errors)
    return rows


def true_gradient(comm: Comm, parts: Parts, rows: np.ndarray) -> tuple[torch.Tensor, int]:
    """Return the mean gradient over all transitions of all ranks, and their number."""
    assert parts.acting is not None
    batch = parts.acting.replay.build_batch(rows)
    assert (batch.weight == 1).all()
    parts.learner.compute_gradient(batch)
    # The learner divides it by the number of ranks, for the sum over them.
    gradient = parts.learner.gradient.double() * comm.size
    shares = comm.all_gather_object((gradient * rows.size, rows.size))
    total = sum(count for _, count in shares)
    return torch.stack([gradient for gradient, _ in shares]).sum(dim=0) / total, total


def update(parts: Parts, batch: Batch) -> torch.Tensor:
    """Take an update and return the gradient of all ranks [parameters]."""
    learned = parts.learner.compute_gradient(batch)
    parts.strategy.launch(REPORT, learned, float(batch.weight.max()), progress=1.0)
    assert parts.strategy.wait().updates == 1
    return parts.learner.gradient.double().clone()


def check_unbiased(comm: Comm, config_flags: str) -> str:
    parts = build_parts(parse(config_flags.split()), comm, PhaseTimer())
    assert parts.acting is not None
    replay = parts.acting.replay
    true, n_global = true_gradient(comm, parts, fill(parts.acting, comm.rank))
    estimates, largest, uncorrected = [], [], []
    for _ in range(UPDATES):
        importance = Importance(beta=1.0, n_global=n_global, size=comm.size)
        batch = replay.sample(BATCH, importance)
        largest.append(max(comm.all_gather_object(float(batch.weight.max()))))
        estimates.append(update(parts, batch) * largest[-1])
        uncorrected.append(update(parts, replay.sample(BATCH)))
    parts.acting.envs.close()
    z, z_uncorrected = (deviation(made, true) for made in (estimates, uncorrected))
    # The root mean square over parameters is about 1 standard error without a bias.
    assert z < 1.5, f"biased: {z:.2f} standard errors"
    assert z_uncorrected > 3, f"the priorities make no difference: {z_uncorrected:.2f} standard errors"
    return f"{z:.2f} standard errors, {z_uncorrected:.1f} without weights"


def deviation(gradients: list[torch.Tensor], true: torch.Tensor) -> float:
    """Return the root mean square over parameters of (mean - true) / standard error of the mean."""
    stacked = torch.stack(gradients)
    error = stacked.std(dim=0) / len(gradients) ** 0.5
    counts = error > 1e-9  # a unit that is never active has no gradient
    z = (stacked.mean(dim=0) - true)[counts] / error[counts]
    return float(z.square().mean().sqrt())


def main(choice: str) -> None:
    torch.set_num_threads(1)
    comm = connect(choice)
    try:
        result = check_unbiased(comm, FLAGS)
        results = comm.all_gather_object(result)
        assert results == [result] * comm.size, "the ranks took different steps"
        sys.stdout.write(f"rank {comm.rank} of {comm.size}: {result}\n")
        sys.stdout.flush()
    except Exception:
        traceback.print_exc()
        comm.abort(1)
    comm.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
