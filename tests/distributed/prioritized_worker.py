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
from hvdqn.learner import REPORTED, Learner
from hvdqn.metrics import PhaseTimer
from hvdqn.parts import Parts, build_parts
from hvdqn.replay import Batch, Importance, PrioritizedReplay

UPDATES, BATCH = 400, 32
REPORT = (0.0,) * len(REPORTED)
# The learning rate is too small to change a weight, so every update is of the same network.
FLAGS = f"""--env CartPole-v1 --replay prioritized --priority-alpha 1 --hidden 16 --batch-per-rank {BATCH} --lr 1e-30
    --lr-scaling none --max-grad-norm 0 --envs-per-rank 3 --replay-capacity 2000 --learning-starts 100 --gamma 0.9"""


def fill(parts: Parts, rank: int) -> np.ndarray:
    """Fill this rank's replay, differently on each rank, with priorities that matter for the gradient.

    Returns:
        The rows of all transitions.
    """
    assert isinstance(parts.replay, PrioritizedReplay)
    parts.replay.start(parts.actor.start())
    for _ in range(40 + 50 * rank):
        actions = parts.actor.choose(1.0)
        parts.replay.add(actions, parts.actor.step(actions))
    rows = parts.replay.sampleable_rows()
    angles = np.abs(parts.replay.observation[:][rows, 2])  # so priorities depend on the observations
    td_errors = (0.02 + angles) * (1 + 4 * rank)
    parts.replay.update_priorities(parts.replay.row_ids(rows), td_errors)
    return rows


def true_gradient(comm: Comm, parts: Parts, rows: np.ndarray) -> tuple[torch.Tensor, int]:
    """Return the mean gradient over all transitions of all ranks, and their number."""
    batch = parts.replay.build_batch(rows)
    assert (batch.weight == 1).all()
    parts.learner.backward(batch)
    gradient = (
        parts.learner.gradient.double() * comm.size
    )  # the learner divides by it, for the sum over ranks
    shares = comm.all_gather_object((gradient * rows.size, rows.size))
    total = sum(count for _, count in shares)
    return torch.stack([gradient for gradient, _ in shares]).sum(dim=0) / total, total


def update(learner: Learner, batch: Batch) -> torch.Tensor:
    """Take an update and return the gradient of all ranks [parameters]."""
    learner.begin_update(batch, REPORT)
    learner.finish_update()
    return learner.gradient.double().clone()


def check_unbiased(comm: Comm, config_flags: str) -> str:
    parts = build_parts(parse(config_flags.split()), comm, PhaseTimer())
    true, n_global = true_gradient(comm, parts, fill(parts, comm.rank))
    estimates, largest, uncorrected = [], [], []
    for _ in range(UPDATES):
        importance = Importance(beta=1.0, n_global=n_global, size=comm.size)
        batch = parts.replay.sample(BATCH, importance)
        largest.append(max(comm.all_gather_object(float(batch.weight.max()))))
        estimates.append(update(parts.learner, batch) * largest[-1])
        uncorrected.append(update(parts.learner, parts.replay.sample(BATCH)))
    parts.envs.close()
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
